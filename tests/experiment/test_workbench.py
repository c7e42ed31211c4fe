"""What a worker keeps between experiments."""

from __future__ import annotations

import pytest
import torch

from raylora.config import load_config
from raylora.errors import BaseChangedError
from raylora.experiment.story import run_experiment
from raylora.experiment.workbench import Workbench
from raylora.planning.plan import make_plan
from tests.helpers.chunks import OPTIONS, write_dataset


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
        run_experiment(bench, experiment)
    assert plan.store.read_stage(experiment, "features") is None
    assert plan.store.read_row(experiment) is None
