"""The run's folder on an object store, under the same names as in ``store.py``.

Each machine works in a local folder of its own (below ``RAYLORA_CACHE``), with the paths and the code of ``store.py``.
A finished product is uploaded, its JSON file last: where that exists, the product is complete. What is done is read
from the object store only, never from a local folder. What needs a file system stays local and is lost with the
machine: locks between its workers, answers of an unfinished evaluation, the log while an experiment runs.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raylora.errors import RayloraError, RemoteError, UserError
from raylora.records import Experiment, ResultRow, digest
from raylora.storage.atomic import write_atomically, write_text
from raylora.storage.damage import note_damaged
from raylora.storage.digests import damaged_files, is_readable, is_whole, missing_files, seal, unseal
from raylora.storage.objects import Remote
from raylora.storage.places import cache_error, cache_folder, caching, is_remote, location
from raylora.storage.run_lock import RunLock
from raylora.storage.store import LOG, PRODUCTS, PUSHED, ROW, Store, files_of, products_of, row_of, sealed_row

EDITION = "edition"
"""The object that holds the name of the machines' local folders. ``--fresh`` writes a new name, so that no machine goes
on with files of the results that were deleted."""

MACHINES_PART = "this machine's part of the results"

REPORT_FILES = ("/loss_curve.csv", "/scores.parquet", "/result.json")
"""Endings of the objects that a report is made from."""


def store_at(place: Path) -> Store:
    """The store of a place that ``places.location`` made."""
    return RemoteStore(place) if is_remote(place) else Store(place)


class RemoteStore(Store):
    """Results at a URI.

    Args:
        edition: the text of ``EDITION``, read by ``open`` and pickled for workers; empty before.
        lock_number: of the lock that the command holds, elsewhere than where it holds it.
    """

    def __init__(self, place: Path, edition: str = "", lock_number: int = 0) -> None:
        self.place = place
        # A worker may start in the minute in which the store does not answer: it is as patient as the command is.
        self._remote = Remote(str(place), has_answered=bool(edition))
        self._run_lock = RunLock(self._remote, lock_number)
        self._use_edition(edition)
        self._ahead: dict[str, bytes | None] = {}
        """Inside ``read_ahead``, the objects that were read there by their names; None where there is none."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Another machine has its own cache folder, and the run lock stays with the command.
        return _unpickle, (str(self.place), self._edition, self._run_lock.number)

    def _use_edition(self, edition: str) -> None:
        self._edition = edition
        self.root = cache_folder() / "outputs" / digest(str(self.place), 16) / (edition or "new")

    # The whole folder

    def open(self, fresh: bool) -> None:
        try:
            # Only 32 hexadecimal digits: another text could lead out of the cache folder.
            saved = (self._remote.read(EDITION) or b"").decode("ascii", "ignore")
            is_valid = re.fullmatch(r"[0-9a-f]{32}", saved)
            self._use_edition(saved if is_valid and not fresh else uuid.uuid4().hex)
            self._remote.write(EDITION, self._edition.encode())
            if fresh:
                for name in ("experiments", "base"):
                    self._remote.remove(name)
        except RemoteError as error:
            raise UserError(f"--output {self.place}: cannot be written to: {error.strerror}") from error
        with caching(MACHINES_PART):
            self._make_work_folder()
        super().open(False)

    def _not_writable(self, error: OSError) -> RayloraError:
        return cache_error(MACHINES_PART, error)

    @contextlib.contextmanager
    def held(self, fresh: bool) -> Iterator[None]:
        try:
            with self._run_lock.held():
                self.open(fresh)
                yield
        except RemoteError as error:
            raise UserError(f"--output {self.place}: {error.strerror}") from error

    def _make_work_folder(self) -> None:
        """Make this machine's folder of the edition, and delete those of earlier editions."""
        if self.root.is_dir():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        for old in self.root.parent.iterdir():
            if old.name != self.root.name:
                shutil.rmtree(old, ignore_errors=True)

    def publish(self, name: str) -> None:
        """See ``Store``.

        Raises:
            LockLostError: another run took the folder over.
            RemoteError: the object store does not answer.
        """
        self._run_lock.check()
        if (self.root / name).is_file():
            self._remote.upload(name, self.root / name)

    def collect(self) -> None:
        for name in [*self._remote.list("base"), *self._remote.list("experiments")]:
            if name.endswith(REPORT_FILES) and not (self.root / name).is_file():
                self._download(name, self.root / name)

    def fetch_cells(self, experiment_ids: Iterable[str]) -> None:
        self._fetch_products("transfer.json", dict.fromkeys(experiment_ids, "transfer.json"), self.cells_path)

    def fetch_scores(self, experiment_ids: Sequence[str], base_key: str) -> None:
        # Not under the marker's own name: to ``take_out`` that says that all of the stage's files are here.
        self._fetch_products("mmlu.json", dict.fromkeys(experiment_ids, "scores-of-mmlu.json"), self.scores_of)
        self.fetch(self.base_file(base_key, "scores.parquet"))

    def _fetch_products(self, marker: str, copies: Mapping[str, str], path_of: Callable[[str], Path]) -> None:
        """Download a file of some experiments' stage where it is not the one that is here.

        Args:
            marker: the stage's JSON file.
            copies: by experiment id, the name under which the marker is kept beside the local file.
        """
        markers = {f"experiments/{name}/{marker}": name for name in copies}
        for remote_name, data in self._remote.read_many([*markers]).items():
            name = markers[remote_name]
            local, path = self.folder_of(name) / copies[name], path_of(name)
            # As in ``take_out``: an equal marker is of the same run of the stage.
            if not path.is_file() or not local.is_file() or local.read_bytes() != data:
                self._download(path.relative_to(self.root).as_posix(), path)
                write_text(local, data.decode("utf-8", "replace"))
                if path.is_file() and not is_readable(path):
                    fix = "remove the result.json beside it, and the same command makes it again"
                    note_damaged(self.shown(path), then=fix)

    # One experiment

    def take_out(self, experiment: Experiment) -> None:
        """Download the stages that were finished on other machines."""
        self._make_work_folder()
        folder, existing_names = self.folder(experiment), set(self._remote.list(_name(experiment)))
        for stage in PRODUCTS:
            marker = _name(experiment, f"{stage}.json")
            data = self._remote.read(marker) if marker in existing_names else None
            saved, local = unseal(data or b"") or {}, folder / f"{stage}.json"
            if data is None or saved.get("origin") != experiment.origins[stage]:
                continue
            # An equal local JSON file is of the same run of the stage, as the stage's seconds are in it: no download.
            if local.is_file() and local.read_bytes() == data and not self._unfit(experiment, stage, saved):
                continue
            for name in products_of(experiment, stage):
                self._download(_name(experiment, name), folder / name)
            if unfit := self._unfit(experiment, stage, saved):
                for name in unfit:
                    note_damaged(self.shown(folder / name), data)
                self._run_lock.check()
                self._remote.remove(marker)
                local.unlink(missing_ok=True)
                continue
            write_text(local, data.decode("utf-8"))
        if _name(experiment, LOG) in existing_names and not (folder / LOG).is_file():
            self._download(_name(experiment, LOG), folder / LOG)

    def _unfit(self, experiment: Experiment, stage: str, saved: dict[str, Any]) -> list[str]:
        """The names of a stage's files that are not here, or not what it wrote; ``saved`` is its JSON file."""
        folder, names = self.folder(experiment), files_of(experiment, stage)
        return [*missing_files(folder, names), *damaged_files(folder, names, saved.get("files"))]

    def put_away(self, experiment: Experiment) -> None:
        """Upload the log, and delete the local folder if the experiment has its row."""
        folder = self.folder(experiment)
        if (folder / LOG).is_file():
            self._run_lock.check()
            self._remote.upload(_name(experiment, LOG), folder / LOG)
            # Another machine may append to the log: if this one has the experiment again, it must download it anew.
            (folder / LOG).unlink()
        if self.read_row(experiment):
            shutil.rmtree(folder, ignore_errors=True)

    def _missing_files(self, experiment: Experiment, stage: str) -> list[str]:
        return []  # no request for each file: the marker is uploaded after them and deleted before them

    def _damaged_files(self, experiment: Experiment, stage: str, saved: dict[str, Any]) -> list[str]:
        return []  # ``take_out`` has checked what it downloaded

    def is_damaged(self, experiment: Experiment, stage: str) -> bool:
        return False  # no request for each finished experiment, of which there are thousands

    def _data(self, experiment: Experiment, name: str) -> bytes | None:
        name = _name(experiment, name)
        return self._remote.read(name) if name not in self._ahead else self._ahead[name]

    @contextlib.contextmanager
    def read_ahead(self, stages: Mapping[str, Sequence[str]]) -> Iterator[None]:
        names = [f"experiments/{experiment}/{stage}.json" for experiment in stages for stage in stages[experiment]]
        self._ahead = {**dict.fromkeys(names), **self._remote.read_many(names)}
        try:
            yield
        finally:
            self._ahead = {}

    def read_rows(self, experiments: Iterable[Experiment]) -> dict[str, ResultRow]:
        by_name = {_name(e, ROW): e for e in experiments}
        objects = self._remote.read_many([*by_name])
        rows: dict[str, ResultRow | None] = {}
        for name, data in objects.items():
            if (saved := unseal(data)) is None:
                note_damaged(self.place / name, data)
            rows[by_name[name].experiment_id] = row_of(by_name[name], saved)
        return {experiment_id: row for experiment_id, row in rows.items() if row}

    def write_row(self, experiment: Experiment, row: ResultRow) -> None:
        self._run_lock.check()
        self._remote.write(_name(experiment, ROW), sealed_row(experiment, row).encode("utf-8"))

    def write_pushed(self, experiment: Experiment, values: dict[str, Any]) -> None:
        self._run_lock.check()
        self._remote.write(_name(experiment, PUSHED), seal(values).encode("utf-8"))

    def write_stage(self, experiment: Experiment, stage: str, values: dict[str, Any]) -> None:
        text = self._sealed_stage(experiment, stage, values)
        marker = _name(experiment, f"{stage}.json")
        self._run_lock.check()
        # See ``forget_stage``: the old marker must not stand beside the new files.
        self._remote.remove(marker)
        for name in products_of(experiment, stage):
            self._remote.upload(_name(experiment, name), self.folder(experiment) / name)
        self._run_lock.check()  # again: uploads may take minutes, and a machine be suspended meanwhile
        self._remote.write(marker, text.encode("utf-8"))
        write_text(self.folder(experiment) / f"{stage}.json", text)

    # Files that all experiments share. Two machines may make the same one: the first that is uploaded is used by both.

    def fetch(self, path: Path) -> None:
        if path.is_file() and is_readable(path):
            return
        self._download(path.relative_to(self.root).as_posix(), path)
        super().fetch(path)

    def share(self, path: Path) -> None:
        name, data = path.relative_to(self.root).as_posix(), path.read_bytes()
        self._run_lock.check()
        if self._remote.create(name, data):
            return
        there = self._remote.read(name)
        if there is not None and is_whole(name, there):
            self._download(name, path)
        else:  # ``create`` leaves what is there, damaged or not
            self._remote.write(name, data)

    def _download(self, name: str, path: Path) -> None:
        """Download the object, or all below the name, to ``path``, atomically. Without one ``path`` stays as it is."""

        def download(partial: Path) -> None:
            if not self._remote.download(name, partial):
                raise FileNotFoundError(name)

        with contextlib.suppress(FileNotFoundError):
            write_atomically(path, download)


def _name(experiment: Experiment, *parts: str) -> str:
    return "/".join(("experiments", experiment.experiment_id, *parts))


def _unpickle(place: str, edition: str, lock_number: int) -> RemoteStore:
    return RemoteStore(location(place), edition, lock_number)
