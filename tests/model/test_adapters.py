"""The base stays what it was while adapters come and go, in every quantization."""

from __future__ import annotations

import pytest
import torch

from raylora.config import Method
from raylora.data.encoding import encode_example
from raylora.errors import UserError
from raylora.model.adapters import LoadedModel
from raylora.records import Example, Message
from raylora.training.loop import train_adapter
from tests.helpers.tiny import load, make_model


def test_an_adapter_of_another_model_is_one_line(tokenizer, adapter_folder):
    loaded = LoadedModel(make_model(hidden_size=32), tokenizer, "other", "none")
    with pytest.raises(UserError, match="no adapter of other"):
        loaded.attach_saved(adapter_folder)


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
