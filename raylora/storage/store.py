"""The run's folder: names, atomic writes, what is done, the tables.

What makes work durable is here, not in the scheduler. Each experiment has a folder; each stage's product is written
under a temporary name and renamed, together with the key of everything it came from; ``result.json`` comes last. A
product whose key does not match is made anew.

    results/<chunk>/
      results.csv  results.parquet  run.json  batch_mmlu_results_<chunk>_<time>.json
      base/<key>/scores.parquet                the base's answers, shared by all experiments
      experiments/<experiment_id>/
        result.json  features.json  train.json  adapter/  loss_curve.csv  mmlu.json  scores.parquet  log.txt

``remote_store.py`` keeps the same on an object store.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from raylora.errors import UserError
from raylora.records import Experiment, ResultRow, digest
from raylora.storage.atomic import PARTIAL, read_json, to_json, write_atomically, write_text
from raylora.storage.tables import rows_to_table

LOG = "log.txt"
ROW = "result.json"
PRODUCTS = {"features": (), "train": ("loss_curve.csv", "adapter"), "mmlu": ("scores.parquet",)}
"""What lies beside a stage's JSON file."""
FILES_OF = {"adapter": ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")}
"""What a product that is a folder cannot do without."""


def safe_name(name: str, *identity: Any) -> str:
    """A folder name from a user's: ASCII letters, digits, ``_``, ``-`` and ``.``, at most 80, and 12 digits of a hash.

    The hash is over the whole name and ``identity``, so that names which look alike do not collide.
    """
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", ascii_name).strip("_-")[:67] or "dataset"
    return f"{slug}-{digest([name, *identity], 12)}"


class Store:
    """The folder of one chunk's results. Plain paths inside, so that it travels to workers.

    ``root`` is where files are made; ``place`` is where people find them, which is the same on a file system.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.place = self.root

    def open(self, fresh: bool) -> None:
        """Make the folder, throw away what a killed run left half-written, and with ``fresh`` everything.

        Raises:
            UserError: it cannot be written to.
        """
        try:
            if fresh:
                for name in ("experiments", "base"):
                    shutil.rmtree(self.root / name, ignore_errors=True)
            self.root.mkdir(parents=True, exist_ok=True)
            self._sweep()
            write_text(self.root / ".writable", "")
            (self.root / ".writable").unlink()
        except OSError as error:
            raise UserError(f"--output {self.place}: cannot be written to: {error.strerror}") from error

    @contextlib.contextmanager
    def held(self, fresh: bool) -> Iterator[None]:
        """Open the folder and keep other runs out of it until the end. It is free again when this process dies.

        Raises:
            UserError: another run holds it, or it cannot be written to.
        """
        lock, owner = FileLock(self.root / "run.lock"), self.root / "run.owner"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            who = owner.read_text(encoding="utf-8").strip() if owner.is_file() else "unknown"
            raise UserError(
                f"--output {self.root}: another run is writing here ({who}): wait for it, or give another --output"
            ) from None
        except OSError as error:
            raise UserError(f"--output {self.root}: cannot be written to: {error.strerror}") from error
        try:
            self.open(fresh)
            since = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
            write_text(owner, f"process {os.getpid()} on {socket.gethostname()} since {since}")
            yield
        finally:
            with contextlib.suppress(OSError):  # the next run sweeps again
                self._sweep()
            owner.unlink(missing_ok=True)
            lock.release()

    def _sweep(self) -> None:
        """Throw away what processes that were killed left half-written."""
        for partial in [*self.root.glob(f"{PARTIAL}*"), *self.root.glob(f"*/*/{PARTIAL}*")]:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)

    def folder(self, experiment: Experiment) -> Path:
        return self.root / "experiments" / experiment.experiment_id

    def shown(self, path: Path) -> Path:
        """Where people find what is made at ``path``."""
        return self.place / path.relative_to(self.root).as_posix()

    def log_path(self, experiment: Experiment) -> Path:
        """Where people find an experiment's log."""
        return self.shown(self.folder(experiment) / LOG)

    def take_out(self, experiment: Experiment) -> None:
        """Have what is finished of an experiment at hand. On a file system it always is."""

    def put_away(self, experiment: Experiment) -> None:
        """Nobody works on the experiment any more, for now."""

    def _read(self, experiment: Experiment, name: str) -> dict[str, Any] | None:
        return read_json(self.folder(experiment) / name)

    # One experiment's row

    def read_row(self, experiment: Experiment) -> ResultRow | None:
        """The finished row of an experiment, if it came from the same data, model and settings."""
        return row_of(experiment, self._read(experiment, ROW))

    def read_rows(self, experiments: Iterable[Experiment]) -> dict[str, ResultRow]:
        """The finished rows by experiment id."""
        rows = {e.experiment_id: self.read_row(e) for e in experiments}
        return {key: row for key, row in rows.items() if row}

    def write_row(self, experiment: Experiment, row: ResultRow) -> None:
        write_text(self.folder(experiment) / ROW, to_json({"identity": experiment.identity, "row": row.values}))

    # One stage's product: a JSON file with the key it was made under, written after whatever lies beside it

    def read_stage(self, experiment: Experiment, stage: str) -> dict[str, Any] | None:
        """A stage's values, if they came from what the experiment is now, and what lies beside them is there."""
        saved = self._read(experiment, f"{stage}.json")
        if saved is None or saved.get("origin") != experiment.origins[stage] or self._lacks(experiment, stage):
            return None
        values: dict[str, Any] = saved["values"]
        return values

    def _lacks(self, experiment: Experiment, stage: str) -> list[str]:
        """Files of a stage that somebody took away or emptied."""
        names = [name for product in PRODUCTS[stage] for name in FILES_OF.get(product, (product,))]
        paths = {name: self.folder(experiment) / name for name in names}
        return [name for name, path in paths.items() if not path.is_file() or not path.stat().st_size]

    def write_stage(self, experiment: Experiment, stage: str, values: dict[str, Any]) -> None:
        origin = experiment.origins[stage]
        write_text(self.folder(experiment) / f"{stage}.json", to_json({"origin": origin, "values": values}))

    def forget_stage(self, experiment: Experiment, stage: str) -> None:
        """Before a product is replaced: a marker of another origin must not stand beside it, not for a moment."""
        (self.folder(experiment) / f"{stage}.json").unlink(missing_ok=True)

    def why_not_done(self, experiment: Experiment, stage: str) -> str:
        """Why a stage must be run: ``new``, or what has changed since it was; empty where it is done."""
        saved = self._read(experiment, f"{stage}.json")
        if saved is None or not isinstance(saved.get("origin"), dict):
            return "new"
        now, before = experiment.origins[stage], saved["origin"]
        changed = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
        lacking = "" if changed else ", ".join(self._lacks(experiment, stage))
        return f"{', '.join(changed)} changed" if changed else f"{lacking} missing" if lacking else ""

    def adapter_folder(self, experiment: Experiment) -> Path:
        return self.folder(experiment) / "adapter"

    def scores_path(self, experiment: Experiment) -> Path:
        return self.folder(experiment) / "scores.parquet"

    # What all experiments share (questions as token ids, the base's scores), made by whichever worker comes first

    def base_file(self, key: str, name: str) -> Path:
        return self.root / "base" / key / name

    def base_lock(self, key: str, name: str) -> FileLock:
        """Held by the one worker that makes it. The system frees it when that worker dies."""
        path = self.base_file(key, f"{name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def fetch(self, path: Path) -> None:
        """Have a shared file at hand, if another machine made it. Called with its lock held."""

    def share(self, path: Path) -> None:
        """A shared file is made: others may have it."""

    def collect(self) -> None:
        """Have the scores and loss curves of all experiments at hand, for a report."""

    # Files of the whole run

    def write_file(self, name: str, write: Callable[[Path], None]) -> None:
        """A file of the folder's top, whole and in place of the old one."""
        write_atomically(self.root / name, write)
        self.publish(name)

    def publish(self, name: str) -> None:
        """A file of the folder's top was made in ``root``: put it where people find it."""

    def write_tables(self, rows: Iterable[ResultRow], columns: list[str]) -> pd.DataFrame:
        """``results.csv`` and ``results.parquet``, whole and in place of the old ones."""
        table = rows_to_table(rows, columns)
        self.write_file("results.csv", lambda p: table.to_csv(p, index=False))
        self.write_file("results.parquet", lambda p: table.to_parquet(p, index=False))
        return table

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        self.write_json("run.json", manifest)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        def write(partial: Path) -> None:
            partial.write_text(to_json(value), encoding="utf-8")

        self.write_file(name, write)


def row_of(experiment: Experiment, saved: dict[str, Any] | None) -> ResultRow | None:
    """A stored row, if it is of what the experiment is now."""
    if saved is None or saved.get("identity") != experiment.identity or not isinstance(saved.get("row"), dict):
        return None
    return ResultRow(saved["row"])
