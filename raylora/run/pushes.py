"""Adapters, each with a card, to the Hugging Face hub, while the run goes on.

    python -m raylora.batch --chunk chunk_001 --push-to-hub ORG/NAME

A thread of the command pushes what has a good row; workers and GPUs have no part in it. A push that fails costs no
row, and the same command pushes what is missing: ``pushed.json`` in an experiment's folder says what is there.

Each dataset has a repository of its own, ``ORG/NAME-<dataset>``: what loads adapters from the hub (PEFT, vLLM, lm-eval)
takes a repository's name, and the hub's lists and cards are of repositories.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console

from raylora.errors import HubError, RayloraError, one_line
from raylora.experiment.workbench import at_hand
from raylora.model.sources import hub_model_of, name_of_folder, resolve_model
from raylora.planning.plan import Plan
from raylora.records import Experiment, ResultRow
from raylora.run.model_card import card_of, shared_config
from raylora.storage.damage import check_adapter_of_run
from raylora.storage.hub import MAX_NAME, push_files, repository_url

PATIENCE = 1800.0
"""Seconds that a run waits at its end for the next push to finish."""


def repositories(repository: str, experiments: Iterable[Experiment]) -> dict[str, str]:
    """The repository of each experiment, by its id: ``ORG/NAME-<dataset>``.

    The last eight digits of the id come behind it where the dataset's name had to be changed, or several experiments
    have it; capitals do not count.
    """
    experiments = list(experiments)
    slugs = {e.experiment_id: _slug(e.dataset) for e in experiments}
    counts = Counter(slug.lower() for slug in slugs.values())
    names: dict[str, str] = {}
    for e in experiments:
        slug, room = slugs[e.experiment_id], MAX_NAME - len(repository.partition("/")[2]) - 1
        if slug == e.dataset and counts[slug.lower()] == 1 and len(slug) <= room:
            names[e.experiment_id] = f"{repository}-{slug}"
            continue
        digits = e.experiment_id[-8:]
        names[e.experiment_id] = "-".join(filter(None, [repository, slug[: room - 9].rstrip("-."), digits]))
    return names


def _slug(dataset: str) -> str:
    """What the hub takes of a dataset's name: ASCII letters, digits, ``_``, single ``-`` and ``.`` within."""
    ascii_name = unicodedata.normalize("NFKD", dataset).encode("ascii", "ignore").decode()
    slug = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_name)))
    return re.sub(r"\.git$", "-git", slug.strip("-."), flags=re.IGNORECASE)


class Pushes:
    """The pushes of a run. Does nothing without ``--push-to-hub``."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan, self._console = plan, console
        self.failures: dict[str, str] = {}
        """By experiment id, why its adapter is not on the hub."""
        self.num_done = 0
        self._queue: queue.SimpleQueue[ResultRow | None] = queue.SimpleQueue()
        self._waiting: set[str] = set()
        self._given_up = ""
        self._thread = threading.Thread(target=self._work, daemon=True)
        if plan.config.hub_repository:
            self._experiments = {e.experiment_id: e for e in plan.experiments}
            self._names = repositories(plan.config.hub_repository, plan.experiments)
            self._thread.start()

    def push(self, row: ResultRow) -> None:
        """Queue a row's adapter; returns at once. Rows of failed experiments have none."""
        if self._plan.config.hub_repository and row.ok:
            self._waiting.add(row.values["experiment_id"])
            self._queue.put(row)

    def finish(self) -> None:
        """Wait for all that is queued, as long as pushes go on finishing; then say what is missing."""
        if not self._plan.config.hub_repository:
            return
        self._queue.put(None)
        num_waiting, since = len(self._waiting), time.monotonic()
        while self._thread.is_alive() and time.monotonic() - since < PATIENCE:
            self._thread.join(timeout=1)
            if len(self._waiting) < num_waiting:
                num_waiting, since = len(self._waiting), time.monotonic()
        self.failures |= dict.fromkeys(self._waiting - self.failures.keys(), "took too long")
        if self.failures:
            what = f"{len(self.failures)} of {len(self.failures) + self.num_done} adapters are not on the hub"
            self._console.print(f"Note: {what}: the same command again pushes them", soft_wrap=True)

    def _work(self) -> None:
        while (row := self._queue.get()) is not None:
            experiment = self._experiments[row.values["experiment_id"]]
            try:
                self._push(experiment, row)
                self.num_done += 1
            except (RayloraError, OSError, ValueError) as error:
                self._note(experiment, error)
            self._waiting.discard(experiment.experiment_id)

    def _note(self, experiment: Experiment, error: Exception) -> None:
        """Keep the cause of a failure, and print it; that of all pushes once."""
        text = str(error) if isinstance(error, HubError) else one_line(error)
        self.failures[experiment.experiment_id] = text
        if text == self._given_up:
            return
        if isinstance(error, HubError) and error.of_all:
            self._given_up = text
        self._console.print(f"Note: {experiment.dataset}: not pushed to the hub: {text}", soft_wrap=True)

    def _push(self, experiment: Experiment, row: ResultRow) -> None:
        """Push one adapter, unless it is there.

        Raises:
            HubError, OSError, ValueError: it could not be pushed.
        """
        plan, repository = self._plan, self._names[experiment.experiment_id]
        saved = plan.store.read_pushed(experiment) or {}
        # Where it is kept under another of the run's names, as of a run of fewer experiments, it stays there.
        is_there = str(saved.get("repository")).startswith(f"{plan.config.hub_repository}-")
        if is_there and saved.get("identity") == experiment.identity:
            return
        if self._given_up:
            raise HubError(self._given_up, of_all=True)
        source = resolve_model(plan.config.model)
        base, base_name = hub_model_of(plan.config.model, source), name_of_folder(plan.config.model, source)
        with at_hand(plan.store, experiment):
            folder = plan.store.adapter_folder(experiment)
            check_adapter_of_run(folder)
            # A list of what is pushed, so that nothing else that lies in the folder ever is.
            files: dict[str, bytes | Path] = {
                "README.md": card_of(row, base, base_name, plan.hashes["model"]).encode("utf-8"),
                "adapter_config.json": shared_config(folder / "adapter_config.json", base, base_name),
                "adapter_model.safetensors": folder / "adapter_model.safetensors",
            }
            commit = push_files(repository, files, f"{experiment.dataset}, by raylora", plan.config.push_public)
        plan.store.write_pushed(
            experiment, {"repository": repository, "commit": commit, "identity": experiment.identity}
        )
        self._console.print(f"{experiment.dataset}: {repository_url(repository)}", soft_wrap=True)


@contextlib.contextmanager
def pushing(pushes: Pushes, rows: Iterable[ResultRow]) -> Iterator[None]:
    """Give it ``rows``; more may be given inside. Its end waits for all of them, unless an exception ends it."""
    for row in rows:
        pushes.push(row)
    yield
    pushes.finish()
