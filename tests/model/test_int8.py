"""Int8 weights made floats again: the product, its gradient, and who expects bitsandbytes' own layer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from bitsandbytes.nn import Int8Params, Linear8bitLt
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.config.method import Method
from raylora.model.adapter_weights import plain_weight
from raylora.model.int8 import WeightOnlyLinear, make_weight_only, scales_of
from raylora.model.kernels import dequantize_int8
from tests.helpers.quantized import assert_is_float_model
from tests.helpers.tiny import load


def make_layer(in_features: int = 6, out_features: int = 5, bias: bool = True) -> torch.nn.Sequential:
    """A layer as transformers loads it, of random weights, within a model."""
    torch.manual_seed(0)
    layer = Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False, threshold=6.0)
    layer.weight = Int8Params(torch.randn(out_features, in_features), requires_grad=False).to("cpu")
    return torch.nn.Sequential(layer).requires_grad_(False)


def weight_only(**sizes) -> WeightOnlyLinear:
    model = make_layer(**sizes)
    make_weight_only(model)
    return model[0]


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_and_its_gradient_are_those_of_the_float_weight(bias):
    layer = weight_only(bias=bias)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = layer.weight.data.double() * layer.weight.SCB.double()[:, None] / 127
    expected = F.linear(x, weight, layer.bias.double() if bias else None)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(layer, (x,))
    by_output = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, x, by_output)[0] for y in (layer(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.floats(1e-4, 1e3))
def test_a_weight_is_off_by_at_most_half_of_a_127th_of_its_rows_largest(out_features, in_features, seed, scale):
    original = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * scale
    stored = Int8Params(original.clone(), requires_grad=False).to("cpu")
    found = dequantize_int8(stored.data, stored.SCB, torch.float32)
    # bitsandbytes rounds to float16 before it makes the weights int8
    steps = stored.SCB[:, None] / 127
    assert bool(((found - original.half().float()).abs() <= 0.501 * steps).all())


def test_no_tensor_is_kept_for_the_backward_pass():
    layer, saved = weight_only(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(4, 6, requires_grad=True)).sum().backward()
    assert not saved


def test_it_multiplies_in_its_inputs_type_and_in_autocasts_where_that_is_on():
    layer = weight_only(in_features=64, out_features=32)
    x = torch.randn(8, 64, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = layer(x)
    half = layer(x.detach().bfloat16())
    assert (exact.dtype, rounded.dtype, half.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert torch.equal(rounded, half)
    assert float((half.float() - exact.detach()).norm() / exact.detach().norm()) < 0.01
    rounded.sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, plain_weight(layer).sum(0).expand(8, -1), rtol=0.02, atol=0.05)


def test_a_model_in_8_bits_is_the_float_model_of_the_stored_weights(outlier_model_folder):
    assert_is_float_model(outlier_model_folder, "8bit", WeightOnlyLinear)


@pytest.mark.parametrize("forward_before", [False, True])
def test_scales_are_found_before_and_after_llm_int8s_own_forward_pass(forward_before):
    model = make_layer(in_features=16)
    scales = model[0].weight.SCB.clone()
    if forward_before:
        model.eval()(torch.randn(2, 16))
        assert model[0].weight.SCB is None
    make_weight_only(model)
    assert torch.equal(scales_of(model[0]), scales)
    assert model(torch.randn(2, 16)).shape == (2, 5)


def test_layers_behind_accelerates_hooks_are_weight_only_too():
    x = torch.randn(4, 6)
    expected = weight_only()(x)
    model = make_layer()
    add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu", io_same_device=True))
    make_weight_only(model)
    assert torch.equal(model(x), expected)


def test_a_copy_and_a_saved_layer_have_the_same_weight():
    layer = weight_only()
    x = torch.randn(4, 6)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    other = weight_only()
    other.weight.data.zero_()
    other.weight.SCB.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)


def test_peft_merges_an_adapter_into_it(tiny_model_folder):
    """Within what rounding to int8 once more costs."""
    loaded = load(tiny_model_folder, "8bit")
    for parameter in loaded.attach(Method(lora_dropout=0.0), 0):
        torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.inference_mode():
        base = loaded.model(input_ids=ids).logits
        with loaded.base():
            without = loaded.model(input_ids=ids).logits
    with torch.no_grad(), pytest.warns(UserWarning, match="rounding errors"):
        merged = loaded.peft_model.merge_and_unload()(input_ids=ids).logits
    assert float((merged - base).norm()) < 0.2 * float((without - base).norm())
