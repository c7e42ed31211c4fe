"""Rows of token ids in, chosen losses and states out: each the same as of the row alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from raylora.data.encoding import IGNORE_INDEX
from raylora.model.adapters import LoadedModel
from raylora.model.forward import Output, forward_rows, head_is_plain, inference
from raylora.model.memory import TokenBudget
from tests.helpers.tiny import make_model

ROWS = [[5 + (7 * i + k) % 90 for k in range(n)] for i, n in enumerate((12, 3, 40, 7, 25))]
LABELS = [[IGNORE_INDEX, *(t if (t + i) % 3 else IGNORE_INDEX for t in row[1:])] for i, row in enumerate(ROWS)]
CHOSEN = [[(t + i) % 2 == 0 for t in row] for i, row in enumerate(ROWS)]


@pytest.fixture
def loaded(tokenizer):
    return LoadedModel(make_model().requires_grad_(False).eval(), tokenizer, "tiny", "none")


def run(loaded, token_budget, **more):
    results = {}

    def use(part: list[int], output: Output):
        states = [None] * len(part) if output.states is None else output.states.split(output.num_states)
        return list(zip(output.losses.split(output.num_losses), states, strict=True))

    with inference(loaded.model):
        for part, found in forward_rows(loaded, ROWS, LABELS, TokenBudget(token_budget), use, **more):
            results.update(zip(part, found, strict=True))
    return [results[i] for i in range(len(ROWS))]


def assert_as_alone(loaded, results):
    for row, labels, chosen, (losses, states) in zip(ROWS, LABELS, CHOSEN, results, strict=True):
        with torch.inference_mode():
            output = loaded.model(input_ids=torch.tensor([row]), output_hidden_states=True)
        wanted = torch.tensor(labels[1:]) != IGNORE_INDEX
        expected = F.cross_entropy(output.logits[0, :-1][wanted], torch.tensor(row[1:])[wanted], reduction="none")
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(states, output.hidden_states[-1][0][torch.tensor(chosen)], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("token_budget", [1, 50, 10_000])
def test_losses_and_states_are_those_of_each_row_alone(loaded, token_budget, packed):
    assert_as_alone(loaded, run(loaded, token_budget, chosen=CHOSEN, packed=packed))


def test_nothing_but_losses_is_computed_where_no_state_is_chosen(loaded):
    assert all(states is None for _, states in run(loaded, 50))


@pytest.mark.parametrize("head", ["named", "not named"])
def test_a_model_whose_logits_are_bent_or_whose_head_has_no_name_is_run_as_it_is(loaded, head, monkeypatch):
    if head == "named":
        loaded._allowed[head_is_plain] = False
    else:
        monkeypatch.setattr(loaded.model, "get_output_embeddings", lambda: None)
    assert_as_alone(loaded, run(loaded, 50, chosen=CHOSEN))


def test_memory_that_runs_out_changes_no_number(loaded):
    shapes = []

    def refuse(module, args, kwargs):
        shapes.append(len(kwargs["input_ids"]))
        if shapes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
    results = run(loaded, 10_000, chosen=CHOSEN)
    hook.remove()
    assert max(shapes) > 2
    assert_as_alone(loaded, results)
