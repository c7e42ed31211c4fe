"""4-bit weights made floats again: bitsandbytes' own numbers, and who expects its own layer."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from raylora.config.method import Method
from raylora.model.frozen import frozen_layer
from raylora.model.nf4 import WeightOnly4bit, dequantize, make_weight_only
from tests.helpers.quantized import assert_is_float_model
from tests.helpers.tiny import load


def make_layer(bias: bool = True, **kwargs) -> torch.nn.Sequential:
    """A layer as transformers loads it, of random weights, within a model."""
    torch.manual_seed(0)
    options = {"compute_dtype": torch.float32, "quant_type": "nf4", **kwargs}
    layer = Linear4bit(96, 40, bias=bias, **options).to("cpu")
    layer.support_avx512bf16_for_cpu = False
    return torch.nn.Sequential(layer).eval().requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("compress_statistics", [True, False])
def test_product_and_gradient_are_bitsandbytes_own(bias, kind, compress_statistics):
    model = make_layer(bias, quant_type=kind, compress_statistics=compress_statistics)
    x = torch.randn(2, 3, 96, requires_grad=True)
    by_output, results = torch.randn(2, 3, 40), []
    for _ in range(2):
        y = model(x)
        with torch.inference_mode():
            results.append((y, torch.autograd.grad(y, x, by_output)[0], model(x.detach())))
        make_weight_only(model)
    assert type(model[0]) is WeightOnly4bit
    assert frozen_layer(model[0]) is model[0]
    for own, ours in zip(*results, strict=True):
        assert torch.equal(own, ours)


def test_no_tensor_is_kept_for_the_backward_pass():
    model, saved = make_layer(), []
    make_weight_only(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(4, 96, requires_grad=True)).sum().backward()
    assert not saved


def test_it_multiplies_in_autocasts_type_and_in_its_inputs():
    model = make_layer()
    make_weight_only(model)
    x = torch.randn(8, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(x)
    assert torch.equal(rounded, model(x.bfloat16()))
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float() - model(x)).norm() / model(x).norm()) < 0.01
    x = torch.randn(2, 96, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_weight_is_rounded_once_whatever_it_was_quantized_from(dtype):
    layer = make_layer()[0]
    layer.weight.quant_state.dtype = torch.bfloat16
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    exact = dequantize_4bit(layer.weight.data, state)
    if dtype == torch.float64:  # not one that bitsandbytes makes weights of: its own type, and then this
        exact = exact.bfloat16()
    assert torch.equal(dequantize(layer.weight.data, layer.weight.quant_state, dtype), exact.to(dtype))


def test_layers_behind_accelerates_hooks_and_copies_and_saved_ones_are_the_same():
    x, model = torch.randn(4, 96), make_layer()
    make_weight_only(model)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    hooked = make_layer()
    add_hook_to_module(hooked[0], AlignDevicesHook(execution_device="cpu", io_same_device=True))
    make_weight_only(hooked)
    assert torch.equal(hooked(x), expected)
    assert {"0.weight", "0.weight.absmax", "0.weight.quant_state.bitsandbytes__nf4"} <= set(model.state_dict())


def test_a_model_in_4_bits_is_the_float_model_of_the_stored_weights(tiny_model_folder):
    assert_is_float_model(tiny_model_folder, "4bit", WeightOnly4bit)


def test_peft_merges_an_adapter_into_it(tiny_model_folder):
    """Within what rounding to 4 bits once more costs."""
    loaded = load(tiny_model_folder, "4bit")
    for parameter in loaded.attach(Method(lora_dropout=0.0), 0):
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.inference_mode():
        base = loaded.model(input_ids=ids).logits
        with loaded.base():
            without = loaded.model(input_ids=ids).logits
    with torch.no_grad(), pytest.warns(UserWarning, match="rounding errors"):
        merged = loaded.peft_model.merge_and_unload()(input_ids=ids).logits
    assert float((merged - base).norm()) < 0.5 * float((without - base).norm())
