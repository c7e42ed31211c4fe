"""Evaluations that go on where they were, and helpers that answer a part."""

from __future__ import annotations

import contextlib
import json

import pandas as pd
import pytest
import torch

from raylora.mmlu.journal import Journal
from raylora.mmlu.scoring import answer
from raylora.model.loading import borrowed
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
