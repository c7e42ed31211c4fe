"""The command on real Ray with logical GPUs: rows, faults, resume. The model is tiny; nothing else is."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from raylora import api, batch
from raylora.config import load_config
from raylora.experiment import Workbench
from raylora.plan import find_files, make_plan
from raylora.records import MachineError, UserError
from raylora.run import run_plan
from raylora.watch import make_console
from tests.tiny import make_model

NUM_RECORDS = 8
OPTIONS = {
    "quantization": "none", "mmlu": "demo", "max_samples": 20, "num_epochs": 2, "batch_size": 2, "max_length": 256,
    "gradient_accumulation": 1, "learning_rate": 5e-3, "sample_size": 6, "probe_steps": 3, "threads": 1,
}  # fmt: skip
MOVING = ("_seconds", "_per_second", "peak_memory_bytes", "num_attempts")
BAD_FILES = {
    "bad_bytes.json": b'[{"question": "\xff\xfe", "answer": "a"}]',
    "bad_cut.json": b'[{"question": "Q", "answer": "A"}, {"quest',
    "bad_deep.json": b"[" * 50_000,
    "bad_empty.json": b"",
    "bad_keys.json": b'[{"foo": "bar"}]',
    "bad_list.json": b"[]",
    "bad_number.json": b"42",
    "bad_records.jsonl": b'{"question": "", "answer": "a"}\n{"question": 3, "answer": "a"}\n',
    "bad_text.json": b"question,answer\n",
    "bad_turns.json": b'[{"messages": [{"role": "user", "content": "hello?"}]}]',
}


def write_dataset(folder: Path, name: str, offset: int = 0, num: int = NUM_RECORDS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"question": f"What is {i} and {offset}?", "answer": f"It is {i + offset}. That is all."} for i in range(num)
    ]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def ray_with_gpus():
    import ray

    ray.init(num_gpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture
def options(tmp_path, tiny_model_folder):
    return {**OPTIONS, "model": str(tiny_model_folder), "data_root": tmp_path / "data", "output": tmp_path / "results"}


def run(options, **more):
    """The rows of a run in this process's Ray, by dataset."""
    config = load_config(**{**options, "chunk": "chunk_1", **more})
    chunk, files = find_files(config)
    rows = run_plan(make_plan(config, files, chunk), make_console(quiet=True))
    assert len({row.values["experiment_id"] for row in rows}) == len(rows)
    return {row.values["dataset"]: row.values for row in rows}


def still(row):
    """A row without what every run has its own of."""
    return {k: v for k, v in row.items() if not k.endswith(MOVING)}


def command(options, *more: str) -> list[str]:
    words = [sys.executable, "-m", "raylora.batch", "--chunk", "chunk_1", *more]
    for key, value in options.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words


def test_one_good_file_and_ten_bad_ones_make_eleven_rows(ray_with_gpus, options, tmp_path):
    folder = tmp_path / "data" / "chunk_1"
    write_dataset(folder, "good")
    for name, content in BAD_FILES.items():
        (folder / name).write_bytes(content)
    rows = run(options)
    assert len(rows) == 11
    assert rows["good"]["status"] == "ok"
    for name in BAD_FILES:
        row = rows[Path(name).stem]
        assert row["status"] == "error"
        assert name in row["error"]
        assert "\n" not in row["error"]
    results = tmp_path / "results" / "chunk_1"
    for table in (pd.read_csv(results / "results.csv"), pd.read_parquet(results / "results.parquet")):
        assert len(table) == 11
        assert (table["status"] == "ok").sum() == 1
    (legacy,) = results.glob("batch_mmlu_results_chunk_1_*.json")
    report = json.loads(legacy.read_text())
    assert (report["folder_name"], report["total_files"], report["processed_files"]) == ("chunk_1", 11, 1)
    (good,) = [r for r in report["results"] if r["status"] == "ok"]
    assert good["results"]["finetuned_model"]["total_questions"] == 20
    assert good["results"]["base_model"]["overall_accuracy"] == rows["good"]["base_overall_accuracy"]
    assert good["training_info"]["training_metrics"]["train_final_loss"] == rows["good"]["train_final_loss"]
    manifest = json.loads((results / "run.json").read_text())
    assert manifest["versions"]["ray"]
    assert manifest["data_hashes"]["good"] == rows["good"]["data_hash"]
    assert not list(results.rglob(".partial-*"))


def test_a_row_is_in_the_tables_before_the_next_one_is_made(ray_with_gpus, options, tmp_path):
    for i in range(3):
        write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i)
    config = load_config(**options, chunk="chunk_1", num_workers=1)
    plan = make_plan(config, find_files(config)[1], "chunk_1")
    seen = []

    def look(rows):
        seen.append((len(rows), sum(1 for _ in plan.store.root.glob("experiments/*/result.json"))))

    run_plan(plan, make_console(quiet=True), look)
    assert (1, 1) in seen, "rows written to the tables, rows made"


def test_one_worker_and_four_make_the_same_rows_in_any_order(ray_with_gpus, options, tmp_path):
    for i in range(5):
        write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i)
    one = run(options, num_workers=1)
    four = run(options, num_workers=4, output=tmp_path / "other")
    assert len(one) == 5
    assert {k: still(v) for k, v in one.items()} == {k: still(v) for k, v in four.items()}
    assert len({v["train_final_loss"] for v in one.values()}) == 5
    assert len(list((tmp_path / "other").glob("chunk_1/base/*/scores.parquet"))) == 1, "the base is scored once a run"


@pytest.mark.slow
def test_done_experiments_are_skipped_and_half_done_ones_resumed(ray_with_gpus, options, tmp_path):
    for i in range(3):
        write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i)
    first = run(options)
    folders = {p.name.rpartition("-")[0]: p for p in (tmp_path / "results/chunk_1/experiments").iterdir()}
    (folders["data_1"] / "result.json").unlink()  # killed before its last write
    (folders["data_2"] / "result.json").unlink()  # killed in its last stage
    (folders["data_2"] / "mmlu.json").unlink()
    adapters = {k: (f / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns for k, f in folders.items()}
    second = run(options)
    assert {k: still(v) for k, v in first.items()} == {k: still(v) for k, v in second.items()}
    assert first["data_2"]["train_seconds"] == second["data_2"]["train_seconds"]
    after = {k: (f / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns for k, f in folders.items()}
    assert adapters == after
    write_dataset(tmp_path / "data" / "chunk_1", "data_0", offset=77)
    third = run(options)
    assert third["data_0"]["data_hash"] != first["data_0"]["data_hash"]
    assert third["data_0"]["train_final_loss"] != first["data_0"]["train_final_loss"]
    assert still(third["data_1"]) == still(first["data_1"])


@pytest.mark.slow
def test_a_grid_makes_a_row_for_every_combination(ray_with_gpus, options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    config = load_config(**options, chunk="chunk_1", grid={"lora_r": [2, 4], "num_epochs": [1, 2]})
    chunk, files = find_files(config)

    rows = run_plan(make_plan(config, files, chunk), make_console(quiet=True))
    assert {(r.values["lora_r"], r.values["num_epochs"]) for r in rows} == {(2, 1), (2, 2), (4, 1), (4, 2)}
    assert all(r.ok for r in rows)
    assert len({r.values["train_final_loss"] for r in rows}) == 4


@pytest.mark.slow
def test_a_worker_killed_midway_costs_no_row(ray_with_gpus, options, tmp_path):
    for i in range(4):
        write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i, num=24)
    expected = run(options)
    process = subprocess.Popen([*command({**options, "output": tmp_path / "killed"}, "--num-workers", "2")])
    try:
        for victim in wait_for_workers(process.pid, 2):
            victim.send_signal(signal.SIGKILL)
        assert process.wait(timeout=200) == 0
    finally:
        process.kill()
    table = pd.read_parquet(tmp_path / "killed" / "chunk_1" / "results.parquet")
    assert sorted(table["dataset"]) == sorted(expected)
    for row in table.to_dict("records"):
        assert row["train_final_loss"] == pytest.approx(expected[row["dataset"]]["train_final_loss"])
        assert row["overall_accuracy"] == expected[row["dataset"]]["overall_accuracy"]


def wait_for_workers(parent: int, num: int, timeout: float = 90) -> list[psutil.Process]:
    """The processes of the run that are at work on an experiment, as soon as there are ``num``."""
    deadline = time.time() + timeout
    while time.time() < deadline:
        at_work = []
        for process in psutil.Process(parent).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if re.match(r"ray::raylora-\w+-\d+: .* · ", "".join(process.cmdline())):
                    at_work.append(process)
        if len(at_work) >= num:
            return at_work
        time.sleep(0.05)
    raise AssertionError(f"{num} workers were not seen at work")


@pytest.mark.slow
def test_an_experiment_that_kills_or_hangs_its_worker_gets_an_error_row(ray_with_gpus, options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "slow", num=400)
    write_dataset(tmp_path / "data" / "chunk_1", "quick", num=2)
    rows = run(options, timeout=25.0, num_epochs=400, batch_size=1, stages=("train",))
    assert rows["slow"]["status"] == "error"
    assert "--timeout 25" in rows["slow"]["error"]
    assert rows["slow"]["num_attempts"] == 2
    assert rows["quick"]["status"] == "ok"


def test_the_whole_run_killed_midway_goes_on_where_it_was(options, tmp_path):
    for i in range(4):
        write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i)
    results = tmp_path / "results" / "chunk_1"
    process = subprocess.Popen(command(options), start_new_session=True)
    deadline = time.time() + 120
    while not list(results.glob("experiments/*/result.json")) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in results.glob("experiments/*/result.json")}
    assert 1 <= len(done) < 4
    again = subprocess.run(command(options), capture_output=True, text=True, check=False, timeout=200)
    assert again.returncode == 0, again.stdout + again.stderr
    table = pd.read_csv(results / "results.csv")
    assert sorted(table["dataset"]) == [f"data_{i}" for i in range(4)]
    assert (table["status"] == "ok").all()
    assert all(p.stat().st_mtime_ns == t for p, t in done.items()), "finished work was done again"
    assert not list(results.rglob(".partial-*"))
    third = subprocess.run(command(options), capture_output=True, text=True, check=False, timeout=100)
    assert third.returncode == 0
    assert "Ray dashboard" not in third.stdout, "nothing is left to do: Ray need not be started"


def test_dry_run_shows_sizes_and_what_is_done_and_starts_nothing(options, tmp_path, capsys):
    write_dataset(tmp_path / "data" / "chunk_1", "data_a")
    (tmp_path / "data" / "chunk_1" / "empty.json").touch()
    argv = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    assert batch.main(["--chunk", "1", "--dry-run", *argv]) == 0
    shown = capsys.readouterr().out
    assert "data_a" in shown
    assert "2 experiments, 0 done" in shown
    assert not (tmp_path / "results").exists()


def test_what_users_call_things_is_no_markup_and_a_name_that_is_no_text_is_one_row(
    options, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "400")
    folder = tmp_path / "data" / "chunk_1"
    write_dataset(folder, "data [red] [bold]")
    (folder / "bad.json").write_text('[{"messages": [{"role": "[/INST]", "content": "x"}]}]')
    (folder / os.fsdecode(b"lat\xe9n.json")).write_text("[]")
    argv = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    assert batch.main(["--chunk", "1", "--dry-run", *argv]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert "[red][bold]" in shown
    assert "[/INST]" in shown
    rows = run(options, stages=("features",), probe_steps=0)
    assert rows["lat\\xe9n"]["error"].endswith("its name is not UTF-8: rename it")
    assert rows["data [red] [bold]"]["status"] == "ok"


def test_salvage_costs_nothing_of_what_is_whole(options, tmp_path):
    """A mend that the error row itself names."""
    folder = tmp_path / "data" / "chunk_1"
    write_dataset(folder, "whole")
    text = json.dumps([{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(4)])
    (folder / "cut.json").write_text(text[:-20])
    options = {**options, "stages": ("train",)}
    before, after = plan_of(options), plan_of(options, salvage=True)
    assert before["whole"].origins == after["whole"].origins
    assert before["whole"].identity == after["whole"].identity
    assert "--salvage keeps the 3 complete records" in before["cut"].error
    assert not after["cut"].error


def plan_of(options, **more):
    config = load_config(**{**options, "chunk": "chunk_1", **more})
    chunk, files = find_files(config)
    return {e.dataset: e for e in make_plan(config, files, chunk).experiments}


def test_questions_or_a_model_that_change_during_a_run_leave_nothing(options, tmp_path, tiny_model_folder):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    questions, model = tmp_path / "questions.json", tmp_path / "model"
    right = [{"subject": "anatomy", "question": f"Q{i}", "choices": list("wxyz"), "answer": i % 4} for i in range(8)]
    questions.write_text(json.dumps(right))
    shutil.copytree(tiny_model_folder, model)
    options = {**options, "mmlu": str(questions), "model": str(model), "max_samples": None}
    config = load_config(**options, chunk="chunk_1", stages=("train", "mmlu"))
    chunk, files = find_files(config)
    plan = make_plan(config, files, chunk)
    (experiment,) = plan.experiments
    questions.write_text(json.dumps([{**q, "answer": 0} for q in right]))
    with plan.store.held(False), pytest.raises(MachineError, match="when the run began"):
        Workbench(config, plan.store).run(experiment)
    assert not list(plan.store.root.rglob("scores.parquet"))
    assert plan.store.read_row(experiment) is None
    questions.write_text(json.dumps(right))
    assert Workbench(config, plan.store).run(experiment).ok
    (tmp_path / "other").mkdir()
    make_model(seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", model)
    plan.store.forget_stage(experiment, "train")
    with pytest.raises(MachineError, match="model: not what it was when the run began"):
        Workbench(config, plan.store).run(experiment)


def test_files_that_somebody_took_away_or_cut_are_made_again(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    config = load_config(**options, chunk="chunk_1", stages=("train", "mmlu"))
    chunk, files = find_files(config)
    plan = make_plan(config, files, chunk)
    (experiment,) = plan.experiments
    first = Workbench(config, plan.store).run(experiment).values
    adapter = plan.store.adapter_folder(experiment)
    (base,) = plan.store.root.glob("base/*/scores.parquet")
    for harm in (
        (adapter / "adapter_model.safetensors").unlink,
        lambda: (adapter / "adapter_config.json").write_text(""),
        lambda: base.write_bytes(b""),
        lambda: base.with_name("questions.parquet").write_bytes(base.read_bytes()[:100]),
    ):
        harm()
        plan.store.forget_stage(experiment, "mmlu")
        again = Workbench(config, plan.store).run(experiment).values
        assert again["status"] == "ok"
        for name in ("overall_accuracy", "base_overall_accuracy", "train_final_loss"):
            assert again[name] == pytest.approx(first[name], rel=1e-4)


@pytest.mark.slow
def test_a_failed_experiment_is_tried_again_only_when_asked(ray_with_gpus, options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    assert run(options, timeout=0.01)["data"]["status"] == "error"
    assert run(options)["data"]["status"] == "error"
    assert run(options, retry_failed=True)["data"]["status"] == "ok"


@pytest.mark.slow
def test_stages_are_reused_by_later_runs_that_want_more(ray_with_gpus, options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    early = run(options, stages=("mmlu",))["data"]
    assert "add train to --stages" in early["error"]
    only_train = run(options, stages=("train",))["data"]
    assert only_train["overall_accuracy"] is None
    both = run(options, stages=("train", "mmlu"))["data"]
    assert both["train_seconds"] == only_train["train_seconds"]
    assert both["overall_accuracy"] is not None
    assert both["semantic_diversity"] is None


def test_at_a_terminal_the_chunks_are_listed_and_one_is_asked_for(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_3", "data_of_three")
    write_dataset(tmp_path / "data" / "chunk_20", "data_of_twenty")
    words = [sys.executable, "-m", "raylora.batch", "--dry-run"]
    for key, value in options.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    terminal, inside = pty.openpty()
    process = subprocess.Popen(words, stdin=inside, stdout=inside, stderr=inside, env={**os.environ, "COLUMNS": "200"})
    os.close(inside)
    os.write(terminal, b"2\n")
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 1000)
        except OSError:  # the other end is closed
            break
    assert process.wait(timeout=60) == 0, shown
    assert b"1  chunk_3" in shown
    assert b"2  chunk_20" in shown
    assert b"data_of_twenty" in shown
    assert b"data_of_three" not in shown


def test_without_a_chunk_or_a_model_one_line_says_what_there_is(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_7", "data")
    with pytest.raises(UserError, match=r"--chunk: name one of .*chunk_7"):
        find_files(load_config(**options))
    config = load_config(**{**options, "model": ""}, chunk="chunk_7")
    with pytest.raises(UserError, match="MODEL_NAME"):
        make_plan(config, find_files(config)[1], "chunk_7")
    config = load_config(**{**options, "mmlu": None}, chunk="chunk_7")
    with pytest.raises(UserError, match="--mmlu FILE"):
        make_plan(config, find_files(config)[1], "chunk_7")


def test_names_never_leave_the_output_folder_nor_collide(ray_with_gpus, options, tmp_path):
    folder = tmp_path / "data" / "chunk_1"
    names = ["a..%2fup", "ä", "a", "a b", "a_b", "новый", "x" * 200, "line\nbreak", "-rf", "con"]
    for name in names:
        write_dataset(folder, name, num=2)
    (folder / "a.jsonl").write_text('{"question": "Q", "answer": "A"}\n{"question": "Q2", "answer": "A"}\n')
    config = load_config(**options, chunk="chunk_1")
    plan = make_plan(config, find_files(config)[1], "chunk_1")
    ids = [e.experiment_id for e in plan.experiments]
    assert len(set(ids)) == len(names) + 1
    for experiment in plan.experiments:
        assert plan.store.folder(experiment).resolve().parent == (tmp_path / "results/chunk_1/experiments").resolve()
        assert experiment.experiment_id.isascii()


# The names that users of the research code know


def test_run_experiment_and_process_folder(ray_with_gpus, options, tmp_path):
    path = write_dataset(tmp_path / "data" / "chunk_1", "data")
    more = {k: v for k, v in options.items() if k != "max_samples"}
    single = api.run_experiment(path, max_samples=20, **more)
    accuracy = single["results"]["finetuned_model"]["overall_accuracy"]
    assert 0 <= accuracy <= 1
    assert single["results"]["base_model"]["total_questions"] == 20
    (from_folder,) = api.process_folder("chunk_1", max_samples=20, **more)
    assert from_folder["results"] == single["results"]
    table = api.load_results(tmp_path / "results" / "chunk_1")
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
