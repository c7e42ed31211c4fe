"""Help with an evaluation that another process runs: ask some of its MMLU questions."""

from __future__ import annotations

from raylora.experiment.workbench import Workbench
from raylora.model.adapter_files import adapter_hash
from raylora.records import Experiment, ProgressCallback, digest, ignore_progress


def help_experiment(
    bench: Workbench, experiment: Experiment, name: str, progress: ProgressCallback = ignore_progress
) -> int:
    """Ask MMLU questions for the process that evaluates this experiment, or the base for it.

    That process asks from the first question on, helpers from the last one backwards.

    Args:
        name: this process's name; no two helpers of an evaluation have the same.

    Returns:
        The number of questions asked; 0 if neither evaluation is going on.

    Raises:
        MachineError: the questions or the model cannot be read here, or are not those of the run.
        BaseChangedError: see ``Workbench.check_base``.
    """
    for base_key in experiment.base_keys.values():
        base_path = bench.store.base_file(base_key, "scores.parquet")
        if bench.is_being_scored(base_key, base_path):
            bench.check_base()  # before answers of this process are in another's score
            with bench.loaded.base():
                return bench.help_score(base_key, base_key, base_path, name, progress)
    folder = bench.store.adapter_folder(experiment)
    if not folder.is_dir():
        return 0
    for question_set, base_key in experiment.base_keys.items():
        path = bench.store.scores_path(experiment, question_set)
        if bench.is_being_scored(key := score_key_of(bench, experiment, question_set), path):
            bench.check_base()
            bench.loaded.attach_saved(folder)
            try:
                return bench.help_score(base_key, key, path, name, progress)
            finally:
                bench.loaded.detach()
    return 0


def score_key_of(bench: Workbench, experiment: Experiment, question_set: str = "") -> str:
    """The identity of the score of the experiment's stored adapter: the base and the questions, and its weights.

    Args:
        question_set: its name; the first one's is empty.
    """
    adapter = adapter_hash(bench.store.adapter_folder(experiment))
    return digest([experiment.base_keys[question_set], adapter])
