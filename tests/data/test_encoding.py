"""What is supervised, whatever the format, the template and the room."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylora.data import encoding
from raylora.data.datasets import read_dataset
from raylora.data.encoding import IGNORE_INDEX, StoredEncoded, encode_each, encode_example, labels_of, supervised_counts
from raylora.data.parse_record import parse_record
from raylora.records import Example, Message
from tests.helpers.formats import FORMATS, PAIRS, TEXT, conversation
from tests.helpers.templates import FORGETFUL, TEMPLATES
from tests.helpers.training import make_examples


@pytest.mark.parametrize("train_on", ["answer", "all"])
def test_packed_tokens_are_the_same(tokenizer, on_disk, monkeypatch, train_on):
    monkeypatch.setattr(encoding, "ENCODED_TOGETHER", 7)
    told = [Example((Message("user", q),), a, q) for q, a in PAIRS]
    told += parse_record(conversation(["What is it?", "That.", "And why?", "So."])).examples
    plain = [encode_example(tokenizer, e, 20) for e in told]
    packed = StoredEncoded(encode_each(tokenizer, told, 20))
    assert list(packed) == plain
    assert packed[3:9:2] == plain[3:9:2]
    assert packed[-1] == plain[-1]
    assert list(packed.lengths) == [len(e) for e in plain]
    counts = [sum(t != encoding.IGNORE_INDEX for t in labels_of(e, train_on)) for e in plain]
    assert supervised_counts(packed, train_on) == supervised_counts(plain, train_on) == counts


def text_of(tokenizer, encoded, mask):
    return tokenizer.decode([t for t, m in zip(encoded.input_ids, mask, strict=True) if m])


@pytest.mark.parametrize("answer", ["Paris", "两个词", "  spaced  ", "a\nb", "🎉 é", "What of 3?"])
def test_supervised_tokens_are_exactly_the_answer_and_its_end(tokenizer, answer):
    example = Example((Message("user", "What of 3?"),), answer, "What of 3?")
    encoded = encode_example(tokenizer, example, 256)
    assert text_of(tokenizer, encoded, encoded.is_answer_text) == answer
    assert text_of(tokenizer, encoded, encoded.is_answer) == answer + "<|im_end|>"
    assert text_of(tokenizer, encoded, encoded.is_question) == "What of 3?"
    labels = labels_of(encoded, "answer")
    assert [t for t in labels if t != IGNORE_INDEX] == [
        t for t, m in zip(encoded.input_ids, encoded.is_answer, strict=True) if m
    ]
    assert sum(t == IGNORE_INDEX for t in labels_of(encoded, "all")) == 1


def test_without_a_template_a_plain_form_is_used(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    encoded = encode_example(tokenizer, make_examples(3)[2], 256)
    assert text_of(tokenizer, encoded, encoded.is_answer) == "It is 4.<|im_end|>"
    assert "User: What of 2?" in tokenizer.decode(encoded.input_ids)


def test_truncation_keeps_the_answer(tokenizer):
    long_question = Example((Message("user", "word " * 500),), "yes", "q")
    encoded = encode_example(tokenizer, long_question, 64)
    assert len(encoded) == 64
    assert text_of(tokenizer, encoded, encoded.is_answer_text) == "yes"
    long_answer = Example((Message("user", "what?"),), "word " * 500, "q")
    encoded = encode_example(tokenizer, long_answer, 64)
    assert len(encoded) == 64
    assert not encoded.is_answer[0]


ANSWERS = [
    ("What is the capital of France?", "Paris"),
    ("Sort: 3, 1, 2", "1, 2, 3\nas they should be.\n\n- one\n- two"),
    ("谁会叫? " * 5, "猫会叫，狗也会。"),
    ("Say it again: Paris", "Say it again: Paris"),
    ("Name an emoji", "🎉 é"),
    ("Which letter?", "n"),
    ("What ends a turn?", "im_end"),
    ("Who are you?", "assistant"),
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("form", FORMATS)
def test_supervised_tokens_read_as_the_answers_whatever_the_format_and_template(
    tokenizer, tmp_path, monkeypatch, form, template
):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[template])
    path = tmp_path / "data.json"
    path.write_text(json.dumps([FORMATS[form](q, a) for q, a in ANSWERS]), encoding="utf-8")
    examples = read_dataset(path).examples
    for (_, answer), example in zip(ANSWERS, examples, strict=True):
        whole = encode_example(tokenizer, example, 4096)
        supervised = [t for t in labels_of(whole, "answer") if t != IGNORE_INDEX]
        text = tokenizer.decode(supervised)
        # Where a template puts a space before an answer, it is a part of its first word; a space behind is one to say.
        assert text.removeprefix(" " if template in {"llama 2", "none"} else "").replace(
            " <|im_end|>", "<|im_end|>"
        ) == (f"{answer}<|im_end|>")
        assert whole.input_ids[-len(supervised) :] == supervised, "the answer ends the example"
        for max_length in range(len(supervised) + 1, len(whole), 7):
            cut = encode_example(tokenizer, example, max_length)
            assert len(cut) == max_length
            kept = [t for t in labels_of(cut, "answer") if t != IGNORE_INDEX]
            assert kept == supervised[: len(kept)], "what is left of an answer is its beginning"
            # A quarter of the room is kept for the prompt; only an answer that does not fit the rest is cut.
            assert len(kept) >= min(len(supervised), max_length - max_length // 4)
            assert cut.input_ids[-len(kept) :] == kept


def test_what_a_template_makes_of_thinking_is_supervised_with_the_answer(tokenizer, monkeypatch):
    """One that drops it leaves the answer behind it, and one that adds an empty thought to others keeps a real one."""
    answer = "<think>\nlight is\n</think>\n\nThe answer is water."
    example = Example((Message("user", "What is wet?"),), answer, "What is wet?")
    adds = TEMPLATES["thinking"].replace(
        "<think>\n\n</think>\n\n", "{{ '' if '<think>' in m['content'] else '<think>\n\n</think>\n\n' }}"
    )
    for template, expected in ((TEMPLATES["reasoning"], "\n\nThe answer is water."), (adds, answer)):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        labels = labels_of(encode_example(tokenizer, example, 4096), "answer")
        assert tokenizer.decode([t for t in labels if t != IGNORE_INDEX]) == f"{expected}<|im_end|>"


# Several turns


def supervised_texts(tokenizer, examples, max_length=4096):
    each = encode_each(tokenizer, examples, max_length)
    return [tokenizer.decode([t for t in labels_of(e, "all") if t != IGNORE_INDEX]) for e in each]


@pytest.mark.parametrize("template", [name for name, text in TEMPLATES.items() if text and name != "reasoning"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(TEXT, min_size=2, max_size=8).map(lambda c: c[: len(c) // 2 * 2]))
def test_all_supervises_each_token_of_a_conversation_once(tokenizer, monkeypatch, template, contents):
    """What its examples supervise, one after another, is the whole conversation, but for its first token."""
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[template])
    examples = parse_record(conversation(contents)).examples
    whole = encode_example(tokenizer, examples[-1], 100_000)
    assert "".join(supervised_texts(tokenizer, examples, 100_000)) == tokenizer.decode(whole.input_ids[1:])


@pytest.mark.parametrize("template", [*TEMPLATES, "forgetful"])
@pytest.mark.parametrize("end", ["", ".", " \n", ". Another answer stands here."])
def test_all_supervises_each_turn_once_whatever_the_template_does_to_earlier_ones(
    tokenizer, monkeypatch, template, end
):
    monkeypatch.setattr(tokenizer, "chat_template", {**TEMPLATES, "forgetful": FORGETFUL}[template])
    contents = [f"<think>\nT{i}\n</think>\n\nW{i}{end}" if i % 2 else f"W{i}{end}" for i in range(10)]
    examples = parse_record(conversation(contents)).examples
    texts = supervised_texts(tokenizer, examples)
    for i in range(10):
        assert [k for k, text in enumerate(texts) if f"W{i}" in text] == [i // 2], (i, texts)
    assert sum(text.count("<|im_end|>") for text in texts) >= 5
    if template == "forgetful":  # 2 marks an example; the first example has those of both its turns
        assert [text.count("<|im_end|>") for text in texts] == [2] * 5, texts
        assert [text.count("<think>") for text in texts] == [1] * 5, "thinking that only its own example shows"
    # Each example has the same marks whichever others are there.
    assert supervised_texts(tokenizer, examples[3:]) == texts[3:]


def test_all_supervises_what_is_left_of_a_turn_whose_front_is_cut(tokenizer):
    examples = parse_record(conversation(["word " * 40, "yes " * 40, "and " * 40, "no " * 40])).examples
    whole, cut = (encode_example(tokenizer, examples[1], length) for length in (4096, 64))
    assert whole.num_repeated > 0
    assert len(cut) == 64
    assert cut.num_repeated == 0
    some = encode_example(tokenizer, examples[1], len(whole) - whole.num_repeated + 10)
    assert some.num_repeated == 10
    assert labels_of(some, "all")[10:] == some.input_ids[10:]
