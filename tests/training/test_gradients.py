"""Packed rows and losses in chunks have the gradient of the plain way."""

from __future__ import annotations

import pytest
import torch

from raylora.data.encoding import encode_example
from raylora.model import forward
from raylora.model.adapters import LoadedModel
from raylora.model.forward import head_is_plain
from raylora.training.loop import train_adapter
from tests.helpers.tiny import load, make_model, make_tokenizer
from tests.helpers.training import DROPOUT, METHOD, assert_packed_agrees, gradient_of, make_examples


@pytest.mark.parametrize("train_on", ["answer", "all"])
@pytest.mark.parametrize("budget", [300, 10**6])
def test_a_packed_and_a_padded_step_have_the_same_gradient_dropout_included(loaded, encoded, train_on, budget):
    method = DROPOUT.model_copy(update={"train_on": train_on})
    loss, gradients, fullest = gradient_of(loaded, encoded, method, packed=True, budget=budget)
    expected, padded, _ = gradient_of(loaded, encoded, method, packed=False)
    assert fullest == 16 if budget > 300 else 1 < fullest < 16
    assert loss == pytest.approx(expected, abs=1e-5)
    for a, b in zip(gradients, padded, strict=True):
        assert float(b.abs().max()) > 1e-4
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_gradients_of_chunks_are_those_of_all_logits_at_once(loaded, encoded, monkeypatch):
    monkeypatch.setattr(forward, "CPU_LOGITS", 3 * len(make_tokenizer()))
    chunked = gradient_of(loaded, encoded, METHOD, packed=True)
    allows = loaded.allows
    monkeypatch.setattr(loaded, "allows", lambda trial: trial is not head_is_plain and allows(trial))
    whole = gradient_of(loaded, encoded, METHOD, packed=True)
    assert chunked[0] == pytest.approx(whole[0], abs=1e-6)
    for a, b in zip(chunked[1], whole[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_models_that_cannot_be_packed_are_trained_with_padding(tokenizer, encoded):
    results = []
    for implementation in ("sdpa", "eager"):
        model = make_model().requires_grad_(False)
        model.set_attn_implementation(implementation)
        loaded = LoadedModel(model, tokenizer, "tiny", "none")
        parameters = loaded.attach(DROPOUT, 0)
        results.append((train_adapter(loaded, parameters, encoded, DROPOUT, 0, 3), parameters))
    (packed, mine), (padded, theirs) = results
    assert (packed.metrics.packed, padded.metrics.packed) == (True, False)
    assert [s.loss for s in packed.steps] == pytest.approx([s.loss for s in padded.steps], abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantized_bases_are_trained_packed_and_however_a_step_is_cut(outlier_model_folder, quantization):
    loaded = load(outlier_model_folder, quantization)
    encoded = [encode_example(loaded.tokenizer, e, 256) for e in make_examples(16)]
    assert_packed_agrees(loaded, encoded, of_loss=1e-6, of_gradient=1e-5)
    loss, gradients, fullest = gradient_of(loaded, encoded, DROPOUT, packed=True, budget=300)
    expected, whole, _ = gradient_of(loaded, encoded, DROPOUT, packed=True)
    assert fullest < 16
    assert loss == pytest.approx(expected, rel=1e-6)
    for a, b in zip(gradients, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    result = train_adapter(loaded, loaded.attach(DROPOUT, 0), encoded, DROPOUT, 0, 8)
    assert result.metrics.packed
    assert result.steps[-1].loss < result.steps[0].loss


@pytest.mark.parametrize("method", [METHOD, DROPOUT], ids=["plain", "dropout"])
def test_a_base_in_half_precision_is_trained_on_a_cpu(encoded, method):
    """As a caller's model may be; its adapters are float32."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model = make_model().to(dtype).requires_grad_(False)
        loss, gradients, _ = gradient_of(LoadedModel(model, make_tokenizer(), "tiny", "none"), encoded, method, True)
        found.append((loss, torch.cat([g.flatten() for g in gradients])))
    (loss, ours), (expected, theirs) = found
    assert loss == pytest.approx(expected, rel=1e-2)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05
