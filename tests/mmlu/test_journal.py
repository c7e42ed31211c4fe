"""Evaluations that go on where they were, and helpers that answer a part."""

from __future__ import annotations

import contextlib
import json
import shutil

import pandas as pd
import pytest
import torch

from raylora.mmlu.journal import Answer, Journal
from raylora.mmlu.scoring import answer
from raylora.model.loading import borrowed
from raylora.storage.damage import damage_told
from tests.helpers.damages import CONTENT
from tests.helpers.questions import ask


@pytest.mark.parametrize("num_batches", [1, 2, 3])
def test_an_interrupted_evaluation_goes_on_where_it_was(tiny_model, tokenizer, encoded, tmp_path, num_batches):
    expected = ask(tiny_model, tokenizer, encoded, token_budget=200)
    journal = tmp_path / "scores.journal"
    calls = 0

    def stop(stage, done, total):
        nonlocal calls
        calls += 1
        if calls == num_batches:
            raise KeyboardInterrupt

    def go_on(**more):
        return ask(tiny_model, tokenizer, encoded, token_budget=200, journal=Journal(journal, "k"), **more)

    with pytest.raises(KeyboardInterrupt):
        go_on(progress=stop)
    with (journal / "answers-owner.jsonl").open("a") as file:
        file.write('{"0": [[')  # the process died while it wrote
    score = go_on()
    assert 0 < score.info["num_resumed"] < len(encoded)
    pd.testing.assert_frame_equal(score.questions, expected.questions, check_exact=True)
    whole = go_on()
    assert whole.info["num_resumed"] == len(encoded)
    pd.testing.assert_frame_equal(whole.questions, expected.questions, check_exact=True)


@pytest.mark.parametrize("damage", CONTENT)
def test_what_is_damaged_is_asked_again(tiny_model, tokenizer, encoded, tmp_path, damage):
    """A damaged line costs its own questions; without its plan, or with a damaged one, none of it is used."""
    expected = ask(tiny_model, tokenizer, encoded, token_budget=200)
    folder = tmp_path / "scores.journal"
    for name in ("answers-owner.jsonl", "plan.json"):
        shutil.rmtree(folder, ignore_errors=True)
        ask(tiny_model, tokenizer, encoded, token_budget=200, journal=Journal(folder, "k"))
        told: list[str] = []
        CONTENT[damage](folder / name)
        with damage_told(told.append):
            score = ask(tiny_model, tokenizer, encoded, token_budget=200, journal=Journal(folder, "k"))
        pd.testing.assert_frame_equal(score.questions, expected.questions, check_exact=True)
        assert score.info["num_resumed"] < len(encoded)
        cut_at_an_end = name.startswith("answers") and damage in {"cut_short", "torn", "empty"}
        assert len(told) == (0 if cut_at_an_end else 1), told


def test_a_journal_of_an_older_version_goes_on(tiny_model, tokenizer, encoded, tmp_path):
    folder = tmp_path / "scores.journal"
    first = ask(tiny_model, tokenizer, encoded, token_budget=200, journal=Journal(folder, "k"))
    answers = folder / "answers-owner.jsonl"
    answers.write_text("".join(line.partition(" ")[2] + "\n" for line in answers.read_text().splitlines()))
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({key: plan[key] for key in ("key", "budget", "reduced")}))
    again = ask(tiny_model, tokenizer, encoded, token_budget=200, journal=Journal(folder, "k"))
    assert again.info["num_resumed"] == len(encoded)
    pd.testing.assert_frame_equal(again.questions, first.questions, check_exact=True)
    for line in ('{"0": [null, 1, ""]}', '{"0": [[1.0], "A"]}', '{"0": 3}', "[]", "[" * 20_000, '{"x": [[1.0], 1]}'):
        answers.write_text(line + "\n")
        assert Journal(folder, "k").answers == {}
    (folder / "plan.json").write_text(json.dumps({"key": "k"}))
    assert not Journal(folder, "k").is_open


def test_what_comes_after_half_a_line_is_read(tmp_path):
    owner = Journal(tmp_path, "k")
    owner.open(100, 100)
    helper = Journal(tmp_path, "k", helper="one")
    helper.add({0: Answer([-1.0, -2.0], 0)})
    with (tmp_path / "answers-one.jsonl").open("a") as file:
        file.write("half a li")
    Journal(tmp_path, "k", helper="one").add({1: Answer([-3.0, -4.0], 1, "so")})
    owner.read_others()
    assert owner.answers == {0: Answer([-1.0, -2.0], 0), 1: Answer([-3.0, -4.0], 1, "so")}


def test_a_journal_of_something_else_is_not_used(tiny_model, tokenizer, encoded, tmp_path):
    journal = tmp_path / "scores.journal"
    ask(tiny_model, tokenizer, encoded, journal=Journal(journal, "one"))
    score = ask(tiny_model, tokenizer, encoded, journal=Journal(journal, "two"))
    assert score.info["num_resumed"] == 0
    assert json.loads((journal / "plan.json").read_text())["key"] == "two"


def test_a_journal_keeps_the_budget_that_memory_allowed(tiny_model, tokenizer, encoded, tmp_path):
    journal = tmp_path / "scores.journal"

    def refuse(module, args, kwargs):
        if kwargs["input_ids"].numel() > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = tiny_model.register_forward_pre_hook(refuse, with_kwargs=True)
    first = ask(tiny_model, tokenizer, encoded, token_budget=400, journal=Journal(journal, "k"))
    hook.remove()
    again = ask(tiny_model, tokenizer, encoded, token_budget=400, journal=Journal(journal, "k"))
    assert first.info["num_oom_backoffs"] > 0
    assert again.info["token_budget"] == first.info["token_budget"] < 400


@pytest.mark.parametrize("num_helpers", [1, 3])
def test_helpers_ask_some_of_the_questions_and_nothing_changes(tiny_model, tokenizer, encoded, tmp_path, num_helpers):
    expected = ask(tiny_model, tokenizer, encoded, token_budget=100)
    folder = tmp_path / "scores.journal"
    owner = Journal(folder, "k")
    helpers: list[int] = []

    def help_out(stage, done, total):
        """The owner's first batch is answered: helpers come, one stops midway, and another model's finds nothing."""
        if helpers:
            return
        assert not Journal(folder, "another model's", helper="stranger").is_open
        for k in range(num_helpers):
            helper = Journal(folder, "k", helper=str(k))
            num_known = len(helper.answers)
            batches = 0

            def stop(stage, done, total):
                nonlocal batches
                batches += 1
                if batches == 2:
                    raise KeyboardInterrupt

            with contextlib.suppress(KeyboardInterrupt), borrowed(tiny_model, tokenizer) as loaded:
                answer(loaded, encoded, helper, progress=stop)
            helpers.append(len(helper.answers) - num_known)
        assert helper.claim(0) is False
        (folder / "claim-2").touch()  # whoever began this one has died

    score = ask(tiny_model, tokenizer, encoded, token_budget=100, journal=owner, progress=help_out)
    assert all(helpers)
    pd.testing.assert_frame_equal(score.questions, expected.questions, check_exact=True)
    owner.remove()
    late = Journal(folder, "k", helper="late")
    assert not late.is_open
    assert not folder.exists()
