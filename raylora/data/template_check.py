"""A dataset held against the chat template: what it refuses is left out, what it leaves out is counted and said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from raylora.config.options import MAX_RECORD_CHARS
from raylora.data.datasets import MAX_KEPT_BAD_RECORDS, places_of
from raylora.data.examples import Chosen
from raylora.data.record_stream import shown_path
from raylora.data.rendered import TemplateCounts, count_in_template
from raylora.errors import ErrorKind, UserError
from raylora.records import BadRecord, Dataset
from raylora.storage.hub_names import DatasetPlace

MOST_CUT = 0.5
"""With a larger share of answers cut a file is not used: something else than its answers would be learned."""


def held_to_template(tokenizer: Any, dataset: Dataset) -> Dataset:
    """The dataset of a caller as ``hold_to_counts`` returns it.

    Raises:
        UserError: the chat template refuses all of it, or cuts most of its answers.
    """
    counts = TemplateCounts()
    count_in_template(tokenizer, dataset.examples, counts)
    return hold_to_counts(dataset, counts)


def hold_to_counts(
    dataset: Dataset,
    counts: TemplateCounts,
    path: DatasetPlace | None = None,
    columns: Mapping[str, str] | None = None,
    max_chars: int = MAX_RECORD_CHARS,
) -> Dataset:
    """The dataset without the examples that the chat template refuses, whose records are bad ones, and with its notes.

    Args:
        counts: of all its examples.
        path: its file, from which records have their places; without one they are numbers of examples.
        columns: as for ``read_dataset``, which read it; ``max_chars`` as well.

    Raises:
        UserError: the chat template refuses all of it, or cuts most of its answers.
    """
    name = f"{shown_path(path)}: " if path else ""
    shown = sorted({*counts.refused, *([] if counts.first_cut is None else [counts.first_cut])})
    places = {number: f"example {number + 1}" for number in shown}
    if path and shown:
        places |= places_of(path, places, columns, max_chars)
    if counts.refused and not counts.num_examples:
        first = min(counts.refused)
        raise UserError(
            f"{name}none of its {len(counts.refused):,} examples can be used; the first: {places[first]}: "
            f"{counts.refused[first]}",
            kind=ErrorKind.CHAT_TEMPLATE,
        )
    if counts.first_cut is not None and counts.num_answers_cut > MOST_CUT * counts.num_examples:
        raise UserError(
            f"{name}the chat template leaves out a part of {counts.num_answers_cut:,} of {counts.num_examples:,} "
            f"answers (the first: {places[counts.first_cut]}), as those of reasoning models leave out the thinking: "
            "remove that part from the answers, or take a model whose chat template keeps it",
            kind=ErrorKind.CHAT_TEMPLATE,
        )
    bad: dict[str, str] = {}
    for number, reason in counts.refused.items():
        bad.setdefault(places[number], reason)
    examples = dataset.examples
    if bad:
        kept = np.setdiff1d(np.arange(len(examples)), list(counts.refused))
        examples = Chosen(examples, kept)
    records = (*dataset.bad_records, *(BadRecord(place, reason) for place, reason in bad.items()))
    return replace(
        dataset,
        examples=examples,
        bad_records=records[:MAX_KEPT_BAD_RECORDS],
        num_bad_records=dataset.num_bad_records + len(bad),
        num_answers_cut=counts.num_answers_cut,
        template_note=counts.note,
    )
