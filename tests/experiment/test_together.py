"""Adapters of several experiments in one pass: drawn from those that wait, stored as if each had been trained alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from raylora.config.run import load_config
from raylora.errors import BaseChangedError
from raylora.experiment.story import run_experiment
from raylora.experiment.together import ask_together, train_together
from raylora.experiment.workbench import Workbench
from raylora.mmlu.scoring import load_score
from raylora.planning.plan import find_files, make_plan
from raylora.work_counts import work_counts
from tests.helpers.chunks import OPTIONS, run, still, write_dataset
from tests.helpers.questions import LOGPROBS, as_dicts, questions_of_many_sizes


@pytest.fixture
def options(tmp_path, tiny_model_folder):
    folder = tmp_path / "data" / "chunk_1"
    for i in range(6):
        write_dataset(folder, f"data_{i}", offset=i, num=4 + 2 * i)
    return {**OPTIONS, "model": str(tiny_model_folder), "data_root": tmp_path / "data", "output": tmp_path / "out"}


def plan_of(options, **more):
    config = load_config(**{**options, "chunk": "chunk_1", **more})
    chunk, files = find_files(config)
    return make_plan(config, files, chunk)


def weights_of(plan, experiment) -> dict[str, torch.Tensor]:
    return load_file(plan.store.adapter_folder(experiment) / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.ci
def test_a_bench_trains_several_as_it_would_train_each(options, tmp_path):
    (tmp_path / "data" / "chunk_1" / "bad.json").write_text("[{")
    alone, together = plan_of(options), plan_of(options, output=tmp_path / "together", adapters_a_pass=4)
    bench = Workbench(alone.config, alone.store)
    hash_before = bench.loaded.logits_hash()
    good = [e for e in alone.experiments if not e.error]
    for experiment in good:
        run_experiment(bench, experiment)
    other = Workbench(together.config, together.store, bench.loaded)
    assert train_together(other, [e for e in together.experiments if e.error] + good) == 6
    assert bench.loaded.logits_hash() == hash_before
    assert not bench.loaded.peft_model.peft_config, "every adapter was detached"
    for experiment in good:
        one, many = (weights_of(plan, experiment) for plan in (alone, together))
        assert one.keys() == many.keys()
        for name in one:
            torch.testing.assert_close(many[name], one[name], atol=1e-4, rtol=0)
        values = together.store.read_stage(experiment, "train")
        assert values["num_adapters"] == 4
        row = run_experiment(other, experiment)
        assert row.ok
        assert row.values["num_train_steps"] == run_experiment(bench, experiment).values["num_train_steps"]


def test_the_seeds_of_a_dataset_share_passes(options, tmp_path):
    options = {**options, "repeats": 3, "limit": 1, "stages": ("train",)}
    alone = plan_of(options)
    together = plan_of(options, output=tmp_path / "together", adapters_a_pass=3)
    bench = Workbench(alone.config, alone.store)
    other = Workbench(together.config, together.store, bench.loaded)
    assert train_together(other, together.experiments) == 3
    assert "train: started" in (together.store.folder(together.experiments[2]) / "log.txt").read_text()
    for experiment in alone.experiments:
        run_experiment(bench, experiment)
        one, many = (weights_of(plan, experiment) for plan in (alone, together))
        for name in one:
            torch.testing.assert_close(many[name], one[name], atol=1e-4, rtol=0)
    first, second, _ = (weights_of(together, e) for e in together.experiments)
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_few_questions_are_asked_of_all_adapters_at_once(options):
    """Of the base too; each experiment's own run finds the answers, and they are those that it would get alone."""
    few = [q for q in questions_of_many_sizes() if len(q.choices) <= 4]
    (options["data_root"] / "many.json").write_text(json.dumps(as_dicts(few)))
    further = f"many={options['data_root'] / 'many.json'}"
    options = {**options, "stages": ("train", "mmlu"), "limit": 3, "questions": (further,)}
    alone = plan_of(options)
    together = plan_of(options, output=options["output"] / "together", adapters_a_pass=3, token_budget=100_000)
    bench = Workbench(alone.config, alone.store)
    other = Workbench(together.config, together.store, bench.loaded)
    assert train_together(other, together.experiments) == 3
    assert ask_together(other, together.experiments) == 8, "three adapters and the base, of two sets"
    assert not bench.loaded.peft_model.peft_config, "every adapter was detached"
    for one, many in zip(alone.experiments, together.experiments, strict=True):
        asked = work_counts.questions
        row = run_experiment(other, many).values
        assert work_counts.questions == asked, "asked again"
        assert row["overall_accuracy"] == run_experiment(bench, one).values["overall_accuracy"]
        for name in ("", "many"):
            paths = (together.store.scores_path(many, name), alone.store.scores_path(one, name))
            found, expected = (load_score(path).questions[LOGPROBS] for path in paths)
            np.testing.assert_allclose(found, expected, atol=1e-3)  # as their weights differ by 1e-4
    assert ask_together(other, together.experiments) == 0
    assert ask_together(bench, alone.experiments) == 0, "the questions of one fill its passes"


class Killed(Exception):
    pass


def test_what_is_done_when_a_worker_dies_stays_done(options):
    """Five adapters in two slots; the process ends once two are stored. What the base was is looked at for each."""
    plan = plan_of(options, stages=("train",), adapters_a_pass=2, limit=5)
    experiments = sorted(plan.experiments, key=lambda e: e.num_examples)

    class Bench(Workbench):
        num_checks = 0

        def check_base(self):
            super().check_base()
            self.num_checks += 1
            if self.num_checks == 3:
                raise Killed

    bench = Bench(plan.config, plan.store)
    with pytest.raises(Killed):
        train_together(bench, experiments)
    done = [plan.store.read_stage(e, "train") for e in experiments]
    assert [bool(values) for values in done].count(True) == 2
    assert all(values["num_adapters"] == 2 for values in done if values)
    assert not bench.loaded.peft_model.peft_config
    others = [e for e, values in zip(experiments, done, strict=True) if not values]
    assert train_together(Workbench(plan.config, plan.store, bench.loaded), others) == 3
    assert all(plan.store.read_stage(e, "train") for e in experiments)


def test_a_base_that_was_changed_leaves_no_product(options):
    plan = plan_of(options, stages=("train",), adapters_a_pass=2, limit=4)
    bench = Workbench(plan.config, plan.store)
    head = bench.loaded.model.get_output_embeddings()

    def harm(stage, done, total):
        with torch.no_grad():
            head.weight += 1

    with pytest.raises(BaseChangedError):
        train_together(bench, plan.experiments, harm)
    assert not any(plan.store.read_stage(e, "train") for e in plan.experiments)


@pytest.mark.slow
def test_a_run_fills_its_passes_from_the_queue_and_has_every_row(options):
    """Five datasets, two of them at a time over the same passes, on a machine without a GPU."""
    ray.init(num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        rows = run(options, adapters_a_pass=2, limit=5)
    finally:
        ray.shutdown()
    assert sorted(row["status"] for row in rows.values()) == ["ok"] * 5
    # 12, 10, 8, 6 and 4 steps in two slots: the third and the fourth are done in the same step, the last one is alone.
    assert sorted(row["num_adapters"] for row in rows.values()) == [1, 2, 2, 2, 2]
    logs = [path.read_text() for path in Path(options["output"]).rglob("log.txt")]
    assert len(logs) == 5
    assert all("train: done before" in log for log in logs)


@pytest.mark.slow
def test_a_run_that_shares_passes_has_every_row(options):
    ray.init(num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        together = run(options, adapters_a_pass=3)
        assert sorted(together) == [f"data_{i}" for i in range(6)]
        assert all(row["status"] == "ok" for row in together.values())
        assert max(row["num_adapters"] for row in together.values()) == 3
        alone = run(options, adapters_a_pass=1, fresh=True)
        for name, row in alone.items():
            assert together[name]["train_final_loss"] == pytest.approx(row["train_final_loss"], abs=1e-4)
            exact = ("num_train_steps", "num_train_tokens", "dataset_num_items", "feature_notes")
            assert {k: still(together[name])[k] for k in exact} == {k: still(row)[k] for k in exact}
    finally:
        ray.shutdown()
