"""What a worker does with its base model: run experiments, train adapters together, help with others' evaluations."""

from __future__ import annotations

from collections.abc import Sequence

from raylora.config.run import Config
from raylora.experiment.helping import help_experiment
from raylora.experiment.story import run_experiment
from raylora.experiment.together import ask_together, train_together
from raylora.experiment.workbench import Workbench
from raylora.records import Experiment, ProgressCallback, ResultRow, ignore_progress
from raylora.storage.store import Store


class ExperimentRunner:
    """Runs experiments one after another on one workbench; each method calls the function of the same purpose."""

    def __init__(self, config: Config, store: Store) -> None:
        self.bench = Workbench(config, store)

    def run(self, experiment: Experiment, progress: ProgressCallback = ignore_progress) -> ResultRow:
        return run_experiment(self.bench, experiment, progress)

    def train_together(self, experiments: Sequence[Experiment], progress: ProgressCallback = ignore_progress) -> int:
        """Train several adapters in the same passes, and ask them together where there are few questions."""
        num_trained = train_together(self.bench, experiments, progress)
        ask_together(self.bench, experiments)
        return num_trained

    def help(self, experiment: Experiment, name: str, progress: ProgressCallback = ignore_progress) -> int:
        return help_experiment(self.bench, experiment, name, progress)
