"""The names that users of the research code know."""

from __future__ import annotations

import subprocess
import sys

import pytest

import raylora
from raylora import api, evaluate_mmlu_with_model, rows
from raylora.errors import OutOfMemoryError, RayloraError, UserError
from tests.helpers import ROOT
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


def test_every_public_name_is_listed_and_there():
    assert set(raylora.__all__) <= set(dir(raylora))
    assert "__version__" in dir(raylora)
    assert all(callable(getattr(raylora, name)) for name in raylora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'proces_folder'") as caught:
        raylora.proces_folder  # noqa: B018
    assert caught.value.name == "proces_folder"


def test_results_are_loaded_without_torch(forty):
    code = "import sys, raylora; raylora.load_results(sys.argv[1]); print({'torch', 'ray', 'sklearn'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code, str(forty)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "set()\n"


def test_what_fails_is_an_error_of_raylora(options, tmp_path, monkeypatch):
    tuner = api.FineTuner(**options)
    assert "no model is loaded yet" in repr(tuner)
    dataset = tuner.prepare_context_dataset(write_dataset(tmp_path, "data"))
    assert "num_items=8" in repr(dataset)
    assert "What is" not in repr(dataset)
    model, tokenizer, lora = tuner.prepare_model()
    with pytest.raises(UserError, match="--lora-r: input should be greater than or equal to 1, got '0'"):
        tuner.train(dataset, model, tokenizer, {**lora, "lora_r": 0})

    def full(*_):
        raise MemoryError("out of memory")

    monkeypatch.setattr(api, "train_adapter", full)
    with pytest.raises(OutOfMemoryError, match="lower max_length"):
        tuner.train(dataset, model, tokenizer, lora)
    assert issubclass(OutOfMemoryError, RayloraError)


USER_FILE = """\
import raylora

run = raylora.run("folder", model="demo", lora_r=8, target_modules=["q_proj"], quantization="none")
reveal_type(run.table)
reveal_type(run.report)
raylora.process_folder("chunk_001", max_samples=10, lora_rank=8)
raylora.run("folder", num_epochs="three")
raylora.proces_folder("chunk_001")
"""


@pytest.mark.slow
def test_a_type_checker_knows_the_options_and_the_results(tmp_path):
    (tmp_path / "user.py").write_text(USER_FILE)
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *config, str(tmp_path / "user.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=500)
    lines = [line.partition("user.py:")[2] for line in done.stdout.splitlines() if "user.py:" in line]
    assert [line.partition(":")[0] for line in lines if " note: " not in line] == ["6", "7", "8"], done.stdout
    assert "DataFrame" in done.stdout
    assert "pathlib.Path" in done.stdout
    assert 'Unexpected keyword argument "lora_rank" for "process_folder"' in done.stdout
