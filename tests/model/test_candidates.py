"""Candidates' log-likelihoods are those of each text alone: packed, behind prefixes, of several adapters, replayed."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from raylora.errors import UserError
from raylora.model.candidates import CandidatePasses, Row
from raylora.model.forward import inference
from tests.helpers.adapters import attach_random
from tests.helpers.graphs import RecordedGraphs
from tests.helpers.tiny import load, make_loaded, make_model

PREFIX = [3 + 7 * i % 90 for i in range(23)]
TEXTS = [[5 + (7 * i + k) % 90 for k in range(n)] for i, n in enumerate((12, 3, 40, 25))]
CANDIDATES = [[10 + i, 30 + i, 50, 70] for i in range(len(TEXTS))]


def alone(loaded, prefix, adapter: str | None) -> np.ndarray:
    """One text after another through PEFT's own forward pass, no cache."""
    if adapter is not None:
        loaded.activate(adapter)
    found = []
    with inference(loaded.model), loaded.base() if adapter is None else contextlib.nullcontext():
        for text, candidates in zip(TEXTS, CANDIDATES, strict=True):
            logits = loaded.model(input_ids=torch.tensor([[*prefix, *text]]), use_cache=False).logits[0, -1]
            found.append([float(logits.log_softmax(-1)[c]) for c in candidates])
    return np.array(found)


def run(passes: CandidatePasses, adapters, prefix, order=(0, 1, 2, 3)) -> list[np.ndarray]:
    """Of each adapter what a pass of all texts of all adapters finds."""
    pairs = [(adapter, i) for i in order for adapter in adapters]
    rows = [Row(TEXTS[i], CANDIDATES[i], passes.slot_of(adapter)) for adapter, i in pairs]
    found = dict(zip(pairs, passes.run(rows, prefix).read(), strict=True))
    return [np.array([found[adapter, i] for i in range(len(TEXTS))]) for adapter in adapters]


@pytest.mark.parametrize("prefix", [[], PREFIX])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("adapters", [[None], ["a"], ["a", "b"], ["b", None, "a"]], ids=str)
def test_each_row_gets_what_its_text_gets_alone(adapters, captured, prefix):
    """Ranks differ; passes come again with other rows, so that captured ones are replayed."""
    loaded = make_loaded()
    attach_random(loaded, 1, "a", lora_r=4, lora_alpha=16)
    attach_random(loaded, 2, "b", lora_r=8, lora_alpha=8, target_modules=("q_proj", "down_proj"))
    expected = [alone(loaded, prefix, adapter) for adapter in adapters]
    graphs = RecordedGraphs() if captured else None
    passes = CandidatePasses(loaded, 0 if adapters == [None] else len(adapters), graphs)
    base = loaded.base() if adapters == [None] else contextlib.nullcontext()
    names = [name for name in adapters if name is not None]
    with inference(loaded.model), base, passes.ready(names, packed=True, longest_prefix=len(prefix)):
        for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 0, 1, 3), (1, 0, 3, 2)):
            for found, right in zip(run(passes, adapters, prefix, order), expected, strict=True):
                np.testing.assert_allclose(found, right, atol=2e-5)
    assert passes.graphed.num_replayed == (2 if captured else 0)
    # Nothing that was replaced is left.
    for adapter, right in zip(adapters, expected, strict=True):
        np.testing.assert_allclose(alone(loaded, prefix, adapter), right, atol=1e-6)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_over_a_quantized_base(outlier_model_folder, quantization):
    loaded = load(outlier_model_folder, quantization)
    attach_random(loaded, 1, "a")
    attach_random(loaded, 2, "b")
    passes = CandidatePasses(loaded, 3, None)
    with inference(loaded.model), passes.ready(["a", "b"], packed=True):
        found = run(passes, ["a", None, "b"], PREFIX)
    for adapter, values in zip(["a", None, "b"], found, strict=True):
        np.testing.assert_allclose(values, alone(loaded, PREFIX, adapter), atol=2e-5)


def test_the_next_prefix_and_the_next_adapter_are_replayed():
    loaded = make_loaded()
    graphs = RecordedGraphs()
    passes = CandidatePasses(loaded, 1, graphs)
    for number, name in enumerate(("a", "b", "c")):
        attach_random(loaded, number, name)
        with inference(loaded.model), passes.ready([name], packed=True, longest_prefix=30):
            for prefix in (PREFIX, PREFIX[:9], [], PREFIX[3:]):
                (found,) = run(passes, [name], prefix)
                np.testing.assert_allclose(found, alone_beside(loaded, passes, prefix, name), atol=2e-5)
        loaded.detach(name)
    assert graphs.num_captures == 2, "one behind prefixes, one without"
    assert passes.graphed.num_replayed == 12 - 2 * 2


def alone_beside(loaded, passes, prefix, name) -> np.ndarray:
    """As ``alone``, of a copy of the model: ``loaded`` serves passes."""
    other = make_loaded()
    attach_random(other, "abc".index(name), name)
    return alone(other, prefix, name)


def test_a_longer_prefix_than_there_is_room_for_is_captured_anew():
    loaded = make_loaded()
    passes = CandidatePasses(loaded, 0, RecordedGraphs())
    expected = {n: alone(loaded, [*PREFIX * 30][:n], None) for n in (20, 600)}
    for longest in (20, 600, 20):
        with inference(loaded.model), passes.ready([], packed=True, longest_prefix=longest):
            for _ in range(3):
                (found,) = run(passes, [None], [*PREFIX * 30][:longest])
                np.testing.assert_allclose(found, expected[longest], atol=2e-5)


def test_rows_of_a_model_that_cannot_be_packed_are_padded():
    loaded = make_loaded()
    attach_random(loaded, 1, "a")
    passes = CandidatePasses(loaded, 0, None)
    with inference(loaded.model), passes.ready([], packed=False):
        (found,) = run(passes, [None], [])
    np.testing.assert_allclose(found, alone(loaded, [], "a"), atol=2e-5)


def test_a_head_without_a_name_is_run_as_it_is(monkeypatch):
    loaded = make_loaded()
    expected = alone(loaded, PREFIX, None)
    monkeypatch.setattr(loaded.model, "get_output_embeddings", lambda: None)
    passes = CandidatePasses(loaded, 0, None)
    with inference(loaded.model), passes.ready([], packed=True):
        np.testing.assert_allclose(run(passes, [None], PREFIX)[0], expected, atol=2e-5)


def test_adapters_that_are_no_matrices_cannot_share_a_pass():
    loaded = make_loaded()
    attach_random(loaded, 1, "a", target_modules=("embed_tokens",))
    attach_random(loaded, 2, "b")
    passes = CandidatePasses(loaded, 2, None)
    with pytest.raises(UserError, match="cannot share a pass"), passes.ready(["a", "b"], packed=True):
        pass


def test_each_module_may_scale_its_adapter_in_its_own_way(tmp_path):
    """As PEFT's rank and alpha patterns have it, and a bias behind B, which is PEFT's own to add."""
    from peft import LoraConfig, get_peft_model

    model = make_model()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"], rank_pattern={"up_proj": 2},
        alpha_pattern={"q_proj": 32}, use_rslora=True, init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    get_peft_model(model, config).save_pretrained(tmp_path / "patterns")
    model = make_model()
    config = LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], lora_bias=True, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    biased = get_peft_model(model, config)
    with torch.no_grad():
        for name, p in biased.named_parameters():
            if name.endswith("lora_B.default.bias"):
                p.fill_(0.5)
    biased.save_pretrained(tmp_path / "biased")
    for folder in ("patterns", "biased"):
        loaded = make_loaded()
        loaded.attach_saved(tmp_path / folder, "a")
        expected = alone(loaded, PREFIX, "a")
        assert np.abs(expected - alone(loaded, PREFIX, None)).max() > 0.1
        passes = CandidatePasses(loaded, 1, RecordedGraphs())
        with inference(loaded.model), passes.ready(["a"], packed=True, longest_prefix=len(PREFIX)):
            for _ in range(3):
                np.testing.assert_allclose(run(passes, ["a"], PREFIX)[0], expected, atol=2e-5)
