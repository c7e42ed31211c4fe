"""Packed layers multiply as plain ones do, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch

from raylora.config.method import Method
from raylora.model import onednn
from raylora.model.adapters import LoadedModel
from raylora.model.onednn import onednn_linears
from tests.helpers.tiny import make_model

LAYERS = 2 * 7


@pytest.fixture
def model():
    return make_model(hidden_size=256).requires_grad_(False)


def logits(model):
    ids = torch.arange(60).reshape(3, 20)
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def test_the_model_answers_the_same_inside_and_afterwards(model):
    before = logits(model)
    with onednn_linears(model, 64) as num_layers:
        assert num_layers == LAYERS
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), before)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_an_adapter_above_packed_layers_has_its_say(model, tokenizer):
    loaded = LoadedModel(model, tokenizer, "tiny", "none")
    base = logits(model)
    parameters = loaded.attach(Method(lora_dropout=0.0), 0)
    with torch.no_grad():
        for p in parameters:
            p.normal_()
    plain = logits(model)
    assert (plain - base).abs().max() > 0.1
    with onednn_linears(model, 64) as num_layers:
        assert num_layers == LAYERS, "the frozen layers alone"
        torch.testing.assert_close(logits(model), plain, atol=1e-4, rtol=1e-4)
    loaded.detach()
    assert torch.equal(logits(model), base)


def test_a_failure_inside_leaves_nothing_behind(model):
    with pytest.raises(KeyboardInterrupt), onednn_linears(model, 64):
        raise KeyboardInterrupt
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_copies_that_do_not_fit_the_memory_are_not_made(model, monkeypatch):
    before = logits(model)
    with onednn_linears(model, 64):
        assert all(m.forward.args[0].is_mkldnn for m in model.modules() if "forward" in m.__dict__)
    monkeypatch.setattr(onednn, "COPIES_MEMORY_SHARE", 0.0)
    with onednn_linears(model, 64) as num_layers:
        assert num_layers == LAYERS
        assert not any(m.forward.args[0].is_mkldnn for m in model.modules() if "forward" in m.__dict__)
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def test_layers_that_are_not_plain_float32_are_left_alone(model):
    model.bfloat16()
    with onednn_linears(model, 64) as num_layers:
        assert num_layers == 0


@pytest.mark.parametrize("share", [0.25, 0.0])
def test_gradients_go_through_packed_layers(model, tokenizer, monkeypatch, share):
    monkeypatch.setattr(onednn, "COPIES_MEMORY_SHARE", share)
    loaded = LoadedModel(model, tokenizer, "tiny", "none")
    parameters = loaded.attach(Method(lora_dropout=0.0), 0)
    with torch.no_grad():
        for p in parameters:
            p.normal_(std=0.1)
    ids = torch.arange(60).reshape(3, 20)

    def gradients():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return torch.autograd.grad(loss, parameters)

    plain = gradients()
    with onednn_linears(model, 64, with_backward=True) as num_layers:
        assert num_layers == LAYERS
        for ours, theirs in zip(gradients(), plain, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
