"""Prompts and their tokens, in both styles."""

from __future__ import annotations

import pytest

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
from tests.helpers.questions import SUBJECTS, encode, make_questions
from tests.helpers.thinking import thinking_tokenizer


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
        ("switch", "logits", "off", "assistant\n<think>\n\n</think>\n\n"),
        ("switch", "generate", "off", "assistant\n<think>\n\n</think>\n\n"),
        ("begun", "logits", "closed", "assistant\n<think>\n\n</think>\n\n"),
        ("begun", "generate", "on", "assistant\n<think>\n"),
        ("other marks", "logits", "closed", "assistant\n<|START_THINKING|>\n\n<|END_THINKING|>\n\n"),
        ("other marks", "generate", "on", "assistant\n<|START_THINKING|>"),
        ("ended", "generate", "off", "assistant\n</think>"),
        ("known", "logits", "", "A, B, C or D.\n"),
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
    assert thinking_of(tokenizer, "chat", "logits") == thinking_of(tokenizer, "chat", "generate") == ""


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
