"""The base stays what it was while adapters come and go, in every quantization."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from raylora.config.method import Method
from raylora.data.encoding import encode_example
from raylora.errors import UserError
from raylora.model.adapters import LoadedModel
from raylora.records import Example, Message
from raylora.training.loop import train_adapter
from tests.helpers.adapters import KINDS, PROMPT_KINDS, logits, make_qwen2, parts, save_kind
from tests.helpers.tiny import load, make_model, make_tokenizer


def test_an_adapter_of_another_model_is_one_line(tokenizer, adapter_folder):
    loaded = LoadedModel(make_model(hidden_size=32), tokenizer, "other", "none")
    for _ in range(2):  # what is refused leaves nothing behind
        with pytest.raises(UserError, match="no adapter of other"):
            loaded.attach_saved(adapter_folder)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Folders of adapters of every kind, and the logits that PEFT's own forward pass gives each alone."""
    from peft import PeftModel

    folders = {name: save_kind(name, tmp_path_factory.mktemp("kinds") / name) for name in KINDS}
    return {
        name: (folder, logits(PeftModel.from_pretrained(make_qwen2(), str(folder)).eval()))
        for name, folder in folders.items()
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_adapters_of_all_kinds_compute_what_they_do_alone_in_any_order(kinds, seed):
    model = make_qwen2()
    base, before = logits(model), parts(model)
    loaded = LoadedModel(model, make_tokenizer(), "qwen2", "none")
    order = list(kinds) * 2
    random.Random(seed).shuffle(order)
    for name in order:
        folder, alone = kinds[name]
        loaded.attach_saved(folder)
        assert torch.equal(logits(model), alone), name
        assert not torch.equal(alone, base), name
        loaded.detach()
        assert torch.equal(logits(model), base), f"{name} has left something in the base"
    loaded.unwrap()
    assert parts(model) == before
    loaded.attach(METHOD, 0)  # and a training can begin
    loaded.detach()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", PROMPT_KINDS)
def test_an_adapter_outside_of_the_layers_is_refused_and_spoils_no_other(kinds, tmp_path, name):
    loaded = LoadedModel(make_qwen2(), make_tokenizer(), "qwen2", "none")
    with pytest.raises(UserError, match=r"only adapters that change the model's layers \(LoRA, IA3"):
        loaded.attach_saved(save_kind(name, tmp_path / name))
    folder, alone = kinds["plain"]
    loaded.attach_saved(folder)
    assert torch.equal(logits(loaded.model), alone)


@pytest.mark.parametrize("after", [None, "plain", "bias of all", "IA3"])
def test_a_broken_adapter_spoils_no_other(kinds, tmp_path, after):
    loaded = LoadedModel(make_qwen2(), make_tokenizer(), "qwen2", "none")
    if after:
        loaded.attach_saved(kinds[after][0])
        loaded.detach()
    broken = shutil.copytree(kinds["plain"][0], tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    weights[min(weights)] = weights[min(weights)][:, :7].contiguous()  # A of another width
    save_file(weights, broken / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no adapter of qwen2"):
        loaded.attach_saved(broken)
    for name in ("ranks", "IA3", "plain"):
        loaded.attach_saved(kinds[name][0])
        assert torch.equal(logits(loaded.model), kinds[name][1]), name
        loaded.detach()


def test_an_adapter_that_fits_in_part_is_refused(kinds, tmp_path):
    """PEFT would apply what it finds a place for, and not say so."""
    for change in ("more layers", "fewer layers"):
        folder = shutil.copytree(kinds["plain"][0], tmp_path / change)
        weights = load_file(folder / "adapter_model.safetensors")
        first = {key: value for key, value in weights.items() if "layers.0." in key}
        more = {key.replace("layers.0.", "layers.7."): value.clone() for key, value in first.items()}
        save_file({**weights, **more} if change == "more layers" else first, folder / "adapter_model.safetensors")
        loaded = LoadedModel(make_qwen2(), make_tokenizer(), "qwen2", "none")
        with pytest.raises(UserError, match=r"has no place for|lacks weights"):
            loaded.attach_saved(folder)


def test_wrappers_do_not_pile_up(kinds):
    loaded = LoadedModel(make_qwen2(), make_tokenizer(), "qwen2", "none")
    for _ in range(5):
        for name in ("plain", "modules to save", "ranks"):
            loaded.attach_saved(kinds[name][0])
            loaded.detach()
    assert max(name.count("base_layer") for name, _ in loaded.model.named_modules()) == 1
    loaded.unwrap()
    assert not [name for name, _ in loaded.model.named_modules() if "base_layer" in name]


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_adapters_with_more_than_lora_leave_a_quantized_base_as_it_was(tmp_path, quantization):
    folder = tmp_path / "model"
    make_qwen2().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    loaded = load(folder, quantization)
    before = loaded.logits_hash()
    for name in ("bias of all", "modules to save", "IA3", "token", "plain"):
        loaded.attach_saved(save_kind(name, tmp_path / name))
        loaded.detach()
        assert loaded.logits_hash() == before, name


METHOD = Method(lora_r=4, num_epochs=2, batch_size=2, gradient_accumulation=1, learning_rate=5e-3, lora_dropout=0.1)
EXAMPLES = [
    Example((Message("user", f"What is the colour of thing {i}?"),), f"It is {c}.", "q")
    for i, c in enumerate(["red", "blue", "green", "white"])
]


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_base_logits_hash_the_same_after_every_experiment(tiny_model_folder, quantization):
    loaded = load(tiny_model_folder, quantization)
    before = loaded.logits_hash()
    for seed in range(3):
        parameters = loaded.attach(METHOD, seed)
        encoded = [encode_example(loaded.tokenizer, e, 128) for e in EXAMPLES]
        train_adapter(loaded, parameters, encoded, METHOD, seed)
        assert loaded.logits_hash() == before, "with the adapter switched off"
        loaded.detach()
        assert loaded.logits_hash() == before, "with the adapter gone"
        assert not [name for name, _ in loaded.model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_every_adapter_matrix_gets_a_gradient_after_an_evaluation(tiny_model_folder, quantization):
    # bitsandbytes may repack 4-bit weights at the first evaluation on a CPU, for a kernel without a backward pass.
    loaded = load(tiny_model_folder, quantization)
    loaded.logits_hash()
    parameters = loaded.attach(METHOD.model_copy(update={"lora_dropout": 0.0}), 0)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.arange(3, 35).reshape(1, -1)
    loaded.model.train()
    loaded.model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    # and it is the gradient of the function that is evaluated: a small step along it lowers the loss by what it says
    with torch.no_grad():
        loss = loaded.model.eval()(input_ids=ids, labels=ids).loss  # dropout is 0
        norm_squared = sum(p.grad.pow(2).sum() for p in parameters)
        for p in parameters:
            p -= 1e-3 / norm_squared * p.grad
        dropped = loss - loaded.model(input_ids=ids, labels=ids).loss
    loaded.detach()
    assert dropped == pytest.approx(1e-3, rel=0.1)


def test_saved_adapter_is_one_that_peft_loads(tiny_model_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = load(tiny_model_folder, "none")
    parameters = loaded.attach(METHOD, 0, name="probe")
    encoded = [encode_example(loaded.tokenizer, e, 128) for e in EXAMPLES]
    train_adapter(loaded, parameters, encoded, METHOD, 0)
    loaded.save_adapter(tmp_path, name="probe")
    ids = torch.arange(3, 35).reshape(1, -1)
    with torch.inference_mode():
        ours = loaded.model(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    loaded.detach("probe")
    loaded.attach_saved(tmp_path)
    with torch.inference_mode():
        assert torch.allclose(loaded.model(input_ids=ids).logits, theirs, atol=1e-5)


def test_unknown_target_modules_are_one_line(tiny_model_folder):
    loaded = load(tiny_model_folder, "none")
    with pytest.raises(UserError, match="--target-modules"):
        loaded.attach(METHOD.model_copy(update={"target_modules": ("c_attn",)}), 0)
    assert loaded.attach(METHOD, 0)


@pytest.mark.parametrize("modules", [("q_proj", "down_proj"), ("embed_tokens",), ("embed_tokens", "up_proj")])
def test_an_adapter_changes_nothing_until_both_its_factors_are_there(loaded, modules):
    """Of a linear layer B begins as zero, of an embedding A."""
    parameters = loaded.attach(METHOD.model_copy(update={"target_modules": modules}), 0)
    try:
        assert loaded.changes_nothing()
        with torch.no_grad():
            empty = next(p for p in parameters if not p.any())
            empty.flatten()[-1] = 1e-30
        assert not loaded.changes_nothing()
        with torch.no_grad():
            for p in parameters:
                p.zero_()
        assert loaded.changes_nothing()
    finally:
        loaded.detach()
