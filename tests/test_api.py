"""The names that users of the research code know."""

from __future__ import annotations

import pytest

from raylora import api, evaluate_mmlu_with_model, rows
from raylora.errors import UserError
from tests.helpers.chunks import write_dataset


@pytest.mark.slow
@pytest.mark.ci
def test_run_experiment_and_process_folder(ray_with_gpus, options, tmp_path):
    path = write_dataset(tmp_path / "data" / "chunk_1", "data")
    more = {k: v for k, v in options.items() if k != "max_samples"}
    single = api.run_experiment(path, max_samples=20, **more)
    accuracy = single["results"]["finetuned_model"]["overall_accuracy"]
    assert 0 <= accuracy <= 1
    assert single["results"]["base_model"]["total_questions"] == 20
    (from_folder,) = api.process_folder("chunk_1", max_samples=20, **more)
    assert from_folder["results"] == single["results"]
    table = rows.load_results(tmp_path / "results" / "chunk_1")
    assert table["overall_accuracy"].item() == accuracy
    with pytest.raises(UserError):
        api.run_experiment(tmp_path / "missing.json", **more)


def test_fine_tuner(options, tmp_path):
    from peft import PeftModel

    path = write_dataset(tmp_path, "data")
    tuner = api.FineTuner(**options)
    dataset = tuner.prepare_context_dataset(path)
    model, tokenizer, lora = tuner.prepare_model()
    result = tuner.train(dataset, model, tokenizer, lora, output_dir=tmp_path / "adapter")
    metrics = result["training_metrics"]
    assert metrics["train_final_loss"] < metrics["train_initial_loss"]
    assert len(result["loss_curve"]) == metrics["num_train_steps"] == 8
    again = tuner.train(dataset, model, tokenizer, lora)
    assert again["training_metrics"]["train_final_loss"] == metrics["train_final_loss"]
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(options["model"])
    assert PeftModel.from_pretrained(base, tmp_path / "adapter").peft_config["default"].r == 16


def test_fine_tuner_goes_on_from_an_adapter(options, tmp_path):
    path = write_dataset(tmp_path, "data")
    tuner = api.FineTuner(**options, lora_variant="dora", target_modules="q_proj", rank_pattern="layers.1.*=2")
    dataset = tuner.prepare_context_dataset(path)
    first = tuner.train(dataset, *tuner.prepare_model(), output_dir=tmp_path / "first")["training_metrics"]
    again = api.FineTuner(**options, init_adapter=str(tmp_path / "first"))
    model, tokenizer, lora = again.prepare_model()
    assert (lora["lora_variant"], lora["target_modules"], lora["lora_r"]) == ("dora", ("q_proj",), 16)
    second = again.train(dataset, model, tokenizer, lora)["training_metrics"]
    assert second["num_trained_parameters"] == first["num_trained_parameters"]
    assert second["train_initial_loss"] < first["train_initial_loss"]
    with pytest.raises(UserError, match=r"--init pissa: .* give --quantization none"):
        api.FineTuner(**{**options, "quantization": "8bit"}, init="pissa").prepare_model()


def test_a_model_that_is_loaded_already_is_evaluated_as_it_is(tiny_model, tokenizer, question_file):
    found = evaluate_mmlu_with_model(tiny_model, tokenizer, question_file, batch_size=4, max_samples=6)
    assert found["total_questions"] == 6
    assert found["correct_questions"] == found["questions"]["correct"].sum()
    assert found["overall_accuracy"] == found["correct_questions"] / 6
