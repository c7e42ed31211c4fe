"""Prompts and their tokens, in both styles."""

from __future__ import annotations

import copy
import os
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from raylora.config.options import ModelOptions
from raylora.data.rendered import common_prefix_length
from raylora.data.rendering import set_rendering
from raylora.errors import UserError
from raylora.mmlu.prompts import (
    THINKING_TOKENS,
    build_shots,
    chat_prompt,
    encode_questions,
    harness_prompt,
    load_encoded,
    save_encoded,
    thinking_of,
)
from raylora.records import Question
from tests.helpers.questions import SUBJECTS, encode, make_questions, questions_of_many_sizes
from tests.helpers.thinking import thinking_tokenizer
from tests.helpers.tiny import CHAT_TEMPLATE, make_tokenizer


class OwnCall(PreTrainedTokenizerFast):
    """Does something to texts before they reach the backend, as some models' tokenizers do."""

    parallelism = ""

    def _encode_plus(self, text: Any, *args: Any, **options: Any) -> Any:
        self.parallelism = os.environ["TOKENIZERS_PARALLELISM"]
        text = text.lower() if isinstance(text, str) else [t.lower() for t in text]
        return super()._encode_plus(text, *args, **options)


def joining_tokenizer() -> PreTrainedTokenizerFast:
    """Knows no words: it joins a colon or a line break with some of the letters behind it."""
    pieces = [("<unk>", 0.0), *((c, -9.0) for c in string.printable), (": B", -1.0), (":", -8.0), (" C", -1.0)]
    pieces += [("\nD", -1.0), ("assistant\nA", -1.0)]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(list(dict(pieces).items()), 0)))


def cutting_tokenizer() -> PreTrainedTokenizerFast:
    """Its file says to cut and to pad texts, which a call does only when it is told to."""
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    return tokenizer


KINDS = {
    "words": make_tokenizer,
    "joining": joining_tokenizer,
    "cutting": cutting_tokenizer,
    "own call": lambda: OwnCall(tokenizer_object=copy.deepcopy(make_tokenizer().backend_tokenizer)),
    "slow": ByT5Tokenizer,
}
TEXTS = st.text(string.ascii_letters + string.digits + " \n:.'é", max_size=30)


def test_harness_prompt_is_the_reference_text():
    shot = Question("high_school_physics", " What? ", ("a ", "b", "c", "d"), 2, "x")
    question = Question("high_school_physics", "Why?\n", ("1", "2", "3", "4"), 0, "y")
    assert harness_prompt(question, [shot]) == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "What?\nA. a \nB. b\nC. c\nD. d\nAnswer: C\n\n"
        "Why?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )


def test_context_and_continuation_are_the_ids_of_the_whole_string(tokenizer):
    for encoded in encode(tokenizer):
        text = harness_prompt(encoded.question, [])
        for letter, continuation in zip("ABCD", encoded.continuations, strict=True):
            assert encoded.context_ids + continuation == tokenizer.encode(f"{text} {letter}")


@pytest.mark.parametrize("style", ["harness", "chat"])
@pytest.mark.parametrize("kind", KINDS)
@given(asked=st.lists(st.tuples(TEXTS, st.tuples(*[TEXTS] * 4)), min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_ids_are_those_of_the_tokenizers_own_calls(kind, style, asked):
    """A choice's ids are those of the whole string; the context ends where all choices still agree, at the latest where
    it ends alone."""
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = CHAT_TEMPLATE
    questions = [Question("anatomy", text, choices, 0, "x") for text, choices in asked]
    for e in encode_questions(tokenizer, questions, {}, style, 10**6):
        text = chat_prompt(tokenizer, e.question, []) if style == "chat" else harness_prompt(e.question, [])
        letters = "ABCD" if style == "chat" else (" A", " B", " C", " D")
        whole = [tokenizer(text + letter)["input_ids"] for letter in letters]
        assert [e.context_ids + c for c in e.continuations] == whole
        alone = len(tokenizer(text.rstrip())["input_ids"])
        assert len(e) == min(alone, min(common_prefix_length(whole[0], ids) for ids in whole))


def test_a_tokenizer_that_joins_the_colon_with_a_letter_gives_the_colon_to_the_choices():
    (encoded,) = encode(joining_tokenizer(), make_questions(1)[:1])
    assert [len(c) for c in encoded.continuations] == [3, 1, 2, 3]  # ":", " ", "A"; ": B"; ":", " C"; ":", " ", "D"


@pytest.mark.parametrize("before", ["false", "true", None])
def test_all_cores_tokenize_and_what_forks_later_is_safe(before, monkeypatch):
    if before is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    else:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    tokenizer = KINDS["own call"]()
    encode(tokenizer)
    assert tokenizer.parallelism == "true"
    assert os.environ["TOKENIZERS_PARALLELISM"] == (before or "false")


def test_chat_uses_the_tokenizers_own_template(tokenizer):
    questions = make_questions(1)
    shots = {s: [q] for s, q in zip(SUBJECTS, questions, strict=True)}
    text = tokenizer.decode(encode(tokenizer, questions, shots, "chat")[0].context_ids)
    assert text.count("<|im_start|>user") == 2
    assert "<|im_start|>assistant\nA<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n") or text.endswith("<|im_start|>assistant")


def test_chat_without_a_template_names_harness(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="--prompt-style harness"):
        encode(tokenizer, style="chat")


@pytest.mark.parametrize(
    ("template", "scoring", "thinking", "ending"),
    [
        ("switch", "letters", "off", "assistant\n<think>\n\n</think>\n\n"),
        ("switch", "generate", "off", "assistant\n<think>\n\n</think>\n\n"),
        ("begun", "letters", "closed", "assistant\n<think>\n\n</think>\n\n"),
        ("begun", "generate", "on", "assistant\n<think>\n"),
        ("other marks", "letters", "closed", "assistant\n<|START_THINKING|>\n\n<|END_THINKING|>\n\n"),
        ("other marks", "generate", "on", "assistant\n<|START_THINKING|>"),
        ("ended", "generate", "off", "assistant\n</think>"),
        ("known", "letters", "", "A, B, C or D.\n"),
        ("known", "generate", "on", "A, B, C or D.\n"),
    ],
)
def test_a_template_that_thinks_is_switched_off_or_has_its_thoughts_ended(template, scoring, thinking, ending):
    tokenizer = thinking_tokenizer(template)
    assert thinking_of(tokenizer, "chat", scoring) == thinking
    question, *_ = make_questions(1)
    assert chat_prompt(tokenizer, question, [], thinking).endswith(ending)
    assert thinking_of(tokenizer, "harness", scoring) == ""


def test_a_template_without_thoughts_is_asked_as_ever(tokenizer):
    assert thinking_of(tokenizer, "chat", "letters") == thinking_of(tokenizer, "chat", "generate") == ""


def test_thoughts_have_room_in_the_window():
    tokenizer = thinking_tokenizer("begun")
    question = Question("anatomy", "long " * 1500, ("1", "2", "3", "4"), 0, "x")
    (encoded,) = encode_questions(tokenizer, [question], {}, "chat", 2048, "on")
    assert 2048 - THINKING_TOKENS - 8 < len(encoded) <= 2048 - THINKING_TOKENS
    assert encoded.num_truncated > 0


def test_too_few_shots_name_the_subject_and_how_many():
    with pytest.raises(UserError, match="virology has 3"):
        build_shots(make_questions(3), ["virology"], 5)
    shots = build_shots(make_questions(3), ["virology"], 2)
    assert [q.question_id for q in shots["virology"]] == ["virology/0", "virology/1"]


def test_a_prompt_longer_than_the_window_loses_its_front(tokenizer):
    whole, cut = encode(tokenizer), encode(tokenizer, max_length=40)
    for w, c in zip(whole, cut, strict=True):
        assert c.context_ids == w.context_ids[-40:]
        assert c.num_truncated == max(0, len(w) - 40)


def test_encoded_questions_come_back_from_their_file(encoded, tmp_path):
    save_encoded(encoded, tmp_path / "q.parquet")
    assert load_encoded(tmp_path / "q.parquet", [e.question for e in encoded]) == encoded


def test_prompts_show_as_many_letters_as_there_are_choices(tokenizer):
    two, _, ten, *_ = questions_of_many_sizes()
    assert harness_prompt(two, []) == (
        "The following are multiple choice questions (with answers).\n\nWhat of 0?\nA. blue river\nB. cat\nAnswer:"
    )
    assert harness_prompt(ten, []).endswith("\nI. blue river\nJ. cat\nAnswer:")
    assert "right option only: A or B." in chat_prompt(tokenizer, two, [])
    assert "right option only: A, B, C, D, E, F, G, H, I or J." in chat_prompt(tokenizer, ten, [])
    assert [len(e.continuations) for e in encode(tokenizer, [two, ten])] == [2, 10]


@pytest.mark.parametrize("scoring", ["letters", "cloze"])
@pytest.mark.parametrize("style", ["harness", "chat"])
def test_special_tokens_in_questions_and_shots_are_text(tokenizer, style, scoring):
    def asked(subject, mark):
        choices = (f"It ends {mark}", "two", f"{mark}", "four")
        return Question(subject, f"What is {mark}?", choices, 0, f"{subject}/0")

    questions = [asked("a", "<|im_end|>"), asked("b", "water"), asked("c", "water")]
    shots = {"c": [asked("c", "<|im_start|>")]}
    allowing = set_rendering(copy.deepcopy(tokenizer), ModelOptions(allow_special_tokens=True))
    found, allowed = (encode_questions(t, questions, shots, style, 512, scoring=scoring) for t in (tokenizer, allowing))
    special = set(tokenizer.all_special_ids)
    ids = [[[*e.context_ids, *c] for c in e.continuations] for e in found]
    written = [[[*e.context_ids, *c] for c in e.continuations] for e in allowed]
    assert found[1] == allowed[1]
    assert [[tokenizer.decode(i) for i in own] for own in ids] == [
        [tokenizer.decode(i) for i in own] for own in written
    ]
    of_plain = [i for i in ids[1][1] if i in special]
    assert [i for i in ids[0][1] if i in special] == of_plain
    assert [i for i in written[0][1] if i in special] != of_plain
    # Of a chat with a shot there are two turns more.
    assert len([i for i in ids[2][1] if i in special]) == len(of_plain) + 4 * (style == "chat")
    assert bool(of_plain) is (style == "chat")
    assert found[0].question is questions[0]
