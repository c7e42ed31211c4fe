"""Measures of each example, against the definitions in a plain loop; where sentences begin and end."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from raylora.config.options import ModelOptions
from raylora.features.measure import answers_alone, make_item, mean_directions, measure_all, sentence_slices
from raylora.features.static import as_dataset
from raylora.model.device import waiting_is_refused
from raylora.model.loading import load_model
from raylora.records import ProgressStage, ignore_progress
from tests.helpers.feature_rows import make_records, token_losses
from tests.helpers.reads import Reads
from tests.helpers.tiny import make_loaded, make_routed


@pytest.fixture
def items(tokenizer):
    """Without a question, with one sentence, and with several."""
    records = [*make_records(7), {"question": "Why?", "answer": "It is so"}]
    items = [make_item(tokenizer, example, 256) for example in as_dataset(records).examples]
    encoded = items[0].encoded
    return [*items, replace(items[0], encoded=replace(encoded, is_question=[False] * len(encoded)))]


def mean_cosine(vectors: list[torch.Tensor]) -> float:
    pairs = [(a, b) for i, a in enumerate(vectors) for b in vectors[:i]]
    return float(np.mean([float(F.cosine_similarity(a, b, dim=0)) for a, b in pairs]))


def sparsities_of(model, item) -> torch.Tensor:
    """Of each call of a last matrix with all tokens: the share near zero of what enters it, at each content token."""
    e, shares = item.encoded, []

    def count(module, args):
        x = args[0].reshape(-1, args[0].shape[-1]).double()
        shares.append((x.abs() < 0.1 * x.square().mean(1, keepdim=True).sqrt()).double().mean(1))

    hooks = [m.register_forward_pre_hook(count) for name, m in model.named_modules() if name.endswith("down_proj")]
    with torch.inference_mode():
        model(input_ids=torch.tensor([e.input_ids]))
    for hook in hooks:
        hook.remove()
    content = [i for i in range(len(e)) if e.is_question[i] or e.is_answer_text[i]]
    return torch.stack([share[content] for share in shares if len(share) == len(e)])


@pytest.mark.parametrize("train_on", ["answer", "all"])
@pytest.mark.parametrize("token_budget", [60, 4096])
def test_each_example_has_what_the_definitions_say(loaded, items, train_on, token_budget):
    model, told = loaded.model, []
    measured = measure_all(loaded, items, train_on, token_budget, lambda *given: told.append(given))
    assert told[-1] == (ProgressStage.FEATURES, len(items), len(items))
    for item, found in zip(items, measured, strict=True):
        e = item.encoded
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([e.input_ids]), output_hidden_states=True).hidden_states[-1][0]
        losses = token_losses(model, e.input_ids)
        question, answer = ([i for i in range(len(e)) if flags[i]] for flags in (e.is_question, e.is_answer_text))
        content = sorted({*question, *answer})
        supervised = [i for i in range(1, len(e)) if train_on == "all" or e.is_answer[i]]
        direction = F.normalize(states[content].double().mean(0), dim=0)
        np.testing.assert_allclose(found.embedding, direction, atol=1e-6)
        assert found.loss == pytest.approx(np.mean([losses[i] for i in content]), rel=1e-5)
        assert found.answer_loss == found.labels.answer == pytest.approx(np.mean([losses[i] for i in answer]), rel=1e-5)
        assert found.labels.total == pytest.approx(sum(losses[i] for i in supervised), rel=1e-5)
        assert found.labels.num_supervised == len(supervised)
        assert found.activation_sparsity == pytest.approx(float(sparsities_of(model, item).mean()), rel=1e-5)
        assert (found.similarity is None) == (not question)
        if question:
            expected = F.cosine_similarity(states[question].double().mean(0), states[answer].double().mean(0), dim=0)
            assert found.similarity == pytest.approx(float(expected), abs=1e-6)
        assert (found.consistency is None) == (len(item.sentences) < 2)
        if found.consistency is not None:
            means = [states[answer[a:b]].double().mean(0) for a, b in item.sentences]
            assert found.consistency == pytest.approx(mean_cosine(means), abs=1e-6)
    assert {m.consistency is None for m in measured} == {True, False}
    assert {m.similarity is None for m in measured} == {True, False}
    for item, loss in zip(items, answers_alone(loaded, items, token_budget), strict=True):
        ids = [t for t, of_answer in zip(item.encoded.input_ids, item.encoded.is_answer_text, strict=True) if of_answer]
        own = token_losses(model, [loaded.tokenizer.bos_token_id, *ids])[1:]
        assert loss == pytest.approx(np.mean(own), rel=1e-5)


def test_an_example_keeps_its_own_numbers_alone(loaded, items):
    """A view would keep those of its whole minibatch, for as long as the sample is measured."""
    for found in measure_all(loaded, items, "answer", 4096, ignore_progress):
        assert found.embedding.base is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.data())
def test_directions_are_those_of_each_group_by_itself(num_states, data):
    """Groups may share tokens, leave some out, and be empty; a state that is no number is that of its own groups."""
    states = torch.randn(sum(num_states), 5, generator=torch.Generator().manual_seed(0))
    broken = data.draw(st.integers(0, len(states) - 1))
    states[broken] = math.inf
    some = [data.draw(st.lists(st.sets(st.integers(0, n - 1)), max_size=4)) for n in num_states]
    groups = [[np.array(sorted(group), dtype=np.int64) for group in of_one] for of_one in some]
    if not any(groups):
        return
    found = mean_directions(states, num_states, groups)
    own = [part[group] for part, of_one in zip(states.split(num_states), groups, strict=True) for group in of_one]
    assert len(found) == len(own)
    for direction, part in zip(found, own, strict=True):
        if not part.isfinite().all():
            assert not direction.isfinite().all()
        else:
            mean = part.double().mean(0) if len(part) else torch.zeros(5, dtype=torch.float64)
            torch.testing.assert_close(direction.double(), F.normalize(mean, dim=0), rtol=1e-4, atol=1e-5)


def test_no_pass_waits_for_a_gpu(loaded, items):
    measure_all(loaded, items, "answer", 100, ignore_progress)  # what is found out once may be read
    with Reads(within="raylora/model/forward.py") as reads:
        measure_all(loaded, items, "answer", 100, ignore_progress)
        answers_alone(loaded, items, 100)
    assert reads.places == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_on_a_gpu_what_waits_is_an_error(tiny_model_folder, items, quantization):
    loaded = load_model(ModelOptions(model=str(tiny_model_folder), quantization=quantization))
    measure = lambda: (measure_all(loaded, items, "answer", 100, ignore_progress), answers_alone(loaded, items, 100))  # noqa: E731
    measured, alone = measure()  # what is found out once may be waited for
    with waiting_is_refused():
        again, alone_again = measure()
    assert alone_again == pytest.approx(alone)
    assert [m.activation_sparsity for m in again] == pytest.approx([m.activation_sparsity for m in measured])


class Twice(torch.nn.Module):
    """An MLP that runs its last matrix a second time, on other numbers."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.mlp.act_fn(self.mlp.gate_proj(x))
        return self.mlp.down_proj(first) + self.mlp.down_proj(first**3)


class Expert(torch.nn.Module):
    def __init__(self, matrix: torch.nn.Linear) -> None:
        super().__init__()
        self.down_proj = matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(x)


@pytest.mark.parametrize("token_budget", [100, 4096])
def test_a_last_matrix_that_runs_twice_counts_twice(items, token_budget):
    loaded = make_loaded()
    for layer in loaded.model.model.layers:
        layer.mlp = Twice(layer.mlp)
    for item, found in zip(items, measure_all(loaded, items, "answer", token_budget, ignore_progress), strict=True):
        counted = sparsities_of(loaded.model, item)
        assert len(counted) == 4
        assert found.activation_sparsity == pytest.approx(float(counted.mean()), rel=1e-5)


def test_experts_that_see_some_of_the_tokens_are_left_out(items):
    loaded, routed = make_loaded(), make_routed()
    for layer, other in zip(loaded.model.model.layers, routed.model.model.layers, strict=True):
        other.mlp.experts = torch.nn.ModuleList(map(Expert, other.mlp.experts))
        if layer.self_attn.layer_idx:
            other.mlp = layer.mlp
    measured = measure_all(routed, items, "answer", 4096, ignore_progress)
    for item, found in zip(items, measured, strict=True):
        counted = sparsities_of(routed.model, item)
        assert len(counted) == 1, "the layer without experts"
        assert found.activation_sparsity == pytest.approx(float(counted.mean()), rel=1e-5)


def test_sentences_are_found_in_other_scripts(tokenizer):
    for answer, expected in {
        "One two. Three four! Five six?": 3,
        'It costs 3.50 dollars, says www.example.com today. "Too much!" said he.': 3,
        "वह आया। वह गया।": 2,
        "हل هذا كتاب؟ هذه مدرسة.": 2,
        "今天下雨。明天晴天。": 2,
        "هذا كتاب. هذه مدرسة.": 2,
        "First line\nSecond line": 2,
        "Ok. Yes.": 0,
        "...": 0,
    }.items():
        offsets = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert len(sentence_slices(answer, offsets)) == expected, answer
