"""liger-kernel in one model and in nothing else: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import copy
import functools
import importlib
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen3Config
from transformers.models.llama import modeling_llama

from raylora.config.method import Method
from raylora.model.liger import use_liger
from raylora.model.packing import can_pack
from tests.helpers.tiny import make_tokenizer, tiny_config

pytest.importorskip("liger_kernel")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IDS = torch.arange(3, 19, device=DEVICE).reshape(2, 8)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """What Triton's interpreter lacks for liger's norm: a kernel's floats as float32, which have ``to``, and rsqrt of
    the library that comes with a GPU."""
    if DEVICE.type == "cuda":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats(value):
        if type(value) is float:
            return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        return convert(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_floats)
    monkeypatch.setattr(importlib.import_module("liger_kernel.ops.rms_norm"), "rsqrt", lambda x: tl.rsqrt(x))


def tiny(kind=LlamaConfig):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind, num_layers=1)).eval().requires_grad_(False).to(DEVICE)


def keep(seen, _, given):
    seen.append(given[0].detach().clone())


def results(model):
    inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
    result = model(inputs_embeds=inputs, labels=IDS, use_cache=False)
    return [result.logits.detach(), torch.autograd.grad(result.loss, inputs)[0]]


@pytest.mark.parametrize("kind", [LlamaConfig, pytest.param(Qwen3Config, marks=pytest.mark.slow)])
def test_the_numbers_are_those_without_it_and_no_other_model_has_it(kind):
    model, other = tiny(kind), tiny(kind)
    code, expected = dict(vars(modeling_llama)), results(model)
    assert use_liger(model)
    for found, wanted in zip(results(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    replaced = {type(m).__name__ for m in model.modules() if "forward" in vars(m)}
    family = kind.__name__.removesuffix("Config")
    assert {f"{family}RMSNorm", f"{family}MLP", f"{family}Attention"} <= replaced
    assert vars(modeling_llama) == code
    assert not any("forward" in vars(m) for m in other.modules())
    assert [torch.equal(a, b) for a, b in zip(results(other), expected, strict=True)] == [True, True]


def test_what_liger_does_not_know_stays_as_it_is(caplog):
    config = GPTNeoXConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).to(DEVICE)
    assert not use_liger(model)
    assert not any("forward" in vars(m) for m in model.modules())
    assert not caplog.records


def test_a_kernel_that_differs_is_taken_out_again(monkeypatch, caplog):
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    right = LigerSwiGLUMLP.forward
    monkeypatch.setattr(LigerSwiGLUMLP, "forward", lambda self, x: 1.1 * right(self, x))
    model = tiny()
    expected, before = results(model), {m: dict(vars(m)) for m in model.modules()}
    with caplog.at_level(logging.WARNING, "raylora"):
        assert not use_liger(model)
    assert caplog.text.count("liger's kernels are not used for LlamaForCausalLM") == 1
    assert "its results differ" in caplog.text
    assert {m: dict(vars(m)) for m in model.modules()} == before
    assert [torch.equal(a, b) for a, b in zip(results(model), expected, strict=True)] == [True, True]


@pytest.mark.slow
def test_packed_rows_adapters_and_hooks_go_with_it():
    from raylora.model.adapters import LoadedModel

    plain, fast = (LoadedModel(tiny(), make_tokenizer(), "tiny", "none") for _ in range(2))
    assert use_liger(fast.model)
    assert can_pack(fast.model)
    outcomes = []
    for loaded in (plain, fast):
        seen: list[torch.Tensor] = []
        hook = loaded.model.model.layers[0].mlp.down_proj.register_forward_pre_hook(functools.partial(keep, seen))
        parameters = loaded.attach(Method(lora_dropout=0.0), 0)
        torch.manual_seed(1)
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.02)
        loss = loaded.model(input_ids=IDS, labels=IDS).loss
        outcomes.append([*seen, loss.detach(), *torch.autograd.grad(loss, parameters)])
        hook.remove()
        loaded.unwrap()
    assert len(outcomes[0]) == len(outcomes[1]) > 2
    for found, wanted in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_a_copy_computes_with_its_own_weights():
    model = tiny()
    assert use_liger(model)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.mul_(0.5)
    assert not torch.allclose(results(other)[0], results(model)[0], atol=1e-3)
