"""Questions, prompts, scores and statistics of MMLU."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from raylora.errors import UserError
from raylora.mmlu.answers import parse_answer
from raylora.mmlu.prompts import build_shots, encode_questions, harness_prompt
from raylora.mmlu.question_set import DEMO_QUESTIONS
from raylora.mmlu.questions import SUBJECT_GROUPS, load_dev_questions, load_questions, select_questions
from raylora.mmlu.scoring import evaluate, load_score, save_score
from raylora.mmlu.statistics import compare, summarize
from raylora.records import Question, Score

SUBJECTS = ("anatomy", "astronomy", "virology")


def make_questions(per_subject: int = 3) -> list[Question]:
    return [
        Question(
            subject, f"Question {i} " + "long " * (7 * i), ("one", "two", "three", "four"), i % 4, f"{subject}/{i}"
        )
        for subject in SUBJECTS
        for i in range(per_subject)
    ]


def as_dicts(questions: list[Question]) -> list[dict]:
    return [
        {"question": q.question, "choices": list(q.choices), "answer": q.answer, "subject": q.subject}
        for q in questions
    ]


def encode(tokenizer, questions=None, shots=None, style="harness", max_length=2048):
    return encode_questions(tokenizer, questions or make_questions(), shots or {}, style, max_length)


# Files


def test_every_format_reads_the_same(tmp_path):
    questions = make_questions()
    records = as_dicts(questions)
    letters = [{**r, "answer": "ABCD"[r["answer"]]} for r in records]
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "bom.json").write_text(json.dumps(letters), encoding="utf-8-sig")
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, records)))
    pd.DataFrame(records).to_parquet(tmp_path / "hub.parquet")
    (tmp_path / "csv" / "test").mkdir(parents=True)
    for subject in SUBJECTS:
        with (tmp_path / "csv" / "test" / f"{subject}_test.csv").open("w", newline="") as file:
            for r in letters:
                if r["subject"] == subject:
                    csv.writer(file).writerow([r["question"], *r["choices"], r["answer"]])
    for name in ("list.json", "bom.json", "lines.jsonl", "hub.parquet", "csv"):
        assert load_questions(tmp_path / name) == questions, name


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"choices": ["a", "b", "c"]}, "needs 4 choices, found 3"),
        ({"choices": "abcd"}, "needs 4 choices"),
        ({"choices": ["a", "b", "c", 4]}, "must be text"),
        ({"answer": 4}, "expected 0 to 3 or A to D"),
        ({"answer": "E"}, "expected 0 to 3 or A to D"),
        ({"answer": True}, "expected 0 to 3 or A to D"),
        ({"answer": None}, "expected 0 to 3 or A to D"),
        ({"subject": None}, "has no subject"),
        ({"question": " "}, "has no question text"),
    ],
)
def test_bad_questions_are_one_line_with_file_and_place(tmp_path, change, expected):
    records = as_dicts(make_questions())
    records[4] |= change
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(records))
    with pytest.raises(UserError) as raised:
        load_questions(path)
    assert expected in str(raised.value)
    assert "bad.json: question 5" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.json", b""),
        ("cut.json", b'[{"question": "a'),
        ("list.json", b"[]"),
        ("number.json", b"3"),
        ("bytes.json", b"\xff\xfe"),
        ("a.parquet", b"PAR1"),
        ("a.csv", b"a,b\n"),
        ("a.jsonl", b'{"a": 1}\n{'),
        ("deep.json", b"[" * 100_000),
    ],
)
def test_bad_question_files_are_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_questions(path)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_solved_questions_are_found_beside_the_others(tmp_path):
    def write(name, num):
        (tmp_path / name).write_text(json.dumps(as_dicts(make_questions(num))))

    for name, num in {"test_q.json": 3, "dev_q.json": 2, "questions.json": 3, "dev_questions.json": 1}.items():
        write(name, num)
    write("x.json", 3)
    find = load_dev_questions
    assert len(find(tmp_path / "test_q.json")) == 2 * len(SUBJECTS)
    assert len(find(tmp_path / "questions.json")) == len(SUBJECTS)
    assert find(tmp_path / "x.json") is None


def write_parquet(path, num):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(as_dicts(make_questions(num))).to_parquet(path)


@pytest.mark.parametrize("layout", ["all/{}-00000-of-00001.parquet", "{}-00000-of-00001.parquet", "{}/x.parquet"])
def test_folders_as_they_are_on_the_hub(tmp_path, layout):
    """With the other splits beside it, which are not asked."""
    for split, num in {"test": 3, "dev": 2, "validation": 1, "auxiliary_train": 4}.items():
        write_parquet(tmp_path / layout.format(split), num)
    assert load_questions(tmp_path) == make_questions(3)
    assert load_dev_questions(tmp_path) == make_questions(2)


def test_a_folder_for_each_subject_and_the_original_archive(tmp_path):
    for split, num in {"test": 3, "dev": 2, "val": 1}.items():
        for subject in SUBJECTS:
            records = [r for r in as_dicts(make_questions(num)) if r["subject"] == subject]
            for root in ("hub", "archive"):
                (tmp_path / root / (subject if root == "hub" else split)).mkdir(parents=True, exist_ok=True)
            pd.DataFrame(records).to_parquet(tmp_path / "hub" / subject / f"{split}-00000-of-00001.parquet")
            with (tmp_path / "archive" / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([r["question"], *r["choices"], "ABCD"[r["answer"]]] for r in records)
    for folder in (tmp_path / "hub", tmp_path / "archive"):
        assert load_questions(folder) == make_questions(3)
        assert load_dev_questions(folder) == make_questions(2)
    assert load_dev_questions(tmp_path / "archive" / "test") == make_questions(2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no test questions in it"):
        load_questions(tmp_path / "empty")


def test_packaged_questions_are_whole():
    folder = DEMO_QUESTIONS.parent
    counts = Counter(q.subject for q in load_questions(folder / "questions.json"))
    assert set(counts) == set(SUBJECT_GROUPS)
    assert len(counts) == 57
    assert min(counts.values()) >= 2
    dev = Counter(q.subject for q in load_questions(folder / "dev_questions.json"))
    assert sum(n >= 5 for n in dev.values()) >= 6


def test_the_real_questions_load_whole(shared_data):
    questions = load_questions(shared_data / "mmlu" / "test_all_subjects.json")
    assert len(questions) == 14042
    assert {q.subject for q in questions} == set(SUBJECT_GROUPS)
    assert [q.answer for q in questions].count(0) == 3222
    drawn = select_questions(questions, 114, 0)
    assert len(drawn) == 114
    assert len({q.subject for q in drawn}) == 57


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), data=st.data(), seed=st.integers(0, 99))
def test_samples_are_stratified_and_repeatable(sizes, data, seed):
    questions = [
        Question(f"s{s}", f"{s}/{i}", ("a", "b", "c", "d"), 0, f"s{s}/{i}")
        for s, n in enumerate(sizes)
        for i in range(n)
    ]
    total = data.draw(st.integers(1, len(questions)))
    drawn = select_questions(questions, total, seed)
    assert len(drawn) == total
    assert drawn == select_questions(questions, total, seed)
    assert drawn == [q for q in questions if q in drawn]
    counts = Counter(q.subject for q in drawn)
    if total >= len(sizes):
        assert len(counts) == len(sizes)
    for s, size in enumerate(sizes):
        assert counts[f"s{s}"] <= max(1, total * size / len(questions) + 1)


# Prompts


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


# Scores


def plain_logprob(model, context, continuation):
    """The reference: one choice at a time, no padding, all logits."""
    ids = torch.tensor([context + continuation])
    with torch.inference_mode():
        logprobs = model(input_ids=ids).logits.float().log_softmax(-1)[0]
    return sum(float(logprobs[len(context) + i - 1, t]) for i, t in enumerate(continuation))


@pytest.mark.parametrize("style", ["harness", "chat"])
@pytest.mark.parametrize("token_budget", [1, 300, 100_000])
def test_log_likelihoods_are_those_of_a_plain_loop_whatever_the_batch(tiny_model, tokenizer, style, token_budget):
    encoded = encode(tokenizer, style=style)
    score = evaluate(tiny_model, tokenizer, encoded, token_budget=token_budget)
    columns = ["logprob_a", "logprob_b", "logprob_c", "logprob_d"]
    expected = [[plain_logprob(tiny_model, e.context_ids, c) for c in e.continuations] for e in encoded]
    np.testing.assert_allclose(score.questions[columns].to_numpy(), expected, atol=1e-4)
    assert list(score.questions["question_id"]) == [e.question.question_id for e in encoded]
    assert list(score.questions["prediction"]) == ["ABCD"[int(np.argmax(row))] for row in expected]


def test_choices_of_several_tokens_are_scored_whole(tiny_model, tokenizer):
    from dataclasses import replace

    encoded = [replace(e, continuations=[[5, 6], [7], [5, 9, 11], [8]]) for e in encode(tokenizer)]
    score = evaluate(tiny_model, tokenizer, encoded)
    for e, row in zip(encoded, score.questions.itertuples(), strict=True):
        expected = [plain_logprob(tiny_model, e.context_ids, c) for c in e.continuations]
        assert [row.logprob_a, row.logprob_b, row.logprob_c, row.logprob_d] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("scoring", ["logits", "generate"])
def test_running_out_of_memory_halves_the_batch_and_keeps_what_is_done(tiny_model, tokenizer, scoring):
    limit, calls = 1, []

    def refuse_large_batches(module, args, kwargs):
        calls.append(len(kwargs["input_ids"]))
        if calls[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    encoded = encode(tokenizer)
    expected = evaluate(tiny_model, tokenizer, encoded, scoring, token_budget=4096)
    hook = tiny_model.register_forward_pre_hook(refuse_large_batches, with_kwargs=True)
    try:
        score = evaluate(tiny_model, tokenizer, encoded, scoring, token_budget=4096)
    finally:
        hook.remove()
    assert score.info["num_oom_backoffs"] >= 2
    assert list(score.questions["prediction"]) == list(expected.questions["prediction"])
    limit = 0
    hook = tiny_model.register_forward_pre_hook(refuse_large_batches, with_kwargs=True)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            evaluate(tiny_model, tokenizer, encoded, scoring)
    finally:
        hook.remove()


def test_generate_counts_what_it_cannot_read_as_wrong(tiny_model, tokenizer):
    score = evaluate(tiny_model, tokenizer, encode(tokenizer), "generate")
    unparsed = score.questions["prediction"] == ""
    assert score.info["num_unparsed"] == unparsed.sum()
    assert not score.questions.loc[unparsed, "correct"].any()
    assert set(score.questions.loc[~unparsed, "prediction"]) <= set("ABCD")


def test_generate_writes_what_the_model_writes_alone(tiny_model, tokenizer):
    encoded = encode(tokenizer)
    score = evaluate(tiny_model, tokenizer, encoded, "generate")
    for e, text in zip(encoded, score.questions["text"], strict=True):
        ids = list(e.context_ids)
        for _ in range(10):
            with torch.inference_mode():
                ids.append(int(tiny_model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[len(e.context_ids) :], skip_special_tokens=True)


@pytest.mark.parametrize(
    "text",
    [
        "C", "(C)", "C.", "C) banana", "C. banana", "Answer: C", "The answer is C", "The correct answer is (C).",
        "**C**", "c", "option C", " C\n", "C\nD", "[C]", "Answer: **C**", "The answer is option C.", "The answer is: C",
        "C: x",
    ],
)  # fmt: skip
def test_answers_are_read(text):
    assert parse_answer(text) == 2


@pytest.mark.parametrize(
    "text", ["Because of D.", "", "A cat", "Banana", "I think so", "Dogs", "The answer", "a dog is", "E", "Because"]
)
def test_what_names_no_option_is_unparsed(text):
    assert parse_answer(text) is None


@given(st.text(max_size=40), st.sampled_from("ABCD"))
def test_parsing_never_fails_and_a_letter_with_a_full_stop_is_that_letter(text, letter):
    assert parse_answer(text) in (None, 0, 1, 2, 3)
    assert parse_answer(f"{letter}. {text}") == "ABCD".index(letter)


def test_scores_come_back_as_they_were(tiny_model, tokenizer, tmp_path):
    score = evaluate(tiny_model, tokenizer, encode(tokenizer))
    save_score(score, tmp_path / "scores.parquet")
    again = load_score(tmp_path / "scores.parquet")
    pd.testing.assert_frame_equal(again.questions, score.questions)
    assert again.info == score.info
    recomputed = (pd.read_parquet(tmp_path / "scores.parquet").eval("prediction == answer")).mean()
    assert recomputed == score.overall_accuracy


# Statistics


def make_score(correct: list[bool], subjects: list[str] | None = None) -> Score:
    subjects = subjects or ["anatomy"] * len(correct)
    return Score(
        pd.DataFrame(
            {
                "subject": subjects,
                "question_id": [f"q{i}" for i in range(len(correct))],
                "prediction": "A",
                "correct": correct,
            }
        )
    )


def test_accuracies_by_hand():
    summary = summarize(make_score([True, True, False, True, False], ["anatomy"] * 3 + ["philosophy", "sociology"]))
    assert summary["overall_accuracy"] == 0.6
    assert summary["subjects"]["anatomy"]["stderr"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert summary["overall_stderr"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(5))  # pooled within subjects
    assert summary["macro_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert summary["groups"]["stem"]["accuracy"] == pytest.approx(2 / 3)
    assert summary["groups"]["humanities"] == {"accuracy": 1.0, "stderr": None, "num_questions": 1}
    assert summary["groups"]["other"]["accuracy"] is None


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_comparison_against_its_definition(pairs):
    ours, base = (make_score([p[i] for p in pairs]) for i in (0, 1))
    result = compare(ours, base)
    gained, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    assert (result["num_gained"], result["num_lost"]) == (gained, lost)
    assert result["difference"] == pytest.approx(ours.overall_accuracy - base.overall_accuracy)
    assert result["ci_low"] <= result["difference"] + 1e-9
    assert result["ci_high"] >= result["difference"] - 1e-9
    two_sided = min(1.0, 2 * binom.cdf(min(gained, lost), gained + lost, 0.5))
    assert result["mcnemar_p_value"] == pytest.approx(two_sided)


def test_the_bootstrap_interval_is_that_of_resampled_questions():
    rng = np.random.default_rng(1)
    ours, base = rng.random(400) < 0.6, rng.random(400) < 0.5
    result = compare(make_score(list(ours)), make_score(list(base)))
    differences = ours.astype(int) - base.astype(int)
    means = [rng.choice(differences, 400).mean() for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert (result["ci_low"], result["ci_high"]) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_scores_of_other_questions_are_not_compared():
    with pytest.raises(ValueError, match="same questions"):
        compare(make_score([True]), make_score([True, False]))
