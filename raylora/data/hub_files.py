"""Datasets of the Hugging Face hub: their commit, their files in the hub's own cache, their records.

A commit's list of files lies in the cache as well, so that every process of a machine asks the hub for it once, and
that ``HF_HUB_OFFLINE=1`` finds all of a dataset that was used before. Tokens are found by ``huggingface_hub``
(``HF_TOKEN``, or ``hf auth login``) and never pass through raylora.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from raylora.config.options import MAX_RECORD_CHARS
from raylora.data.columns import ColumnNames
from raylora.data.dataset_files import FolderRecords
from raylora.data.hub_splits import Choice, check_complete, choose
from raylora.data.record_stream import Record, in_bytes
from raylora.errors import NoFilesError, NoRepositoryError, NoRevisionError, UserError, one_line
from raylora.storage.atomic import write_text
from raylora.storage.damage import read_sealed
from raylora.storage.digests import seal
from raylora.storage.hub_names import COMMIT, HubDataset
from raylora.texts import without_secrets

log = logging.getLogger("raylora.data")
CONVERTED = "refs/convert/parquet"
"""The branch of the hub's own conversion of a dataset to Parquet, ``config/split/0000.parquet``."""
README = "README.md"
NUM_DOWNLOADS = 8
"""Files downloaded at a time, as ``huggingface_hub`` does."""
LARGE_DOWNLOAD = 100 << 20
"""Bytes from which on a download is told of."""
T = TypeVar("T")


@dataclass(frozen=True)
class HubFiles:
    """What a name on the hub stands for."""

    pinned: HubDataset
    """The same dataset with the commit as its revision, and with its configuration and split."""
    names: tuple[str, ...]
    """Paths in the repository."""
    num_bytes: int
    """Of all of them; 0 where the hub does not say."""

    def download(self) -> dict[str, Path]:
        """The files in the hub's cache by their names; those that are there already are not asked for again.

        Raises:
            UserError: the hub does not give one of them, or there is no room for it.
        """
        get = partial(_download, self.pinned)
        with ThreadPoolExecutor(NUM_DOWNLOADS) as pool:
            return dict(zip(self.names, pool.map(get, self.names), strict=True))


class HubRecords(FolderRecords):
    """The records of a dataset on the hub, as of a folder that holds its files.

    Attributes:
        pinned: as ``HubFiles.pinned``, once its files are here; None before.
    """

    def __init__(self, place: HubDataset, names: ColumnNames, salvage: bool, max_chars: int = MAX_RECORD_CHARS) -> None:
        super().__init__(Path(place.name), names, salvage, max_chars)
        self.place = place
        self.pinned: HubDataset | None = None
        self._downloaded: dict[str, Path] = {}

    def find_shards(self) -> dict[str, Path]:
        files = find_files(self.place)
        if files.num_bytes >= LARGE_DOWNLOAD and not _is_here(files):
            log.warning("%s: downloads %s in %d files", self.place, in_bytes(files.num_bytes), len(files.names))
        self._downloaded = files.download()
        self.pinned = files.pinned
        return self._downloaded

    def __iter__(self) -> Iterator[Record]:
        try:
            yield from super().__iter__()
        except UserError as error:
            text = str(error)
            for name, path in self._downloaded.items():  # a file's place in the cache says less than its name
                text = text.replace(str(path), f"{self.place}: {name}")
            raise UserError(text, kind=error.kind) from None


def find_files(place: HubDataset) -> HubFiles:
    """The files of a dataset, at the commit that its revision is now. None of them is downloaded but the README.

    Raises:
        UserError: the hub has no such dataset, revision, configuration or split, does not give it without a token, or
            cannot be reached.
    """
    try:
        return _find_files(place)
    except NoRepositoryError:
        if (other := place.canonical) is None:
            raise
    try:
        return _find_files(other)
    except NoRepositoryError:
        raise _no_repository(place) from None


def _find_files(place: HubDataset) -> HubFiles:
    where = str(place)
    commit = _commit_of(place)
    tree = _tree_of(place, commit)
    try:
        choice = choose(tree, _metadata(place, commit, tree), place.config, place.split_name)
    except NoFilesError as error:
        if place.revision:
            raise UserError(f"{where}: {error}, at this revision") from None
        commit, tree, choice = _converted(place, str(error))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    pinned = HubDataset(place.repository, commit, choice.config, choice.split)
    return HubFiles(pinned, choice.files, sum(tree[name] for name in choice.files))


def _converted(place: HubDataset, why: str) -> tuple[str, dict[str, int], Choice]:
    """Commit, tree and choice of the hub's own conversion. Code that comes with a dataset is not run.

    Raises:
        UserError: there is none, or it has no such configuration or split.
    """
    branch = place.at(CONVERTED)
    try:
        commit = _commit_of(branch)
        tree = _tree_of(branch, commit)
        return commit, tree, choose(tree, None, place.config, place.split_name)
    except (NoFilesError, NoRevisionError, NoRepositoryError):
        text = f"{place}: {why}, and the hub has made no Parquet of it; code that comes with a dataset is not run"
        raise UserError(text) from None
    except UserError as error:
        text = str(error) if str(error).startswith(str(branch)) else f"{place}: {error}"
        raise UserError(text) from None


# What the hub says


def _no_repository(place: HubDataset) -> UserError:
    return NoRepositoryError(
        f"{place}: no such dataset on the hub, or a private one: check the name; for a private one set HF_TOKEN to a "
        "token that may read it"
    )


def _ask(place: HubDataset, call: Callable[[], T]) -> T:
    """What ``call`` gives.

    Raises:
        UserError: in place of whatever the hub's client raises.
    """
    import httpx

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it says each of its retries
    try:
        return call()
    except (httpx.HTTPError, OSError, ValueError) as error:  # bases of all errors of the client
        raise _problem(place, error) from error


def _problem(place: HubDataset, error: BaseException) -> UserError:
    """One line that says what is wrong, and the fix."""
    import httpx
    from huggingface_hub import errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _problem(place, error.__cause__)  # the client has looked into its cache, and says so
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return _not_in_cache(place)
    if isinstance(error, errors.GatedRepoError):
        page = f"{_endpoint()}/datasets/{place.repository}"
        fix = f"ask for access on {page}, and set HF_TOKEN to a token of that account"
        return UserError(f"{place}: its owner has to give access: {fix}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return _no_repository(place)
    if isinstance(error, errors.RevisionNotFoundError):
        return NoRevisionError(f"{place}: no revision {place.revision or 'main'}: give a branch, a tag or a commit")
    if isinstance(error, errors.EntryNotFoundError):
        return UserError(f"{place}: the hub does not give a file that it lists: {one_line(error)}")
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if status == 404 or (status == 401 and not get_token()):
        return _no_repository(place)
    if status in {401, 403}:
        return UserError(f"{place}: the hub refuses the token: set HF_TOKEN to one that may read this dataset")
    if isinstance(error, httpx.HTTPError):
        fix = "HF_HUB_OFFLINE=1 takes what was downloaded before"
        return UserError(f"{place}: the hub ({_endpoint()}) cannot be reached: {one_line(error)}; {fix}")
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"{place}: the hub's cache: {error.strerror}: make room, or set HF_HOME")
    return UserError(f"{place}: {one_line(error)}")


def _not_in_cache(place: HubDataset) -> UserError:
    fix = "run once with HF_HUB_OFFLINE=0, or set HF_HOME to the folder that has it"
    return UserError(f"{place}: not in the hub's cache, and HF_HUB_OFFLINE is set: {fix}")


def _endpoint() -> str:
    from huggingface_hub import constants

    return without_secrets(constants.ENDPOINT)


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _cache(place: HubDataset) -> Path:
    """The repository's folder in the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "--".join(["datasets", *place.repository.split("/")])


def _commit_of(place: HubDataset) -> str:
    """The commit that the dataset's revision is now; offline the one that it was when it was last used."""
    revision = place.revision or "main"
    if COMMIT.fullmatch(revision):
        return revision
    reference = _cache(place) / "refs" / revision
    if _is_offline():
        try:
            found = reference.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise _not_in_cache(place) from None
        if not COMMIT.fullmatch(found):
            raise _not_in_cache(place)
        return found
    from huggingface_hub import HfApi

    info = _ask(place, lambda: HfApi().dataset_info(place.repository, revision=revision))
    commit = str(info.sha)
    _note(reference, commit)
    return commit


def _tree_of(place: HubDataset, commit: str) -> dict[str, int]:
    """The paths of all files of a commit, with their sizes in bytes (0 where they are not known)."""
    listing = _cache(place) / "raylora" / f"{commit}.json"
    found = (read_sealed(listing) or {}).get("files")
    if isinstance(found, dict):
        return found
    if _is_offline():
        return _tree_in_cache(place, commit)
    tree = _ask(place.at(commit), lambda: _listed(place, commit))
    _note(listing, seal({"files": tree}))
    return tree


def _listed(place: HubDataset, commit: str) -> dict[str, int]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    found = HfApi().list_repo_tree(place.repository, recursive=True, revision=commit, repo_type="dataset")
    return {file.path: file.size for file in found if isinstance(file, RepoFile)}


def _tree_in_cache(place: HubDataset, commit: str) -> dict[str, int]:
    """Of a commit that something else has put into the hub's cache: what lies there."""
    folder = _cache(place) / "snapshots" / commit
    tree = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    if not tree:
        raise _not_in_cache(place)
    try:
        check_complete(tree)
    except UserError as error:
        raise UserError(f"{place}: {error}, in the hub's cache, and HF_HUB_OFFLINE is set") from None
    return tree


def _note(path: Path, text: str) -> None:
    """Put a file into the cache, if it can be written: others can do without."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _metadata(place: HubDataset, commit: str, tree: dict[str, int]) -> Any:
    """The metadata of the README, parsed; None where there is none that can be."""
    if README not in tree:
        return None
    import yaml
    from huggingface_hub import metadata_load

    path = _download(place.at(commit), README)
    try:
        return metadata_load(path)
    except (ValueError, yaml.YAMLError, OSError):  # the hub's own view of such a dataset goes by names as well
        return None


def _download(pinned: HubDataset, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(
        _ask(pinned, lambda: hf_hub_download(pinned.repository, name, repo_type="dataset", revision=pinned.revision))
    )


def _is_here(files: HubFiles) -> bool:
    folder = _cache(files.pinned) / "snapshots" / files.pinned.revision
    return all((folder / name).is_file() for name in files.names)
