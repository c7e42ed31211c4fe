"""Adapters of several experiments in one pass: drawn from those that wait, stored as if each had been trained alone."""

from __future__ import annotations

import pytest
import ray
import torch
from safetensors.torch import load_file

from raylora.config import load_config
from raylora.experiment.story import run_experiment
from raylora.experiment.together import train_together
from raylora.experiment.workbench import Workbench
from raylora.planning.plan import find_files, make_plan
from tests.helpers.chunks import OPTIONS, run, still, write_dataset


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
    assert train_together(other, [e for e in together.experiments if e.error] + good) == 4
    assert bench.loaded.logits_hash() == hash_before
    trained = [e for e in good if together.store.read_stage(e, "train")]
    assert trained == good[:4]
    for experiment in trained:
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
    for experiment in alone.experiments:
        run_experiment(bench, experiment)
        one, many = (weights_of(plan, experiment) for plan in (alone, together))
        for name in one:
            torch.testing.assert_close(many[name], one[name], atol=1e-4, rtol=0)
    first, second, _ = (weights_of(together, e) for e in together.experiments)
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.ci
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
