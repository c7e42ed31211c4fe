"""The examples that the trainings of a run leave out, of all its datasets: as token ids, with the base's losses.

A dataset's are made once a run, under a lock, by the first worker that needs them: files alone say which they are.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from raylora.data.encoding import IGNORE_INDEX, EncodedExample, encode_each, labels_of
from raylora.data.held_out import leave_out
from raylora.errors import MachineError, UserError, one_line
from raylora.experiment.workbench import Workbench, load_planned_dataset
from raylora.model.memory import is_out_of_memory
from raylora.model.onednn import onednn_linears
from raylora.storage.atomic import write_atomically, write_text
from raylora.storage.damage import note_file, read_sealed
from raylora.storage.digests import load_parquet, seal, write_parquet
from raylora.storage.store import Store
from raylora.training.loop import ONEDNN_FROM_TOKENS
from raylora.training.losses import ExampleLoss, example_losses

log = logging.getLogger("raylora.experiment")
COLUMNS = "columns.json"
HELD_OUT = "held_out.parquet"


@dataclass(frozen=True)
class Column:
    """A dataset of the run, on whose held-out examples every adapter is scored."""

    name: str
    """The dataset's."""
    path: str
    data_hash: str
    key: str
    """Hash of all that the base's losses depend on: its held-out examples, how they are tokenized, the base."""


def write_columns(store: Store, key: str, columns: Sequence[Column]) -> None:
    path = store.base_file(key, COLUMNS)
    write_text(path, seal({"columns": [asdict(column) for column in columns]}))
    store.share(path)


def read_columns(store: Store, key: str) -> list[Column]:
    """What ``write_columns`` stored under this key.

    Raises:
        MachineError: it is not there, or cannot be read.
    """
    path = store.base_file(key, COLUMNS)
    with store.base_lock(key, "columns"):
        store.fetch(path)
    if (found := read_sealed(path)) is None:
        raise MachineError(f"{path}: cannot be read: run the same command again")
    return [Column(**column) for column in found["columns"]]


def held_out_sets(bench: Workbench, columns: Sequence[Column]) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """The held-out examples of each dataset, by its column's name; and why those of others are not there.

    While another worker makes one of them, this one goes on with the others. A table has a row for each example:
    ``input_ids`` and ``is_supervised`` (arrays of one length), ``conversation`` (a number), ``num_supervised``,
    ``base_loss`` (nats, summed over the supervised tokens).
    """
    sets: dict[str, pd.DataFrame] = {}
    reasons: dict[str, str] = {}
    waiting = list(columns)
    for wait in (False, True):
        for column in waiting:
            try:
                found = bench.held_out.get(column.key)
                if found is None:
                    found = _held_out_set(bench, column, wait)
            except (UserError, MachineError, RuntimeError, MemoryError) as error:
                if not isinstance(error, UserError | MachineError) and not is_out_of_memory(error):
                    raise
                log.warning("%s: its held-out examples cannot be used: %s", column.name, one_line(error))
                reasons[column.name] = one_line(error)
                continue
            if found is not None:
                bench.held_out[column.key] = sets[column.name] = found
        waiting = [c for c in waiting if c.name not in sets and c.name not in reasons]
    return sets, reasons


def _held_out_set(bench: Workbench, column: Column, wait: bool) -> pd.DataFrame | None:
    """One of these tables; None if another worker is making it and ``wait`` is False."""
    store, path = bench.store, bench.store.base_file(column.key, HELD_OUT)
    try:
        lock = store.base_lock(column.key, "held_out").acquire(timeout=-1 if wait else 0)
    except TimeoutError:
        return None
    with lock:
        store.fetch(path)
        if (table := read_parquet(path)) is None:
            new = _make_held_out_set(bench, column)
            write_atomically(path, lambda partial: write_parquet(new, partial))
            store.share(path)
            table = load_parquet(path)  # ``share`` has put another machine's in its place, if that was there first
    return table


def read_parquet(path: Path) -> pd.DataFrame | None:
    """A table of raylora's own; None if there is none, or it is damaged, so that it has to be made again."""
    if not path.is_file():
        return None
    try:
        return load_parquet(path)
    except (OSError, ValueError):  # pyarrow's errors are one of these
        note_file(path)
        return None


def _make_held_out_set(bench: Workbench, column: Column) -> pd.DataFrame:
    config, loaded = bench.config, bench.loaded
    examples, _ = leave_out(load_planned_dataset(bench, column), config.seed)
    encoded = list(encode_each(loaded.tokenizer, examples, config.longest_example))
    conversations = {e.conversation or e.digest: number for number, e in enumerate(examples)}
    table = pd.DataFrame(
        {
            "input_ids": [np.array(e.input_ids, dtype=np.int32) for e in encoded],
            "is_supervised": [np.array(labels_of(e, config.train_on)) != IGNORE_INDEX for e in encoded],
            "conversation": [conversations[e.conversation or e.digest] for e in examples],
        }
    )
    with loaded.base():
        losses = losses_of(bench, [table])
    table["num_supervised"] = [loss.num_supervised for loss in losses]
    table["base_loss"] = [loss.total for loss in losses]
    return table


def losses_of(bench: Workbench, tables: Sequence[pd.DataFrame]) -> list[ExampleLoss]:
    """The losses of the examples of these tables, one table after another, in passes that they share.

    Raises:
        torch.OutOfMemoryError: a single example does not fit (MemoryError or RuntimeError on a CPU).
    """
    loaded, budget = bench.loaded, bench.loaded.feature_token_budget
    encoded = [example for table in tables for example in _encoded(table)]
    if not encoded:
        return []
    use_onednn = sum(map(len, encoded)) >= ONEDNN_FROM_TOKENS
    products = onednn_linears(loaded.model, budget, with_head=True) if use_onednn else contextlib.nullcontext()
    with products:
        return example_losses(loaded, encoded, "answer", budget)


def _encoded(table: pd.DataFrame) -> Iterator[EncodedExample]:
    """The examples, each with its supervised tokens as its answer."""
    for ids, supervised in zip(table["input_ids"], table["is_supervised"], strict=True):
        answer = supervised.tolist()
        yield EncodedExample(ids.tolist(), [False] * len(answer), answer, answer)
