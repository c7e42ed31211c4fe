"""MMLU's numbers are those of lm-evaluation-harness, question by question."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext

import numpy as np
import pytest

from raylora.mmlu.prompts import chat_prompt, encode_questions, harness_prompt
from raylora.mmlu.questions import load_questions
from raylora.mmlu.scoring import evaluate
from raylora.mmlu.statistics import summarize
from tests.helpers import harness
from tests.helpers.questions import LOGPROBS, ask
from tests.helpers.tiny import make_loaded

SETTINGS = [f"{who}/{style}/{n}" for who in ("base", "adapter") for style in ("harness", "chat") for n in harness.SHOTS]
CLOZE = [f"{who}/cloze/{n}" for who in ("base", "adapter") for n in (0, 5)]


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, list[float]]]:
    return json.loads(harness.RECORDED.read_text())


@pytest.fixture(scope="module")
def reference_set(shared_data):
    return harness.reference_questions(shared_data)


def ask_smollm2(loaded, questions, dev, style, n):
    shots = {subject: group[:n] for subject, group in dev.items()}
    scoring = "cloze" if style == "cloze" else "letters"
    prompt_style = "harness" if style == "cloze" else style
    encoded = encode_questions(loaded.tokenizer, questions, shots, prompt_style, 8192, scoring=scoring)
    return evaluate(loaded, encoded, scoring, cloze_per="choice")


def assert_agrees(score, reference: dict[str, list[float]]) -> None:
    """Log-likelihoods to 1e-3; predictions, but where the reference's best two are nearer than that."""
    ids = list(score.questions["question_id"])
    expected = np.array([reference[i] for i in ids])
    np.testing.assert_allclose(score.questions[LOGPROBS].to_numpy(), expected, atol=1e-3, rtol=0)
    best_two = np.sort(expected, axis=1)[:, -2:]
    undecided = {i for i, (second, first) in zip(ids, best_two, strict=True) if first - second < 1e-3}
    theirs = dict(zip(ids, ("ABCD"[k] for k in expected.argmax(1)), strict=True))
    different = {i for i, mine in zip(ids, score.questions["prediction"], strict=True) if mine != theirs[i]}
    print(f"undecided in the reference: {sorted(undecided)}")
    assert different <= undecided


@pytest.mark.slow
@pytest.mark.ci
def test_accuracies_and_standard_errors_are_the_harness_own(tiny_model, tokenizer, shared_data, tmp_path):
    """The harness's whole pipeline beside ours: prompts, log-likelihoods, subjects, groups, overall."""
    pytest.importorskip("lm_eval")
    everything = load_questions(shared_data / "mmlu" / "test_all_subjects.json")
    by_subject: dict[str, list] = {}
    for question in sorted(everything, key=lambda q: len(q.question) + sum(map(len, q.choices))):
        by_subject.setdefault(question.subject, []).append(question)
    # 5 or 6 a subject: enough to estimate the variance within subjects, in every group.
    questions = [q for i, group in enumerate(by_subject.values()) for q in group[: 5 + i % 2]]
    questions = [q for q in everything if q in questions]  # in the file's order, as the harness reads its own
    lm = harness.make_lm(tiny_model, tokenizer, batch_size=16)
    logprobs, results = harness.run_harness(lm, harness.write_tasks(tmp_path, questions, {}), 0)
    score = ask(tiny_model, tokenizer, encode_questions(tokenizer, questions, {}, "harness", 2048))
    assert_agrees(score, logprobs)
    ours = summarize(score)
    pairs = {f"mmlu_{s}": v for s, v in ours["subjects"].items()} | {f"mmlu_{g}": v for g, v in ours["groups"].items()}
    pairs["mmlu"] = {"accuracy": ours["overall_accuracy"], "stderr": ours["overall_stderr"]}
    assert len(pairs) == 57 + 4 + 1
    for name, mine in pairs.items():
        assert mine["accuracy"] == pytest.approx(results[name]["acc,none"], abs=1e-12), name
        if mine["accuracy"] in (0, 1):  # there the harness says 0, which no standard error is
            assert mine["stderr"] is None, name
        else:
            assert mine["stderr"] == pytest.approx(results[name]["acc_stderr,none"], abs=1e-12), name


@pytest.mark.parametrize("num_shots", [0, 2])
@pytest.mark.parametrize("who", ["base", "adapter"])
def test_cloze_is_the_harness_own_continuation(tokenizer, reference_set, tmp_path, who, num_shots):
    """Log-likelihoods of the choices' texts, accuracy by their sum and by character, of a tiny model."""
    pytest.importorskip("lm_eval")
    questions, dev = reference_set
    questions = questions[::9]
    loaded = make_loaded()
    with harness.fixed_adapter(loaded) if who == "adapter" else nullcontext():
        lm = harness.make_lm(loaded.model, tokenizer, batch_size=16)
        names = [f"mmlu_{q.subject}_continuation" for q in questions]
        tasks = harness.write_tasks(tmp_path, questions, dev, "continuation")
        logprobs, results = harness.run_harness(lm, tasks, num_shots, names)
        shots = {subject: group[:num_shots] for subject, group in dev.items()}
        encoded = encode_questions(tokenizer, questions, shots, "harness", 2048, scoring="cloze")
        by_sum, by_character = (evaluate(loaded, encoded, "cloze", cloze_per=per) for per in ("choice", "character"))
    assert_agrees(by_sum, logprobs)
    for score, name in ((by_sum, "acc,none"), (by_character, "acc_norm,none")):
        theirs = [results[task][name] for task in names]
        assert list(score.questions["correct"]) == [bool(value) for value in theirs], name


def with_bos(tokenizer, in_template: bool):
    """A copy that puts a token in front of every text, as Llama's does; its chat template may do so too."""
    from tokenizers.processors import TemplateProcessing

    other = copy.deepcopy(tokenizer)
    bos = ("<|endoftext|>", other.convert_tokens_to_ids("<|endoftext|>"))
    other.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    other.bos_token = bos[0]
    if in_template:
        other.chat_template = "{{ bos_token }}" + other.chat_template
    return other


@pytest.mark.parametrize("style", ["harness", "chat"])
@pytest.mark.parametrize("bos", ["none", "tokenizer", "template"])
@pytest.mark.parametrize("window", [2048, 40])
def test_token_ids_are_the_harness_own(tiny_model, tokenizer, reference_set, style, bos, window):
    """With and without a token that begins every text; a prompt longer than the window loses its front."""
    pytest.importorskip("lm_eval")
    tokenizer = tokenizer if bos == "none" else with_bos(tokenizer, in_template=bos == "template")
    lm = harness.make_lm(tiny_model, tokenizer)
    questions, dev = reference_set
    shots = {subject: group[:1] for subject, group in dev.items()}
    encoded = encode_questions(tokenizer, questions[::8], shots, style, window)
    assert all(e.num_truncated for e in encoded) == (window == 40)
    for e in encoded:
        shown = shots[e.question.subject]
        text = chat_prompt(tokenizer, e.question, shown) if style == "chat" else harness_prompt(e.question, shown)
        for letter, continuation in zip("ABCD", e.continuations, strict=True):
            context, answer = lm._encode_pair(text, letter if style == "chat" else f" {letter}")
            assert continuation == answer
            assert e.context_ids == (context + answer)[-(window + 1) :][: -len(answer)]


def test_a_prompt_longer_than_the_window_scores_as_in_the_harness(tiny_model, tokenizer, reference_set):
    pytest.importorskip("lm_eval")
    questions, _ = reference_set
    lm = harness.make_lm(tiny_model, tokenizer, max_length=60)
    found = harness.score_strings(lm, questions, [f"{harness_prompt(q, [])} " for q in questions])
    encoded = encode_questions(tokenizer, questions, {}, "harness", 60)
    assert sum(e.num_truncated > 0 for e in encoded) > 50
    assert_agrees(ask(tiny_model, tokenizer, encoded), found)


@pytest.mark.slow
def test_zero_shot_agrees_with_what_was_recorded(smollm2, recorded, reference_set):
    questions, dev = reference_set
    score = ask_smollm2(smollm2, questions, dev, "harness", 0)
    assert len(score.questions) == 57
    assert_agrees(score, recorded["base/harness/0"])


def test_five_shots_agree_with_what_was_recorded(smollm2, recorded, reference_set):
    questions, dev = reference_set
    assert_agrees(ask_smollm2(smollm2, questions[::12], dev, "harness", 5), recorded["base/harness/5"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("setting", [*SETTINGS, *CLOZE])
def test_every_setting_agrees_with_what_was_recorded(smollm2, recorded, reference_set, setting):
    who, style, n = setting.split("/")
    questions, dev = reference_set
    with harness.fixed_adapter(smollm2) if who == "adapter" else nullcontext():
        asked = questions[::12] if setting in CLOZE and n == "5" else questions
        score = ask_smollm2(smollm2, asked, dev, style, int(n))
    assert set(score.questions["question_id"]) == set(recorded[setting])
    assert_agrees(score, recorded[setting])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("setting", [*SETTINGS, *CLOZE])
def test_the_harness_still_says_what_was_recorded(smollm2, recorded, reference_set, setting, tmp_path):
    """All subjects without shots; with shots, which take minutes, every sixth."""
    pytest.importorskip("lm_eval")
    who, style, n = setting.split("/")
    questions, dev = reference_set
    questions = questions if n == "0" else questions[::6] if n == "1" else questions[::12]
    with harness.fixed_adapter(smollm2) if who == "adapter" else nullcontext():
        found = harness.reference(smollm2, questions, dev, style, int(n), tmp_path)
    for question_id, logprobs in found.items():
        assert logprobs == pytest.approx(recorded[setting][question_id], abs=1e-3)
