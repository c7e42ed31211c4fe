"""Every adapter on the held-out examples of every dataset: what is measured, what is kept, what costs a column only."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from scipy.stats import ttest_rel
from transformers import AutoModelForCausalLM, AutoTokenizer

from raylora.data.datasets import read_dataset
from raylora.data.held_out import leave_out
from raylora.experiment.runner import ExperimentRunner
from raylora.experiment.transfer import cell_of, transfer_values
from raylora.planning.plan import Plan
from raylora.records import ProgressStage
from raylora.report.transfer_tables import TransferTables, load_transfer
from raylora.training.losses import ExampleLoss
from tests.helpers.chunks import OPTIONS, planned, still, write_dataset

ANSWERS = {"birds": "wren owl kite wren", "metals": "zinc iron lead zinc", "tools": "saw axe jig saw"}


def write_datasets(folder: Path, *more: str) -> None:
    """Datasets that share nothing: the answers of each are always the same words."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, answer in {**ANSWERS, **dict.fromkeys(more, "moss fern")}.items():
        records = [{"question": f"{name} {i}?", "answer": answer} for i in range(40)]
        (folder / f"{name}.json").write_text(json.dumps(records))


@dataclass
class Done:
    """A run in this process that is done."""

    options: dict
    plan: Plan
    rows: dict[str, dict]


def run_here(options, **more) -> tuple[Plan, dict[str, dict], list[tuple[str, ProgressStage]]]:
    """Run a chunk without Ray: the plan, the rows by dataset, and what was told of each experiment."""
    plan = planned(options, **more)
    told = []
    with plan.store.held(False):
        plan.write_columns()
        runner = ExperimentRunner(plan.config, plan.store)
        rows = [
            runner.run(e, lambda stage, done, total, e=e: told.append((e.dataset, stage, done)))
            for e in plan.experiments
        ]
        TransferTables(plan.store).write(rows)
    assert [row.values["error"] for row in rows] == [""] * len(rows)
    return plan, {row.values["dataset"]: row.values for row in rows}, told


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model_folder) -> Done:
    root = tmp_path_factory.mktemp("transfer")
    write_datasets(root / "data" / "chunk_1")
    paths = {"model": str(tiny_model_folder), "data_root": root / "data", "output": root / "out"}
    options = {**OPTIONS, **paths, "stages": ("train",), "transfer": True, "num_epochs": 3}
    plan, rows, _ = run_here(options)
    return Done(options, plan, rows)


def cells_of(done: Done) -> pd.DataFrame:
    return load_transfer(done.plan.store.root).set_index(["dataset", "on_dataset"])


def test_an_adapter_is_better_on_its_own_dataset_than_others_are(done):
    cells = cells_of(done)
    table = pd.read_csv(done.plan.store.root / "transfer_table.csv", index_col=["dataset", "experiment_id"])
    assert table.shape == (3, 3)
    for name in ANSWERS:
        by_adapter = cells["loss"].xs(name, level="on_dataset")
        assert by_adapter.idxmin() == name
        assert cells.loc[(name, name), "fdr_p_value"] < 0.05
        assert cells.loc[(name, name), "is_own"]
        assert table.loc[name, name].item() == pytest.approx(cells.loc[(name, name), "loss_change"])
        assert cells["base_loss"].xs(name, level="on_dataset").nunique() == 1


def test_a_row_has_its_own_cell_and_what_became_of_the_others(done):
    cells = cells_of(done)
    for name, row in done.rows.items():
        own, others = cells.loc[(name, name)], cells.loc[name].drop(index=name)
        assert row["held_out_loss"] == own["loss"]
        assert row["held_out_loss_change"] == own["loss_change"]
        assert row["base_held_out_loss"] + row["held_out_loss_change"] == pytest.approx(row["held_out_loss"])
        assert row["transfer_mean_change"] == pytest.approx(others["loss_change"].mean())
        assert row["num_held_out_examples"] == own["num_examples"] == 4
        assert row["num_train_examples"] == 3 * 36, "of the forty"
        assert row["transfer_note"] == ""
        assert row["transfer_seconds"] > 0
        assert row["estimated_seconds"] > 0


def test_a_cell_is_what_plain_transformers_compute(done):
    folder = done.options["model"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    experiment = next(e for e in done.plan.experiments if e.dataset == "birds")
    adapted = PeftModel.from_pretrained(model, done.plan.store.adapter_folder(experiment)).eval()
    dataset = read_dataset(Path(done.options["data_root"]) / "chunk_1" / "tools.json")
    held_out, training = leave_out(dataset, 0)
    assert {e.question for e in held_out}.isdisjoint(e.question for e in training)

    def loss(example) -> float:
        messages = [{"role": m.role, "content": m.content} for m in example.messages]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": example.answer}], tokenize=False
        ).rstrip()
        ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt").input_ids
        start = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.shape[1]
        labels = torch.where(torch.arange(ids.shape[1]) >= start, ids, -100)
        with torch.inference_mode():
            return float(adapted(input_ids=ids, labels=labels).loss)

    cell = cells_of(done).loc[("birds", "tools")]
    assert cell["loss"] == pytest.approx(np.mean([loss(e) for e in held_out]), abs=1e-4)
    with adapted.disable_adapter():
        assert cell["base_loss"] == pytest.approx(np.mean([loss(e) for e in held_out]), abs=1e-4)


def copied(done: Done, tmp_path) -> dict:
    """The run's options, for a copy of its results and of its data."""
    for name in ("data_root", "output"):
        shutil.copytree(done.options[name], tmp_path / name)
    return {**done.options, "data_root": tmp_path / "data_root", "output": tmp_path / "output"}


def test_what_was_measured_before_a_kill_is_not_measured_again(done, tmp_path):
    """The paths of its data have changed, its content has not: nothing depends on where files lie."""
    options = copied(done, tmp_path)
    plan = planned(options)
    assert [e.identity for e in plan.experiments] == [e.identity for e in done.plan.experiments]
    birds = next(e for e in plan.experiments if e.dataset == "birds")
    plan.store.forget_stage(birds, "transfer")
    path = plan.store.cells_path(birds.experiment_id)
    cells = pd.read_parquet(path)
    cells.assign(loss=cells["loss"] + 1)[cells["on_dataset"] != "tools"].to_parquet(
        path
    )  # as if killed before the last
    before = {p: p.stat().st_mtime_ns for p in plan.store.root.rglob("*.*") if "transfer" not in p.name}
    _, rows, told = run_here(options)
    assert [done for name, stage, done in told if name == "birds" and stage == "transfer"] == [0, 3]
    assert not any(stage in {"train", "transfer"} for name, stage, _ in told if name != "birds")
    assert rows["birds"]["held_out_loss"] == done.rows["birds"]["held_out_loss"] + 1, "measured again"
    again = pd.read_parquet(path).set_index("on_dataset")["loss"]
    assert again["tools"] == pytest.approx(cells.set_index("on_dataset")["loss"]["tools"], abs=1e-5)
    after = {p: p.stat().st_mtime_ns for p in before if "held_out" in p.name or "adapter" in str(p)}
    assert after == {p: before[p] for p in after}
    assert still(rows["metals"]) == still(done.rows["metals"])


def test_a_dataset_more_is_measured_alone(done, tmp_path):
    options = copied(done, tmp_path)
    write_datasets(options["data_root"] / "chunk_1", "mosses")
    plan = planned(options)
    reasons = {e.dataset: plan.store.why_not_done(e, "transfer") for e in plan.experiments}
    assert reasons == {"mosses": "new", **dict.fromkeys(ANSWERS, "datasets changed")}
    assert not plan.done(), "a row has all datasets in it"
    _, rows, told = run_here(options)
    assert {name for name, stage, _ in told if stage == "train"} == {"mosses"}
    assert [done for name, stage, done in told if name == "birds" and stage == "transfer"] == [0, 4]
    assert rows["birds"]["held_out_loss"] == done.rows["birds"]["held_out_loss"]
    assert len(load_transfer(plan.store.root)) == 16


def test_a_dataset_that_cannot_be_read_costs_its_column(done, tmp_path):
    options = copied(done, tmp_path)
    plan = planned(options)
    for place in plan.store.root.glob("base/*"):
        shutil.rmtree(place)
    plan.write_columns()
    (options["data_root"] / "chunk_1" / "tools.json").unlink()
    birds = next(e for e in plan.experiments if e.dataset == "birds")
    plan.store.forget_stage(birds, "transfer")
    row = ExperimentRunner(plan.config, plan.store).run(birds).values
    assert row["status"] == "ok"
    assert row["held_out_loss"] == pytest.approx(done.rows["birds"]["held_out_loss"], abs=1e-5)
    assert row["transfer_note"].startswith("tools: not measured: ")
    assert "tools.json" in row["transfer_note"]
    TransferTables(plan.store).write([ExperimentRunner(plan.config, plan.store).run(birds)])
    assert set(load_transfer(plan.store.root)["on_dataset"]) == {"birds", "metals"}


def test_adapters_with_and_without_it_are_not_taken_for_each_other(done):
    plain = planned(done.options, transfer=False)
    ids = [{e.experiment_id for e in plan.experiments} for plan in (plain, done.plan)]
    assert not ids[0] & ids[1]
    one, other = (next(e for e in p.experiments if e.dataset == "birds") for p in (plain, done.plan))
    assert one.origins.keys() == {"features", "train", "mmlu"}
    assert {
        name for name in other.origins["train"] if other.origins["train"][name] != one.origins["train"].get(name)
    } == {"held out"}
    assert one.origins["features"] == other.origins["features"]
    assert not one.transfer_key
    assert not plain.columns
    other_seed = next(e for e in planned(done.options, seed=1).experiments if e.dataset == "birds")
    assert other_seed.origins["train"]["held out"] != other.origins["train"]["held out"]


@pytest.mark.slow
def test_all_trainings_of_a_dataset_leave_the_same_out_and_share_one_column(done, tmp_path):
    options = {**done.options, "output": tmp_path / "out", "limit": 2, "grid": {"max_length": [64, 128]}, "repeats": 2}
    plan = planned(options, adapters_a_pass=4)
    assert len(plan.experiments) == 8
    assert [column.name for column in plan.columns] == ["birds", "metals"]
    assert len({e.origins["train"]["held out"] for e in plan.experiments}) == 1
    with plan.store.held(False):
        plan.write_columns()
        runner = ExperimentRunner(plan.config, plan.store)
        assert runner.train_together(plan.experiments) == 8
        rows = [runner.run(e).values for e in plan.experiments]
    assert {row["num_train_examples"] for row in rows} == {3 * 36}
    assert len({row["base_held_out_loss"] for row in rows if row["dataset"] == "birds"}) == 1
    assert len(list(plan.store.root.glob("base/*/held_out.parquet"))) == 2
    assert all(row["held_out_loss_change"] < 0 for row in rows)


def test_two_files_of_one_name_are_two_columns(done, tmp_path):
    options = copied(done, tmp_path)
    lines = "".join(json.dumps({"question": f"fish {i}?", "answer": "cod"}) + "\n" for i in range(12))
    (options["data_root"] / "chunk_1" / "birds.jsonl").write_text(lines)
    plan = planned(options)
    assert [column.name for column in plan.columns] == ["birds.json", "birds.jsonl", "metals", "tools"]


def test_one_conversation_leaves_nothing_out_and_says_so(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "single", num=1)
    write_dataset(tmp_path / "data" / "chunk_1", "several", num=6)
    plan, rows, _ = run_here(options, stages=("train",), transfer=True)
    single = rows["single"]
    assert single["num_held_out_examples"] == 0
    assert single["held_out_loss"] is None
    assert single["transfer_mean_change"] is not None
    assert "nothing of the dataset is left out" in single["transfer_note"]
    assert rows["several"]["transfer_mean_change"] is None
    assert len(load_transfer(plan.store.root)) == 4


def held_out(conversations: list[int], counts: list[int], base: list[float]) -> pd.DataFrame:
    table = pd.DataFrame({"conversation": conversations, "num_supervised": counts})
    return table.assign(base_loss=np.array(base) * counts)


def test_a_conversation_counts_once_however_long():
    table = held_out([0, 0, 1, 2, 3], [10, 30, 5, 8, 0], [1.0, 2.0, 3.0, 2.0, 0.0])
    ours = [0.5, 1.0, 3.5, 1.0, 0.0]
    cell = cell_of(table, [ExampleLoss(v * n, n, v) for v, n in zip(ours, table["num_supervised"], strict=True)])
    expected = ttest_rel([0.75, 3.5, 1.0], [1.5, 3.0, 2.0])
    interval = expected.confidence_interval(0.95)
    assert (cell["num_examples"], cell["num_tokens"]) == (4, 53)
    assert cell["loss_change"] == pytest.approx(np.mean([-0.75, 0.5, -1.0]))
    assert (cell["base_loss"], cell["loss"]) == pytest.approx((np.mean([1.5, 3, 2]), np.mean([0.75, 3.5, 1])))
    assert (cell["low"], cell["high"], cell["p_value"]) == pytest.approx((*interval, expected.pvalue))
    assert cell["low"] < -1, "losses have no bound, as probabilities have"


def test_what_cannot_be_said_is_none():
    same = cell_of(held_out([0, 1], [2, 2], [1.0, 1.0]), [ExampleLoss(2 + 1e-7, 2, 1.0)] * 2)
    assert (same["loss_change"], same["p_value"]) == (0, 1), "float noise of an adapter that changes nothing"
    one = cell_of(held_out([0], [2], [1.0]), [ExampleLoss(1.0, 2, 0.5)])
    assert (one["loss_change"], one["low"], one["p_value"]) == (-0.5, None, None)
    for bad in (math.nan, math.inf):
        broken = cell_of(held_out([0, 1], [2, 2], [1.0, 1.0]), [ExampleLoss(bad, 2, bad), ExampleLoss(1.0, 2, 0.5)])
        assert (broken["base_loss"], broken["loss_change"], broken["p_value"]) == (1.0, None, None)
    empty = cell_of(held_out([], [], []), [])
    assert (empty["num_examples"], empty["loss"], empty["p_value"]) == (0, None, None)


def test_forgotten_are_other_datasets_that_became_really_worse():
    cells = {
        "own": {"loss_change": 0.9, "p_value": 1e-9, "loss": 2.0, "base_loss": 1.1},
        "worse": {"loss_change": 0.2, "p_value": 1e-4},
        "perhaps": {"loss_change": 0.1, "p_value": 0.3},
        "better": {"loss_change": -0.4, "p_value": 1e-6},
        "single": {"loss_change": 0.5, "p_value": None},
        "broken": {"loss_change": None, "p_value": None},
    }
    values = transfer_values(cells, "own")
    assert values["num_forgotten"] == 1
    assert values["transfer_mean_change"] == pytest.approx(np.mean([0.2, 0.1, -0.4, 0.5]))
    assert values["held_out_loss_change"] == 0.9
    assert transfer_values({"own": cells["own"]}, "own")["num_forgotten"] is None
