"""The run's folder: names, atomic writes, what is done, the tables.

Finished work survives a crash through what is here, not through Ray. Each experiment has a folder. Each stage's files
are written under temporary names and renamed; last comes the stage's JSON file, its marker, with the origin: hashes of
everything that the stage depends on, and digests of the files. A stage whose origin has changed, or that is damaged, is
run anew. ``result.json`` is written last.

    results/<chunk>/
      results.csv  results.parquet  results.jsonl  run.json  batch_mmlu_results_<chunk>_<time>.json
      base/<key>/scores.parquet                the base's answers, shared by all experiments
      experiments/<experiment_id>/
        result.json  features.json  train.json  adapter/  loss_curve.csv  mmlu.json  scores.parquet  log.txt
        pushed.json                          with --push-to-hub
        transfer.json  transfer.parquet      with --transfer, which adds base/<key>/columns.json and held_out.parquet

``remote_store.py`` keeps the same on an object store.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from raylora.errors import RayloraError, UserError
from raylora.records import Experiment, ResultRow, digest
from raylora.storage.atomic import PARTIAL, to_json, write_atomically, write_text
from raylora.storage.csv_files import write_csv
from raylora.storage.damage import check_places, note_damaged, note_file
from raylora.storage.digests import damaged_files, file_digests, is_readable, missing_files, seal, unseal, write_parquet
from raylora.storage.run_lock import this_run
from raylora.storage.tables import rows_to_table

LOG = "log.txt"
ROW = "result.json"
PUSHED = "pushed.json"
CELLS = "transfer.parquet"
PRODUCTS = {
    "features": (), "train": ("loss_curve.csv", "adapter"), "mmlu": ("scores.parquet",), "transfer": (CELLS,),
}  # fmt: skip
"""By stage, the files and folders beside its JSON file; ``mmlu`` has a file more for each further set of questions."""
FILES_OF = {"adapter": ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")}
"""By product that is a folder, the files that it must hold."""


def safe_name(name: str, *identity: Any) -> str:
    """A folder name from a user's name: at most 80 ASCII letters, digits, ``_`` and ``-``, the last 12 of them a hash.

    The hash is of the whole name and ``identity``, so that names which look alike do not collide.
    """
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", ascii_name).strip("_-")[:67] or "dataset"
    return f"{slug}-{digest([name, *identity], 12)}"


def products_of(experiment: Experiment, stage: str) -> list[str]:
    """The files and folders that a stage of an experiment makes, beside its JSON file."""
    further = experiment.set_keys if stage == "mmlu" else ()
    return [*PRODUCTS[stage], *map(_scores_name, further)]


def files_of(experiment: Experiment, stage: str) -> list[str]:
    """The names of the files of ``products_of``, in the experiment's folder."""
    return [name for product in products_of(experiment, stage) for name in FILES_OF.get(product, (product,))]


def _scores_name(question_set: str) -> str:
    return f"scores-{question_set}.parquet" if question_set else "scores.parquet"


class Store:
    """The folder of one chunk's results. It can be pickled for workers.

    ``root`` is the local folder in which files are made; ``place`` is where users find them. They differ on an object
    store only.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.place = self.root

    def open(self, fresh: bool) -> None:
        """Make the folder, and delete what a killed run left half-written; with ``fresh`` all earlier results too.

        Raises:
            UserError: it cannot be written to, or something has taken the place of a product.
        """
        try:
            if fresh:
                for name in ("experiments", "base"):
                    shutil.rmtree(self.root / name, ignore_errors=True)
            self.root.mkdir(parents=True, exist_ok=True)
            self._sweep()
            write_text(self.root / ".writable", "")
            (self.root / ".writable").unlink()
            check_places(self.root)
        except OSError as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: OSError) -> RayloraError:
        return UserError(f"--output {self.place}: cannot be written to: {error.strerror}")

    @contextlib.contextmanager
    def held(self, fresh: bool) -> Iterator[None]:
        """Open the folder and lock it against other runs. The system frees the lock if this process dies.

        Raises:
            UserError: another run holds it, or it cannot be written to.
        """
        lock, owner_file = FileLock(self.root / "run.lock"), self.root / "run.owner"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            owner = owner_file.read_text("utf-8", "replace").strip() if owner_file.is_file() else "unknown"
            raise UserError(
                f"--output {self.root}: another run is writing here ({owner}): wait for it, or give another --output"
            ) from None
        except OSError as error:
            raise UserError(f"--output {self.root}: cannot be written to: {error.strerror}") from error
        try:
            self.open(fresh)
            write_text(owner_file, this_run())
            yield
        finally:
            # A disk that became read-only, or is gone, must not hide the error that says so; the next run sweeps again.
            with contextlib.suppress(OSError):
                self._sweep()
            with contextlib.suppress(OSError):
                owner_file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                lock.release()

    def _sweep(self) -> None:
        """Delete what killed processes left half-written."""
        for partial in [*self.root.glob(f"{PARTIAL}*"), *self.root.glob(f"*/*/{PARTIAL}*")]:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)

    def folder(self, experiment: Experiment) -> Path:
        return self.folder_of(experiment.experiment_id)

    def folder_of(self, experiment_id: str) -> Path:
        return self.root / "experiments" / experiment_id

    def shown(self, path: Path) -> Path:
        """Where users find what is made at ``path``."""
        return self.place / path.relative_to(self.root).as_posix()

    def log_path(self, experiment: Experiment) -> Path:
        """Where users find an experiment's log."""
        return self.shown(self.folder(experiment) / LOG)

    def take_out(self, experiment: Experiment) -> None:
        """Called before work on an experiment: bring its finished stages to this machine, if they are not here."""

    def put_away(self, experiment: Experiment) -> None:
        """Called after work on an experiment, finished or not: leave nothing on this machine that others need."""

    def _read(self, experiment: Experiment, name: str) -> dict[str, Any] | None:
        """A JSON product; None where there is none, or it is damaged, which is noted."""
        data = self._data(experiment, name)
        if data is None:
            return None
        if (saved := unseal(data)) is None:
            note_damaged(self.shown(self.folder(experiment) / name), data)
        return saved

    def _data(self, experiment: Experiment, name: str) -> bytes | None:
        try:
            return (self.folder(experiment) / name).read_bytes()
        except OSError:
            return None

    # One experiment's row

    def read_row(self, experiment: Experiment) -> ResultRow | None:
        """The finished row of an experiment; None without one of the same data, model and settings."""
        return row_of(experiment, self._read(experiment, ROW))

    def read_rows(self, experiments: Iterable[Experiment]) -> dict[str, ResultRow]:
        """The finished rows by experiment id; see ``read_row``."""
        rows = {e.experiment_id: self.read_row(e) for e in experiments}
        return {experiment_id: row for experiment_id, row in rows.items() if row}

    def write_row(self, experiment: Experiment, row: ResultRow) -> None:
        write_text(self.folder(experiment) / ROW, sealed_row(experiment, row))

    def read_pushed(self, experiment: Experiment) -> dict[str, Any] | None:
        """What ``write_pushed`` wrote last; None where nothing was pushed."""
        return self._read(experiment, PUSHED)

    def write_pushed(self, experiment: Experiment, values: dict[str, Any]) -> None:
        """Keep where on the hub an experiment's adapter is."""
        write_text(self.folder(experiment) / PUSHED, seal(values))

    # One stage: its JSON file (the marker, with the stage's values and origin), written after the files beside it

    def read_stage(self, experiment: Experiment, stage: str) -> dict[str, Any] | None:
        """A finished stage's values; None unless its origin is the experiment's now and its files are what it wrote."""
        saved = self._read(experiment, f"{stage}.json")
        if saved is None or saved.get("origin") != experiment.origins[stage]:
            return None
        if self._note_damaged_files(experiment, stage, saved) or self._missing_files(experiment, stage):
            return None
        values = saved.get("values")
        return values if isinstance(values, dict) else None

    def _missing_files(self, experiment: Experiment, stage: str) -> list[str]:
        """The names of a stage's files that somebody deleted or emptied."""
        return missing_files(self.folder(experiment), files_of(experiment, stage))

    def _damaged_files(self, experiment: Experiment, stage: str, saved: dict[str, Any]) -> list[str]:
        """The names of a stage's files that are not what it wrote; ``saved`` is its JSON file."""
        return damaged_files(self.folder(experiment), files_of(experiment, stage), saved.get("files"))

    def is_damaged(self, experiment: Experiment, stage: str) -> bool:
        """Whether a file of a finished stage is not what it wrote, which is noted. One that was deleted does not count:
        somebody may want its room."""
        saved = self._read(experiment, f"{stage}.json") or {}
        if saved.get("origin") != experiment.origins.get(stage):
            return False
        return self._note_damaged_files(experiment, stage, saved)

    def _note_damaged_files(self, experiment: Experiment, stage: str, saved: dict[str, Any]) -> bool:
        """Note the files of ``_damaged_files``; whether there is one."""
        damaged = self._damaged_files(experiment, stage, saved)
        for path in (self.folder(experiment) / name for name in damaged):
            note_file(path, self.shown(path))
        return bool(damaged)

    def write_stage(self, experiment: Experiment, stage: str, values: dict[str, Any]) -> None:
        write_text(self.folder(experiment) / f"{stage}.json", self._sealed_stage(experiment, stage, values))

    def _sealed_stage(self, experiment: Experiment, stage: str, values: dict[str, Any]) -> str:
        files = file_digests(self.folder(experiment), files_of(experiment, stage))
        return seal({"origin": experiment.origins[stage], "values": values, "files": files})

    def forget_stage(self, experiment: Experiment, stage: str) -> None:
        """Delete a stage's marker before its files are replaced: a kill must not leave it beside files it is not of."""
        (self.folder(experiment) / f"{stage}.json").unlink(missing_ok=True)

    def why_not_done(self, experiment: Experiment, stage: str) -> str:
        """Why a stage must be run: ``new``, or what has changed since it was run; empty if it is done."""
        saved = self._read(experiment, f"{stage}.json")
        if saved is None or not isinstance(saved.get("origin"), dict):
            return "new"
        now, before = experiment.origins[stage], saved["origin"]
        changed = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
        if changed:
            return f"{', '.join(changed)} changed"
        if missing := self._missing_files(experiment, stage):
            return f"{', '.join(missing)} missing"
        damaged = self._damaged_files(experiment, stage, saved)
        return f"{', '.join(damaged)} damaged" if damaged else ""

    @contextlib.contextmanager
    def read_ahead(self, stages: Mapping[str, Sequence[str]]) -> Iterator[None]:
        """Inside, asking ``why_not_done`` of these stages, by experiment id, takes no request for each."""
        yield

    def adapter_folder(self, experiment: Experiment) -> Path:
        return self.folder(experiment) / "adapter"

    def scores_path(self, experiment: Experiment, question_set: str = "") -> Path:
        """The adapter's answers to a set of questions, by its name; the first one's is empty."""
        return self.folder(experiment) / _scores_name(question_set)

    def scores_of(self, experiment_id: str) -> Path:
        """The adapter's answers to the first set of questions."""
        return self.folder_of(experiment_id) / _scores_name("")

    def fetch_scores(self, experiment_ids: Sequence[str], base_key: str) -> None:
        """Bring these files of finished experiments, and the base's, to this machine."""

    def cells_path(self, experiment_id: str) -> Path:
        """Where an experiment's losses on the datasets' held-out examples are."""
        return self.folder_of(experiment_id) / CELLS

    def fetch_cells(self, experiment_ids: Iterable[str]) -> None:
        """Bring these files of finished experiments to this machine."""

    # Files that all experiments share (questions as token ids, the base's scores); the first worker makes them

    def base_file(self, key: str, name: str) -> Path:
        return self.root / "base" / key / name

    def base_lock(self, key: str, name: str) -> FileLock:
        """The lock of the one worker that makes such a file. The system frees it when that worker dies."""
        path = self.base_file(key, f"{name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def fetch(self, path: Path) -> None:
        """Bring a shared file that another machine made to this one; remove one that is damaged, to be made again.

        The caller holds the file's ``base_lock``.
        """
        if path.is_file() and not is_readable(path):
            note_file(path, self.shown(path))
            path.unlink(missing_ok=True)

    def share(self, path: Path) -> None:
        """Give a shared file that was made here to other machines."""

    def collect(self) -> None:
        """Bring the rows, scores and loss curves of all experiments to this machine, for a report."""

    # Files of the whole run

    def write_file(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file at the top of the folder, atomically, in place of the old one."""
        write_atomically(self.root / name, write)
        self.publish(name)

    def publish(self, name: str) -> None:
        """Put a file at the top of ``root`` where users find it."""

    def write_tables(self, rows: Iterable[ResultRow], columns: list[str]) -> pd.DataFrame:
        """Write ``results.csv`` and ``results.parquet``, each atomically, and return the table."""
        table = rows_to_table(rows, columns)
        self.write_file("results.csv", lambda p: write_csv(table, p))
        self.write_file("results.parquet", lambda p: write_parquet(table, p))
        return table

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        self.write_json("run.json", manifest)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        def write(partial: Path) -> None:
            partial.write_text(to_json(value), encoding="utf-8")

        self.write_file(name, write)


def sealed_row(experiment: Experiment, row: ResultRow) -> str:
    """The text of ``result.json``."""
    return seal({"identity": experiment.identity, "row": row.values})


def row_of(experiment: Experiment, saved: dict[str, Any] | None) -> ResultRow | None:
    """A stored row; None unless its identity is the experiment's now, and it says what became of the experiment."""
    row = (saved or {}).get("row")
    if saved is None or saved.get("identity") != experiment.identity or not isinstance(row, dict):
        return None
    # Rows of older versions have no digest: these columns the tables and the report cannot do without.
    return ResultRow(row) if {"dataset", "experiment_id", "status"} <= row.keys() else None
