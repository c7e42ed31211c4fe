"""Which layers of a model get an adapter, in families whose layers have other names than Llama's."""

from __future__ import annotations

import copy

import pytest
import torch

from raylora.config.method import LORA_TARGETS, Method
from raylora.data.encoding import encode_example, labels_of
from raylora.errors import UserError
from raylora.model.adapters import LoadedModel
from raylora.model.targets import adapt, linear_layers, resolve
from raylora.training.gradients import GradientAccumulator, Job
from raylora.training.loop import train_adapter
from tests.helpers.families import ATTENTION, EXPERTS, FAMILIES, family_config, load_family
from tests.helpers.tiny import make_model
from tests.helpers.training import METHOD, make_examples

AUTO = METHOD.model_copy(update={"target_modules": ("auto",), "batch_size": 2})


@pytest.fixture(scope="module")
def encoded(tokenizer):
    return [encode_example(tokenizer, e, 256) for e in make_examples(4)]


def skeleton_of(name: str):
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(family_config(name))


def attached(loaded: LoadedModel, method: Method) -> list[torch.nn.Parameter]:
    """The parameters of an adapter that is not zero."""
    parameters, generator = loaded.attach(method, 0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return parameters


def test_auto_is_the_seven_names_where_a_model_has_them_all(tiny_model):
    assert resolve(tiny_model, ("auto",)) == LORA_TARGETS
    assert resolve(tiny_model, ("q_proj", "embed_tokens")) == ("q_proj", "embed_tokens")
    assert set(resolve(tiny_model, ("all-linear",))) == {*LORA_TARGETS}


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_is_every_linear_layer_that_peft_takes(name):
    _, names, without = FAMILIES[name]
    bare = skeleton_of(name)
    found = adapt(bare, resolve(bare, ("auto",)), dropout=0.1)
    assert (found.target_modules, found.without, found.unmatched) == (names, without, ())
    assert len(found.modules) == sum(layer.endswith(names) for layer in linear_layers(bare))
    assert bool(found.note) == bool({*EXPERTS} & {*without})
    assert not any(hasattr(module, "lora_A") for module in bare.modules()), "the skeleton is as it was"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_has_the_gradient_of_peft(name, encoded):
    loaded = load_family(name)
    parameters = attached(loaded, AUTO)
    check_gradient(loaded, parameters, encoded, AUTO)


def check_gradient(loaded, parameters, encoded, method):
    """A step's loss and gradient are PEFT's own."""
    step = GradientAccumulator(loaded, [Job(parameters, encoded, method, 0)], None)
    with step.ready():
        found = step.backward({0: (0, range(len(encoded)))})[0]
    ours = [p.grad.clone() for p in parameters]
    loss, theirs = gradient_of_peft(loaded, parameters, encoded)
    assert float(found.loss) == pytest.approx(loss, rel=1e-4)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-3)


def gradient_of_peft(loaded, parameters, encoded):
    """Loss and gradient of a step by PEFT's own forward pass, example by example."""
    loaded.peft_model.zero_grad()
    labels = [torch.tensor(labels_of(e, "answer")) for e in encoded]
    num, total = sum(int((part != -100).sum()) for part in labels), 0.0
    for example, part in zip(encoded, labels, strict=True):
        logits = loaded.model(input_ids=torch.tensor([list(example.input_ids)]), use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], part[1:], reduction="sum") / num
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad for p in parameters]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_trained_and_its_adapter_is_loaded_again(name, encoded, tmp_path):
    loaded = load_family(name)
    before = loaded.logits_hash()
    result = train_adapter(loaded, loaded.attach(AUTO, 0), encoded, AUTO, 0, 3)
    assert result.steps[-1].loss < result.steps[0].loss
    assert loaded.relative_weight_update() > 0
    ids = torch.tensor([list(encoded[0].input_ids)])
    with torch.inference_mode():
        expected = loaded.model(input_ids=ids, use_cache=False).logits
    loaded.save_adapter(tmp_path)
    loaded.detach()
    loaded.attach_saved(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(input_ids=ids, use_cache=False).logits, expected)
    assert loaded.logits_hash() == before


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "gptoss"])
def test_experts_are_adapted_by_their_parameters_names_without_dropout(name, encoded, tmp_path):
    method = AUTO.model_copy(update={"target_modules": ("q_proj", *EXPERTS), "lora_dropout": 0.0})
    found = adapt(skeleton_of(name), method.target_modules, dropout=0.0)
    assert (len(found.modules), found.without) == (6, ATTENTION[1:])
    loaded = load_family(name)
    before = loaded.logits_hash()
    parameters = attached(loaded, method)
    check_gradient(loaded, parameters, encoded, method)
    expected = [float(delta.norm() / weight.norm()) for delta, weight in changes(loaded)]
    assert loaded.relative_weight_update() == pytest.approx(sum(expected) / 6, rel=1e-4)
    with pytest.raises(UserError, match="cannot share a pass"):
        loaded.attach(method, 0, "another")
    loaded.detach()
    assert loaded.attach(AUTO, 0), "and another adapter has no experts"
    assert loaded.logits_hash() == before


def changes(loaded):
    """What an adapter adds to each weight, and the weight, both by PEFT."""
    for _, module in loaded.lora_modules():
        weight = module.get_param() if hasattr(module, "parameter_name") else module.get_base_layer().weight
        yield module.get_delta_weight("default"), weight


@pytest.mark.parametrize(
    ("name", "wanted", "dropout", "expected"),
    [
        ("gpt2", LORA_TARGETS, 0.1, "no layer is called q_proj or .*; there are c_attn, c_proj, c_fc$"),
        ("mamba", ("out_proj",), 0.1, "incompatible with Mamba.*; there are in_proj, x_proj, dt_proj, out_proj$"),
        ("qwen3moe", LORA_TARGETS, 0.1, "without dropout only: give --lora-dropout 0, or leave them out, as auto"),
        ("mixtral", ("w1", "w2"), 0.0, "w3.*; there are q_proj, k_proj"),
    ],
)
def test_names_that_a_model_has_not_are_one_line_with_those_it_has(name, wanted, dropout, expected):
    with pytest.raises(UserError, match=expected) as caught:
        adapt(skeleton_of(name), wanted, dropout)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=expected):
        load_family(name).attach(AUTO.model_copy(update={"target_modules": wanted, "lora_dropout": dropout}), 0)


def test_names_that_are_there_in_part_are_told(tmp_path):
    found = adapt(skeleton_of("opt"), LORA_TARGETS, dropout=0.1)
    assert found.target_modules == LORA_TARGETS[:3]
    assert found.unmatched == LORA_TARGETS[3:]
    assert "6 layers get an adapter (q_proj, k_proj, v_proj); without one: out_proj, fc1, fc2" in found.note
    assert "no layer is called o_proj or gate_proj" in found.note


def test_a_caller_s_model_with_an_adapter_on_it_is_resolved_too():
    loaded = LoadedModel(make_model().requires_grad_(False), None, "tiny", "none")
    loaded.attach(AUTO, 0)
    assert resolve(loaded.model, ("auto",)) == LORA_TARGETS
    assert list(linear_layers(loaded.model)) == list(linear_layers(copy.deepcopy(make_model())))
