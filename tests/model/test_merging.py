"""A merged model computes what the base with the adapter does, and is there whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raylora.config.method import Method
from raylora.errors import UserError
from raylora.model.adapter_files import adapter_in
from raylora.model.merging import merge
from raylora.model.sources import model_hash
from tests.helpers.adapters import KINDS, PROMPT_KINDS, logits, make_qwen2, save_kind
from tests.helpers.families import save_family
from tests.helpers.tiny import load, make_tokenizer, save_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of the tiny Qwen2, whose head is tied, with settings of generation that transformers won't write."""
    folder = tmp_path_factory.mktemp("qwen2")
    make_qwen2().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    return folder


def named(folder: Path, **values) -> Path:
    """The adapter's folder, with these values in its configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def read(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "LoRA's own bias"])
def test_logits_are_those_of_base_and_adapter(base, tmp_path, kind):
    adapter = named(save_kind(kind, tmp_path / "adapter"), base_model_name_or_path=str(base))
    expected = logits(peft.PeftModel.from_pretrained(read(base), adapter).eval())
    merge(adapter, tmp_path / "merged")
    found = logits(read(tmp_path / "merged"))
    change = (logits(read(base)) - expected).abs().max()
    assert change > 1e-3
    assert (found - expected).abs().max() < min(2e-4, change / 100)


@pytest.mark.parametrize(
    ("kind", "tied"), [("plain", True), ("modules to save", False), ("embeddings", False), ("token", True)]
)
def test_the_head_stays_tied_where_the_adapter_leaves_it_so(base, tmp_path, kind, tied):
    merge(save_kind(kind, tmp_path / "adapter"), tmp_path / "merged", str(base))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) != tied


def test_the_folder_has_what_the_base_s_has(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    merged = merge(save_kind("plain", tmp_path / "adapter"), tmp_path / "out" / "merged", str(tmp_path / "base"))
    names = {path.name for path in (tmp_path / "out" / "merged").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert not {n for n in names if "adapter" in n}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert tokenizer.encode("What is the capital?") == make_tokenizer().encode("What is the capital?")
    generation = json.loads((tmp_path / "out" / "merged" / "generation_config.json").read_text())
    assert generation["temperature"] == 0.6
    assert (merged.dtype, merged.notes) == ("float32", ())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["merged"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_base_s_files(tmp_path, adapter_folder, tiny_model_folder, dtype):
    shutil.copytree(tiny_model_folder, tmp_path / "base")
    read(tiny_model_folder).to(dtype).save_pretrained(tmp_path / "base")
    adapter = named(shutil.copytree(adapter_folder, tmp_path / "adapter"), base_model_name_or_path="gone/base")
    assert merge(adapter, tmp_path / "merged", str(tmp_path / "base")).dtype == str(dtype).split(".")[-1]
    model = read(tmp_path / "merged")
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = logits(peft.PeftModel.from_pretrained(read(tmp_path / "base"), adapter).eval()).float()
    assert torch.corrcoef(torch.stack([logits(model).float().flatten(), expected.flatten()]))[0, 1] > 0.999


def test_the_base_is_what_the_adapter_names(adapter_folder, tiny_model_folder, tmp_path):
    assert merge(adapter_folder, tmp_path / "merged").base == str(tiny_model_folder)
    expected = logits(peft.PeftModel.from_pretrained(read(tiny_model_folder), adapter_folder).eval())
    torch.testing.assert_close(logits(read(tmp_path / "merged")), expected, atol=2e-4, rtol=2e-4)


def refused(adapter: Path, output: Path, *arguments) -> str:
    """The one line that a merge ends in; nothing is left of it."""
    there = sorted(output.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        merge(adapter, output, *arguments)
    assert sorted(output.parent.rglob("*")) == there
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def adapter(adapter_folder, tmp_path) -> Path:
    return shutil.copytree(adapter_folder, tmp_path / "experiment" / "adapter")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("lora_B.weight", float("nan")),
        ("lora_B.weight", 3e38),  # finite, until it is multiplied
        ("lm_head.weight", float("inf")),
    ],
)
def test_what_is_not_finite_is_not_written(base, tmp_path, where, value):
    kind = "modules to save" if where.startswith("lm_head") else "plain"
    folder = save_kind(kind, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    next(w for name, w in weights.items() if name.endswith(where))[0, 0] = value
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    if value == 3e38:
        named(folder, lora_alpha=1e6)
    assert "NaN" in (text := refused(folder, tmp_path / "merged", str(base))) or "not finite" in text


def test_a_folder_that_holds_something_is_left_alone(adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.txt").write_text("x")
    assert "is not empty" in refused(adapter, tmp_path / "merged")
    assert "is a file" in refused(adapter, tmp_path / "merged" / "thesis.txt")
    (tmp_path / "merged" / "thesis.txt").unlink()
    merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_what_a_killed_merge_left_is_deleted_by_the_next(adapter, tmp_path):
    left = tmp_path / ".partial-0123-merged"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    merge(adapter, tmp_path / "merged")
    assert not left.exists()


def test_another_base_is_refused(adapter, tiny_model_folder, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    assert "their files differ" in refused(adapter, tmp_path / "merged", str(other))
    wider = save_model(tmp_path / "wider", hidden_size=32)
    named(adapter, base_model_name_or_path="org/gone")
    assert "size mismatch" in refused(adapter, tmp_path / "merged", str(wider))
    deeper = save_model(tmp_path / "shallow", num_layers=1)
    assert "no adapter of" in refused(adapter, tmp_path / "merged", str(deeper))
    assert "org/gone" in merge(adapter, tmp_path / "merged", str(other)).notes[0]


def test_the_hash_that_a_run_keeps_counts_more_than_names(adapter, tiny_model_folder, tmp_path):
    moved = shutil.copytree(tiny_model_folder, tmp_path / "moved")
    named(adapter, base_model_name_or_path="/gone/llama")
    marker = {"origin": {"model": model_hash(str(moved))}, "values": {}}
    (adapter.parent / "train.json").write_text(json.dumps(marker))
    assert merge(adapter, tmp_path / "merged", str(moved)).notes == ()
    (moved / "config.json").write_text((moved / "config.json").read_text() + "\n")
    assert "their files differ" in refused(adapter, tmp_path / "again", str(moved))


def test_a_base_that_was_on_the_hub_may_lie_in_a_folder_now(adapter, tiny_model_folder, tmp_path):
    moved = shutil.copytree(tiny_model_folder, tmp_path / "llama-1b")
    named(adapter, base_model_name_or_path="org/Llama-1B")
    (adapter.parent / "train.json").write_text(json.dumps({"origin": {"model": "of the name and its commit"}}))
    assert merge(adapter, tmp_path / "merged", str(moved)).notes == ()


def test_this_folder_and_a_link_are_folders_too(adapter, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merge(adapter, Path())
    assert (tmp_path / "here" / "model.safetensors").is_file()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    merge(adapter, tmp_path / "link")
    assert (tmp_path / "real" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_what_works_outside_of_the_layers_is_one_line(base, tmp_path, kind):
    assert f"is {kind}" in refused(save_kind(kind, tmp_path / "adapter"), tmp_path / "merged", str(base))


@pytest.mark.parametrize(
    ("family", "names"),
    [("gpt2", ("auto",)), ("phi3", ("auto",)), ("mixtral", ("q_proj", "experts.gate_up_proj", "experts.down_proj"))],
)
def test_layers_of_other_names_and_fused_experts_are_merged(tmp_path, family, names):
    save_family(family, tmp_path / "base")
    loaded = load(tmp_path / "base", "none")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.attach(Method(lora_dropout=0.0, target_modules=names), 0):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    loaded.save_adapter(tmp_path / "adapter")
    expected = logits(loaded.model)
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert not torch.allclose(logits(read(tmp_path / "base")), expected, atol=0.1)
    torch.testing.assert_close(logits(read(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)


def test_mistakes_are_one_line(adapter, tiny_model_folder, tmp_path):
    assert "no adapter_config.json" in refused(tmp_path, tmp_path / "merged")
    named(adapter, base_model_name_or_path="/gone/llama")
    assert "/gone/llama is not here" in refused(adapter, tmp_path / "merged")
    named(adapter, base_model_name_or_path=None)
    assert "names no base" in refused(adapter, tmp_path / "merged")
    named(adapter, task_type="SEQ_CLS")
    assert "SEQ_CLS" in refused(adapter, tmp_path / "merged", str(tiny_model_folder))
    named(adapter, task_type="CAUSAL_LM")
    quantized = shutil.copytree(tiny_model_folder, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    assert "quantized (bitsandbytes)" in refused(adapter, tmp_path / "merged", str(quantized))
    (quantized / "config.json").write_text("{")
    assert "config.json: cannot be read" in refused(adapter, tmp_path / "merged", str(quantized))


def test_what_cannot_be_merged_is_one_line(tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "llama")
    model = peft.get_peft_model(
        read(tmp_path / "llama"), peft.LoraConfig(lora_bias=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "adapter")
    assert "cannot be merged" in refused(tmp_path / "adapter", tmp_path / "merged", str(tmp_path / "llama"))


def test_the_folder_of_an_experiment_is_taken_for_its_adapter(adapter):
    assert adapter_in(adapter.parent) == adapter
    assert adapter_in(adapter) == adapter
