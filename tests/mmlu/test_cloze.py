"""Cloze: which choice counts as the answer, by each length that a log-likelihood may be divided by."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from raylora.mmlu.choices import BranchRows, ChoiceRows, asker_of
from raylora.mmlu.cloze import accuracies, columns_of, lengths_of, normalised, predict
from raylora.mmlu.prompts import EncodedQuestion, build_shots, encode_questions
from raylora.mmlu.scoring import evaluate
from raylora.mmlu.statistics import summarize
from raylora.model.loading import borrowed
from raylora.records import Question
from tests.helpers.adapters import attach_random
from tests.helpers.questions import LOGPROBS
from tests.helpers.tiny import make_loaded

CHOICES = ("blue", "a yellow river", "四", "")
QUESTION = EncodedQuestion(Question("anatomy", "What?", CHOICES, 1, "1"), [5, 6], [[1], [2, 3, 4], [5, 6], [7]], 0)


def test_lengths_are_of_the_texts_and_of_their_tokens():
    assert lengths_of(QUESTION, "character") == [4, 14, 1, 1]
    assert lengths_of(QUESTION, "byte") == [4, 14, 3, 1]
    assert lengths_of(QUESTION, "token") == [1, 3, 2, 1]
    assert lengths_of(QUESTION, "choice") == [1, 1, 1, 1]
    assert columns_of(QUESTION, "ABCD")["num_bytes_c"] == 3


def test_the_answer_is_the_likeliest_by_what_is_asked_for():
    logprobs = [-4.0, -7.0, -6.0, -5.0]
    by = {per: predict(QUESTION, logprobs, per) for per in ("choice", "character", "byte", "token")}
    assert by == {"choice": 0, "character": 1, "byte": 1, "token": 1}
    assert predict(QUESTION, [-1.0] * 4, "choice") == 0, "the first of equal ones"


def make_questions() -> list[Question]:
    """Whose choices have from one word to many, one question's only one token each."""
    texts = [
        ("river", "blue", "cat", "mat"), (*CHOICES[:3], "the cat sat on the mat"), ("one two", "one", "two", "six"),
    ]  # fmt: skip
    return [
        Question(subject, f"What of {subject} {i}?" + " really" * i, texts[i % 3], i % 4, f"{subject}/{i}")
        for subject, i in itertools.product(("anatomy", "virology"), range(5))
    ]


def plain(model, encoded) -> np.ndarray:
    """One text after another, all of it, no cache."""
    rows = []
    for e in encoded:
        row = []
        for continuation in e.continuations:
            ids = [*e.context_ids, *continuation]
            with torch.inference_mode():
                logprobs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            first = len(e.context_ids)
            row.append(sum(float(logprobs[first + i - 1, t]) for i, t in enumerate(continuation)))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("style", ["harness", "chat"])
@pytest.mark.parametrize("budget", [1, 120, 1000])
@pytest.mark.parametrize("num_shots", [0, 2])
def test_log_likelihoods_are_those_of_each_text_alone(tokenizer, style, budget, num_shots):
    loaded = make_loaded()
    attach_random(loaded, 3, "a")
    questions = make_questions()
    shots = build_shots(questions, ["anatomy", "virology"], num_shots)
    encoded = encode_questions(tokenizer, questions, shots, style, 2048, scoring="cloze")
    score = evaluate(loaded, encoded, "cloze", budget, cloze_per="token")
    np.testing.assert_allclose(score.questions[LOGPROBS].to_numpy(), plain(loaded.model, encoded), atol=5e-5)
    by_token = normalised(score.questions, "token")
    assert ["ABCD".index(p) for p in score.questions["prediction"]] == by_token.argmax(1).tolist()
    assert score.info["cloze_per"] == "token"
    assert score.info["num_shared_prefixes"] or not num_shots or budget == 1000
    found = summarize(score)
    assert found["accuracy_per_token"] == found["overall_accuracy"]
    assert found["accuracy_per_choice"] == accuracies(score.questions)["accuracy_per_choice"]


def test_a_model_whose_rows_cannot_be_packed_runs_each_choice(tokenizer):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, pad_token_id=0)
    model = MambaForCausalLM(config).eval()
    encoded = encode_questions(tokenizer, make_questions(), {}, "harness", 2048, scoring="cloze")
    with borrowed(model, tokenizer) as loaded:
        assert isinstance(asker_of(loaded, encoded, [None], "cloze", ""), ChoiceRows)
        score = evaluate(loaded, encoded, "cloze", 300)
    np.testing.assert_allclose(score.questions[LOGPROBS].to_numpy(), plain(model, encoded), atol=5e-5)
    assert isinstance(asker_of(make_loaded(), encoded, [None], "cloze", ""), BranchRows)


def test_prompts_do_not_show_the_choices(tokenizer):
    (question,) = make_questions()[:1]
    shot = Question("anatomy", " What shot? ", CHOICES, 1, "")
    (encoded,) = encode_questions(tokenizer, [question], {"anatomy": [shot]}, "harness", 2048, scoring="cloze")
    assert tokenizer.decode(encoded.context_ids) == (
        "The following are questions (with answers) about anatomy.\n\n"
        "Question: What shot?\nAnswer: a yellow river\n\nQuestion: What of anatomy 0?\nAnswer:"
    )
    assert [tokenizer.decode(c) for c in encoded.continuations] == [f" {choice}" for choice in question.choices]


def test_letters_have_no_accuracy_of_cloze(tokenizer):
    encoded = encode_questions(tokenizer, make_questions(), {}, "harness", 2048)
    assert accuracies(evaluate(make_loaded(), encoded).questions) == {}
