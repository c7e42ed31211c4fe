"""Workers that die, hang, raise or run out of memory: every experiment still gets its row."""

from __future__ import annotations

import pytest

from tests.helpers.fault_runs import DATASETS, assert_equal_rows, still

pytestmark = pytest.mark.timeout(900)
STAGES = ["begin", "load", "features", "probe", "train", "mmlu", "write", "half written"]


@pytest.mark.slow
def test_workers_killed_once_in_every_stage_change_no_row(shared_site, undisturbed):
    """Each stage of another experiment, all in one run."""
    others = (
        {"stage": stage, "what": "kill", "datasets": [name]} for stage, name in zip(STAGES, DATASETS, strict=False)
    )
    # The largest one is the first, for which its worker must load the model.
    shared_site.strike({"stage": "model", "what": "kill", "datasets": DATASETS[-1:]}, *others)
    check_kills(shared_site, undisturbed, len(STAGES) + 1)


@pytest.mark.slow
def test_a_worker_killed_while_it_scores_the_base_changes_no_row(shared_site, undisturbed):
    shared_site.strike({"stage": "base mmlu", "what": "kill"})
    check_kills(shared_site, undisturbed, 1)


def check_kills(site, undisturbed, num_kills: int) -> None:
    site.run()
    rows = site.rows()
    assert site.num_fired() == num_kills
    assert_equal_rows(rows, undisturbed)
    attempts = sorted(row["num_attempts"] for row in rows.values())
    print(f"{num_kills} workers killed, {len(rows)} rows, attempts {attempts}")
    assert sum(n - 1 for n in attempts) == num_kills


@pytest.mark.slow
def test_experiments_that_cannot_be_run_get_error_rows_and_cost_no_others(shared_site, undisturbed):
    bad = {DATASETS[1]: "kill", DATASETS[4]: "hang", DATASETS[6]: "raise", DATASETS[9]: "gpu memory"}
    shared_site.strike(*({"datasets": [d], "stage": "train", "what": what, "times": 99} for d, what in bad.items()))
    shown = shared_site.run(expect=1, timeout=20)
    rows = shared_site.rows()
    causes = {name: row["error"] for name, row in rows.items() if row["status"] == "error"}
    assert set(causes) == set(bad)
    for (name, cause), (text, kind) in zip(
        causes.items(),
        (
            ("worker process died", "worker_died"),
            ("--timeout 20 s", "timeout"),
            ("RuntimeError: something", "unknown"),
            ("OutOfMemoryError: CUDA out of memory", "out_of_memory"),
        ),
        strict=True,
    ):
        assert text in cause, (name, cause)
        assert rows[name]["error_kind"] == kind
        assert "\n" not in cause
        assert "tried 2 times" in cause
        assert rows[name]["num_attempts"] == 2
        assert f"FAILED {name}" in shown
    assert_equal_rows(rows, undisturbed, but=bad)
    shared_site.strike()
    shared_site.run("--retry-failed")
    assert_equal_rows(shared_site.rows(), undisturbed)


@pytest.mark.slow
def test_an_allocation_that_fails_makes_minibatches_smaller(shared_site, undisturbed):
    name = DATASETS[2]
    shared_site.strike({"datasets": [name], "stage": "minibatch", "what": "gpu memory", "times": 1000})
    shared_site.run()
    rows = shared_site.rows()
    row = rows[name]
    assert row["status"] == "ok"
    assert (row["num_oom_backoffs"], row["micro_batch_size"]) == (2, 1)
    assert row["num_attempts"] == 1
    # What is not drawn by dropout in another shape is the same but for float noise.
    for column in (
        "initial_loss",
        "base_model_perplexity",
        "semantic_diversity",
        "num_train_steps",
        "num_train_tokens",
    ):
        assert row[column] == pytest.approx(undisturbed[name][column], rel=1e-5)
    assert_equal_rows(rows, undisturbed, but=[name])


@pytest.mark.slow
def test_a_gpu_that_keeps_failing_is_quarantined_and_named(shared_site):
    """Experiments long enough that the bad GPU is given three of them before the good one has done all."""
    shared_site.strike({"stage": "train", "what": "raise", "gpu": "1", "times": 999})
    shown = shared_site.run(num_epochs=60)
    assert "GPU 1 of" in shown
    assert "is quarantined: 3 experiments failed there in a row; the last: RuntimeError: something went wrong" in shown
    rows = shared_site.rows()
    assert all(row["status"] == "ok" for row in rows.values())
    # One more may have begun there before the third had gone well elsewhere.
    assert sum(row["num_attempts"] == 2 for row in rows.values()) in (3, 4)


@pytest.mark.slow
def test_a_worker_that_takes_all_memory_is_ended_by_ray_and_its_experiment_tried_again(site, undisturbed):
    import psutil

    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + (5 << 30)) / memory.total
    site.environment["RAY_memory_usage_threshold"] = f"{threshold:.3f}"
    site.environment["RAY_memory_monitor_refresh_ms"] = "100"
    site.strike({"datasets": [DATASETS[5]], "stage": "train", "what": "host memory", "times": 1})
    site.run()
    rows = site.rows()
    assert site.num_fired() == 1
    assert rows[DATASETS[5]]["num_attempts"] == 2
    assert_equal_rows(rows, undisturbed)
    assert still(rows[DATASETS[5]]) == still(undisturbed[DATASETS[5]])
