"""The base stays what it was while adapters come and go, in every quantization."""

from __future__ import annotations

import shutil

import pytest
import torch

from raylora.config import Method, ModelOptions, load_config
from raylora.data.encoding import encode_example
from raylora.errors import BaseChangedError, UserError
from raylora.experiment.workbench import Workbench
from raylora.model import sources
from raylora.model.adapters import LoadedModel
from raylora.model.loading import load_model
from raylora.model.sources import model_hash, resolve_model
from raylora.planning.plan import make_plan
from raylora.records import Example, Message
from raylora.training.loop import train_adapter
from tests.helpers.chunks import OPTIONS, write_dataset

METHOD = Method(lora_r=4, num_epochs=2, batch_size=2, gradient_accumulation=1, learning_rate=5e-3, lora_dropout=0.1)
EXAMPLES = [
    Example((Message("user", f"What is the colour of thing {i}?"),), f"It is {c}.", "q")
    for i, c in enumerate(["red", "blue", "green", "white"])
]


def load(folder, quantization: str) -> LoadedModel:
    return load_model(ModelOptions(model=str(folder), quantization=quantization), torch.device("cpu"))


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
    assert dropped == pytest.approx(1e-3, rel=0.5 if quantization == "8bit" else 0.1)


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


def test_no_model_and_wrong_models_are_one_line(tmp_path):
    for name, expected in {
        None: "MODEL_NAME",
        "": "--model demo",
        str(tmp_path / "missing"): "no such folder",
        str(tmp_path): "config.json",
        str(tmp_path / "a.gguf"): "no such file",
        "modelscope://org/model": "raylora[modelscope]",
        "../up": "no such folder",
    }.items():
        with pytest.raises(UserError) as raised:
            resolve_model(name)
        assert expected in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_hub_name_that_cannot_be_had_is_one_line():
    with pytest.raises(UserError, match="not loaded from the hub") as raised:
        model_hash(resolve_model("nobody/nothing"))
    assert "\n" not in str(raised.value)


def test_the_hash_of_a_model_follows_its_files_and_not_its_place(tmp_path, tiny_model_folder):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "moved")
    assert model_hash(str(folder)) == model_hash(str(tiny_model_folder))
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    for place in (len(raw) // 2, len(raw) - 1):
        weights.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        assert model_hash(str(folder)) != model_hash(str(tiny_model_folder))
    weights.write_bytes(raw)
    assert model_hash(str(folder)) == model_hash(str(tiny_model_folder))
    (folder / "modeling_own.py").write_text("own = 1")
    assert model_hash(str(folder)) != model_hash(str(tiny_model_folder))


def test_the_hash_of_a_large_file_is_remembered_until_it_changes(tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "REMEMBERED_BYTES", 1000)
    expected = model_hash(str(tiny_model_folder))
    known = list((tmp_path / "cache" / "hashes").iterdir())
    assert known
    assert model_hash(str(tiny_model_folder)) == expected
    known[0].write_text("torn")
    assert model_hash(str(tiny_model_folder)) == expected
    folder = shutil.copytree(tiny_model_folder, tmp_path / "moved")
    assert model_hash(str(folder)) == expected
    (folder / "model.safetensors").write_bytes(b"x" * (folder / "model.safetensors").stat().st_size)
    assert model_hash(str(folder)) != expected


def test_a_damaged_model_folder_is_one_line(tmp_path, tiny_model_folder):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder, "none")
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle files"):
        load(folder, "none")


def test_unknown_target_modules_are_one_line(tiny_model_folder):
    loaded = load(tiny_model_folder, "none")
    with pytest.raises(UserError, match="--target-modules"):
        loaded.attach(METHOD.model_copy(update={"target_modules": ("c_attn",)}), 0)
    assert loaded.attach(METHOD, 0)


def test_a_base_that_was_changed_makes_no_row(tiny_model_folder, tmp_path):
    """What a stage made with a harmed base is not kept, and a worker that says so is replaced."""
    path = write_dataset(tmp_path / "data" / "chunk_1", "data")
    config = load_config(**{**OPTIONS, "model": str(tiny_model_folder), "output": tmp_path / "out"})
    plan = make_plan(config, [path], "single")
    bench = Workbench(config, plan.store)
    with torch.no_grad():
        bench.loaded.model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    (experiment,) = plan.experiments
    with pytest.raises(BaseChangedError):
        bench.run(experiment)
    assert plan.store.read_stage(experiment, "features") is None
    assert plan.store.read_row(experiment) is None


def test_examples_longer_than_the_model_can_see_are_refused_before_anything_starts(tiny_model_folder, tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[{"question": "Why?", "answer": "So."}]')
    config = load_config(model=str(tiny_model_folder), mmlu="demo", output=tmp_path / "results", max_length=4096)
    with pytest.raises(UserError, match=r"--max-length 4096: .* can look at 2048 tokens"):
        make_plan(config, [file], "single")
