"""A long text that is cut before it is tokenized gives the tokens that it gives whole."""

from __future__ import annotations

import functools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from raylora.data import encoding, long_texts
from raylora.data.encoding import encode_each, encode_with_offsets
from raylora.data.long_texts import pieces_of, place_after, place_before
from raylora.records import Example, Message
from tests.helpers.templates import TEMPLATES
from tests.helpers.tiny import CORPUS, make_tokenizer

WORDS = [
    "the",
    "capital",
    "of",
    "France,",
    "7",
    "<",
    "9.",
    "naïve",
    "数据集",
    "猫会叫，狗也会。",
    "x==y",
    "🎉",
    "<|im_end|>",
    "Paris",
    "don't\n\n",
    "",
    "",
    "",
    "aaaaaaaaaaaa",
    "1234567",
]
KINDS = ("bytes", "digits", "metaspace", "prepended", "unigram")


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers of the families: GPT-2, Llama 3, Llama 2 (no words are split beforehand), T5 and XLNet."""
    if kind == "bytes":
        return make_tokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    text = [*CORPUS, *WORDS * 3]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
        if kind == "digits":
            pattern = (
                r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
            split = pre_tokenizers.Split(Regex(pattern), "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
            tokenizer.decoder = decoders.ByteLevel()
        elif kind == "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        else:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    template = make_tokenizer().chat_template
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>",
        unk_token="<unk>", chat_template=template,
    )  # fmt: skip


def long_text(seed: int, num_words: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


SIZES = st.sampled_from([0, 3, 600, 3000])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), SIZES, SIZES, st.sampled_from([16, 50, 200]), st.sampled_from([*TEMPLATES]))
def test_tokens_are_those_of_the_whole_text(kind, seed, num_asked, num_answered, max_length, template):
    tokenizer = tokenizer_of(kind)
    question, answer = long_text(seed, num_asked + 1), long_text(seed + 1, num_answered + 1)
    example = Example((Message("user", question),), answer, question)
    earlier = (Message("user", "What?"), Message("assistant", long_text(seed, 20)), Message("user", question))
    examples = [example, Example((), answer, ""), Example(earlier, answer, question, num_repeated=2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", TEMPLATES[template])
        patch.setattr(long_texts, "SEARCHED", 2000)
        patch.setattr(long_texts, "MARGIN", 64)
        whole = list(encode_each(tokenizer, examples, max_length))
        offsets = [encode_with_offsets(tokenizer, e, max_length) for e in examples]
        patch.setattr(long_texts, "LONG", 100)
        patch.setattr(long_texts, "CHARS_A_TOKEN", 4)
        assert list(encode_each(tokenizer, examples, max_length)) == whole
        assert [encode_with_offsets(tokenizer, e, max_length) for e in examples] == offsets


@pytest.mark.slow
def test_tokens_of_a_real_model(smollm2):
    for seed, template in enumerate(("chatml", "none")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(smollm2.tokenizer, "chat_template", TEMPLATES[template])
            asked, answer = long_text(seed, 60_000), long_text(seed + 9, 70_000)
            example = Example((Message("user", asked),), answer, asked)
            found = encoding.encode_example(smollm2.tokenizer, example, 512)
            patch.setattr(long_texts, "LONG", 10**9)
            assert encoding.encode_example(smollm2.tokenizer, example, 512) == found


def test_what_is_tokenized_does_not_grow_with_the_text(monkeypatch):
    tokenizer, sizes = make_tokenizer(), []
    tokenize = tokenizer.__class__.__call__

    def counted(self, texts, **options):
        sizes.extend(map(len, texts))
        return tokenize(self, texts, **options)

    monkeypatch.setattr(tokenizer.__class__, "__call__", counted)
    for answer in ("y " * 1_000_000, "a" * 2_000_000, "猫" * 1_000_000):
        assert len(encoding.encode_example(tokenizer, Example((Message("user", "x"),), answer, "x"), 64)) == 64
    assert max(sizes) < 300_000


def test_spaces_that_a_normalizer_takes_away_are_no_tokens():
    tokenizer = tokenizer_of("unigram")
    example = Example((Message("user", long_text(1, 300) + " " * 300_000 + "Paris"),), "yes", "q")
    found = encoding.encode_example(tokenizer, example, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "LONG", 10**9)
        assert encoding.encode_example(tokenizer, example, 64) == found


def test_places_of_cuts():
    text = "a b" * 40_000 + "x" * 300_000 + " end. The end"
    assert text[place_before(text, 100_000) :].startswith(" ")
    assert place_before(text, 400_000) == 400_000, "no place near: cut anyway"
    assert place_before("x" * 50_000, 40_000) == 0
    assert place_after(text, len(text)) == len(text)
    assert place_after(text, 419_900) == text.index(" end")
    assert "".join(pieces_of(text)) == text
    assert max(map(len, pieces_of(text))) <= 150_000
