"""fp8 weights and activations: torch's own fp8 products, which a CPU has too."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.config.method import Method
from raylora.config.options import ModelOptions
from raylora.errors import UserError
from raylora.model.adapter_weights import plain_weight
from raylora.model.fp8 import Fp8Linear, check_fp8, make_fp8
from raylora.model.frozen import frozen_layer
from raylora.model.loading import load_model
from raylora.model.packing import can_pack, is_exact
from tests.helpers.tiny import load, make_loaded, make_model

CPU = torch.device("cpu")


def make_layer(in_features: int = 64, out_features: int = 48, bias: bool = True) -> Fp8Linear:
    torch.manual_seed(0)
    holder = make_model()
    holder.model.layers[0].mlp.down_proj = torch.nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)
    make_fp8(holder)
    return holder.model.layers[0].mlp.down_proj


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31), st.floats(1e-4, 1e3))
def test_a_weight_is_off_by_at_most_a_16th_of_itself(out_features, in_features, seed, scale):
    layer = torch.nn.Linear(16 * in_features, 16 * out_features).requires_grad_(False)
    layer.weight.data = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) * scale
    original, model = layer.weight.data.clone(), make_model()
    model.model.layers[0].mlp.down_proj = layer
    make_fp8(model)
    off = (layer.float_weight(torch.float32) - original).abs()
    # Three bits after the point; the smallest step of a row is that of numbers below a 28,672th of its largest.
    assert bool(
        (off <= original.abs() / 16 * 1.001 + original.abs().amax(1, keepdim=True) / 448 * 2**-10 * 1.001).all()
    )


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_the_weight_and_of_the_rounded_input(bias):
    layer = make_layer(bias=bias)
    x = torch.randn(2, 7, 64)
    weight, off = layer.float_weight(torch.float32), layer.bias if bias else None
    expected = torch.nn.functional.linear(x, weight, off)
    assert relative(layer(x), expected) < 0.04
    rounded = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), off.bfloat16() if bias else None)
    assert relative(layer(x.bfloat16()).float(), rounded.float()) < 0.04
    assert (layer(x).dtype, layer(x.bfloat16()).dtype) == (torch.float32, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_the_gradient_is_that_of_the_same_weight():
    layer = make_layer()
    x = torch.randn(9, 64, requires_grad=True)
    by_output = torch.randn(9, 48) * torch.logspace(-6, 2, 9)[:, None]
    gradient = torch.autograd.grad(layer(x), x, by_output)[0]
    expected = by_output @ layer.float_weight(torch.float32)
    for found, wanted in zip(gradient, expected, strict=True):
        assert relative(found, wanted) < 0.06, "each row by itself, whatever its size"
    assert frozen_layer(layer) is layer


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**31))
def test_a_row_does_not_depend_on_what_shares_its_minibatch(before, after, seed):
    layer, random = LAYER, torch.Generator().manual_seed(seed)
    row, others = torch.randn(1, 64, generator=random), torch.randn(before + after, 64, generator=random) * 100
    together = torch.cat([others[:before], row, others[before:]])
    gradients = together[:, :48].contiguous()
    for multiply, given_ in ((layer.multiply, together), (layer.multiply_back, gradients)):
        # The shape of a product may change the order of its sums, and that the last bit of bfloat16.
        torch.testing.assert_close(
            multiply(given_)[before], multiply(given_[before : before + 1])[0], rtol=2**-7, atol=1e-5
        )


LAYER = make_layer()


def test_a_weight_takes_one_byte_and_two_from_the_first_backward_pass_on():
    layer = make_layer()
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    assert (layer.weight.dtype, layer.weight.nbytes, layer.transposed) == (torch.uint8, 64 * 48, None)
    y.sum().backward()
    assert layer.transposed.nbytes == 64 * 48
    assert layer.transposed.is_contiguous()
    assert torch.equal(copy.deepcopy(layer)(x), y)


def test_no_tokens_and_a_row_of_zeros_are_no_trouble():
    layer = make_layer(bias=False)
    assert layer(torch.zeros(0, 64)).shape == (0, 48)
    assert not layer(torch.zeros(2, 64)).any()


def test_head_embeddings_and_layers_of_odd_sizes_stay_as_they_are():
    model = make_model()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 120)
    model.model.layers[1].self_attn.q_proj = torch.nn.Linear(72, 64)
    assert make_fp8(model) == 12
    kept = {name for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    assert kept == {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "lm_head"}
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_an_adapter_begins_as_it_does_on_the_float_model():
    plain, quantized = make_loaded(), make_loaded()
    make_fp8(quantized.model)
    for mine, theirs in zip(quantized.attach(Method(), 3), plain.attach(Method(), 3), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)
    modules = [m.get_base_layer() for _, m in quantized.lora_modules()]
    assert len(modules) == 14
    assert all(isinstance(layer, Fp8Linear) for layer in modules)
    assert relative(plain_weight(modules[0]), plain.lora_modules()[0][1].get_base_layer().weight) < 0.04
    assert quantized.relative_weight_update() == 0
    quantized.unwrap()
    assert sum(isinstance(m, Fp8Linear) for m in quantized.model.modules()) == 14


def test_it_packs_within_what_half_a_precision_may_differ():
    loaded = make_loaded()
    assert is_exact(loaded.model)
    make_fp8(loaded.model)
    assert not is_exact(loaded.model)
    assert can_pack(loaded.model)


def test_a_machine_without_fp8_products_refuses_it_in_one_line(tiny_model_folder):
    with pytest.raises(UserError, match="--quantization fp8: needs a GPU that multiplies fp8") as raised:
        check_fp8(CPU)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="this is a CPU: take 8bit"):
        load(tiny_model_folder, "fp8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_model_is_loaded_in_fp8_and_trains_on_a_gpu(tiny_model_folder):
    device = torch.device("cuda")
    try:
        check_fp8(device)
    except UserError as error:
        pytest.skip(str(error))
    loaded = load_model(ModelOptions(model=str(tiny_model_folder), quantization="fp8"), device)
    assert sum(isinstance(m, Fp8Linear) for m in loaded.model.modules()) == 14
    plain = load_model(ModelOptions(model=str(tiny_model_folder), quantization="none"), device)
    ids, results = torch.arange(3, 35, device=device).reshape(2, 16), []
    for each in (plain, loaded):
        parameters = each.attach(Method(lora_dropout=0.0), 0)
        with each.autocast():
            loss = each.model(input_ids=ids, labels=ids).loss
        results.append((float(loss), torch.autograd.grad(loss, parameters)))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.02)
    for mine, theirs in zip(results[1][1], results[0][1], strict=True):
        assert float((mine - theirs).norm()) <= 0.3 * float(theirs.norm())
