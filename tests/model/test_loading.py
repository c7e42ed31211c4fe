"""Model folders that cannot be loaded, and models that somebody else has loaded."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raylora.api import evaluate_mmlu_with_model
from raylora.config.method import Method
from raylora.config.run import load_config
from raylora.errors import UserError
from raylora.model.loading import as_loaded, borrowed, uses_llm_int8
from raylora.planning.plan import make_plan
from tests.helpers.chunks import write_dataset
from tests.helpers.tiny import load, make_tokenizer


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


def load_by_oneself(folder, **quantization):
    config = BitsAndBytesConfig(**quantization)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


def logits_of(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 35).reshape(2, 16)).logits


def test_a_model_that_somebody_loaded_with_llm_int8_computes_with_it_and_says_so(
    outlier_model_folder, tokenizer, question_file, caplog
):
    model = load_by_oneself(outlier_model_folder, load_in_8bit=True)
    before = logits_of(model)
    classes = [type(module) for module in model.modules()]
    with borrowed(model, tokenizer) as loaded:
        assert loaded.quantization == "8bit"
        assert torch.equal(logits_of(loaded.model), before)
        loaded.attach(Method(), 0)
    assert caplog.text.count("computes with LLM.int8") == 1
    assert torch.equal(logits_of(model), before)
    assert [type(module) for module in model.modules()] == classes
    evaluate_mmlu_with_model(model, tokenizer, question_file)
    assert caplog.text.count("computes with LLM.int8") == 2
    assert torch.equal(logits_of(model), before)


def test_one_of_raylora_is_weight_only_wherever_it_is_given(outlier_model_folder, tokenizer, question_file, caplog):
    loaded = load(outlier_model_folder, "8bit")
    assert not uses_llm_int8(loaded.model)
    assert as_loaded(loaded.model, tokenizer) is loaded
    evaluate_mmlu_with_model(loaded.model, tokenizer, question_file)
    assert "LLM.int8" not in caplog.text
    assert uses_llm_int8(load(outlier_model_folder, "8bit", int8_activations=True).model)


def test_weights_that_are_stored_in_8_bits_are_weight_only_too(outlier_model_folder, tmp_path):
    """Whatever ``--quantization`` says: transformers loads them as they are stored."""
    loaded = load(outlier_model_folder, "8bit")
    expected = logits_of(loaded.model)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    for quantization in ("8bit", "none"):
        again = load(tmp_path, quantization)
        assert not uses_llm_int8(again.model)
        assert torch.equal(logits_of(again.model), expected)


def test_what_bitsandbytes_may_repack_is_what_it_was(outlier_model_folder, tokenizer):
    model = load_by_oneself(outlier_model_folder, load_in_4bit=True)
    layer = model.model.layers[0].mlp.up_proj
    for may_repack in (True, False):
        layer.support_avx512bf16_for_cpu = may_repack
        with borrowed(model, tokenizer):
            assert not layer.support_avx512bf16_for_cpu
        assert layer.support_avx512bf16_for_cpu == may_repack


def test_a_tokenizer_that_knows_more_than_the_embeddings_is_one_line_before_anything_runs(tmp_path, tiny_model_folder):
    folder = tmp_path / "beyond"
    shutil.copytree(tiny_model_folder, folder)
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.add_tokens(["<extra>", "plants"])
    tokenizer.save_pretrained(folder)
    num_rows = len(make_tokenizer())
    expected = rf"knows token {num_rows + 1} \('plants'\), its embeddings have {num_rows} rows: resize"
    with pytest.raises(UserError, match=expected):
        load(folder, "none")
    config = load_config(model=str(folder), quantization="none", stages=("train",))
    with pytest.raises(UserError, match=expected):
        make_plan(config, [write_dataset(tmp_path, "data_a")], "single")
