"""Losses of each example, against the model's own, one example at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylora.data.encoding import EncodedExample
from raylora.training.losses import example_losses
from tests.helpers.feature_rows import token_losses
from tests.helpers.reads import Reads
from tests.helpers.training import METHOD


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 12), st.sampled_from(["answer", "all"]), st.integers(20, 400))
def test_losses_are_those_of_each_example_by_itself(loaded, encoded, count, train_on, token_budget):
    found = example_losses(loaded, encoded[:count], train_on, token_budget)
    for e, losses in zip(encoded, found, strict=False):
        own = token_losses(loaded.model, e.input_ids)
        supervised = [i for i in range(1, len(e)) if train_on == "all" or e.is_answer[i]]
        assert losses.num_supervised == len(supervised)
        assert losses.total == pytest.approx(sum(own[i] for i in supervised), rel=1e-5)
        text = [i for i in supervised if e.is_answer_text[i]]
        assert losses.answer == pytest.approx(np.mean([own[i] for i in text]), rel=1e-5)


def test_what_has_no_loss_is_no_number_and_disturbs_no_other(loaded, encoded):
    first = encoded[0]
    no_answer = EncodedExample(first.input_ids, *([[False] * len(first)] * 3))
    only_end = EncodedExample(first.input_ids, first.is_question, first.is_answer, [False] * len(first))
    alone = example_losses(loaded, encoded[:1], "answer", 512)[0]
    nothing, end, found = example_losses(loaded, [no_answer, only_end, first], "answer", 512)
    assert nothing[:2] == (0, 0)
    assert math.isnan(nothing.answer)
    assert end.num_supervised == alone.num_supervised
    assert math.isnan(end.answer)
    assert found == pytest.approx(alone, rel=1e-5)
    assert example_losses(loaded, [], "answer", 512) == []


@pytest.mark.parametrize("with_gradient", [False, True])
def test_no_pass_waits_for_a_gpu(loaded, encoded, with_gradient):
    loaded.attach(METHOD, 0)
    example_losses(loaded, encoded, "answer", 200)  # what is found out once may be read
    with Reads(within="raylora/model/forward.py") as reads:
        example_losses(loaded, encoded, "answer", 200, with_gradient)
    assert reads.places == []
