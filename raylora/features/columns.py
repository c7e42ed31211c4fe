"""The columns of a table of features beside the features, and all definitions as a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from raylora.rows import FEATURE_COLUMNS, INF, FeatureColumn, column_group

RUN_COLUMNS = column_group(
    "run",
    ("dataset", "text", -INF, INF, "the file's name"),
    ("status", "text", -INF, INF, "ok or error"),
    ("error", "text", -INF, INF, "why there is no feature"),
    ("model", "text", -INF, INF, "the base model"),
    ("quantization", "text", -INF, INF, "how it lies in memory: none, 8bit, 4bit or fp8"),
    ("int8_activations", "flag", 0, 1, "in 8bit: computed as LLM.int8 does, not with int8 weights alone"),
    ("sample_size", "examples", 0, INF, "examples that the model looks at (0: all)"),
    ("probe_steps", "steps", 0, INF, "optimizer steps of the probe (0: none)"),
    ("data_hash", "text", -INF, INF, "what the file holds"),
    ("text_seconds", "seconds", 0, INF, "of the features of size and text, part of static_seconds"),
    ("static_seconds", "seconds", 0, INF, "of all features without a probe"),
    ("probe_seconds", "seconds", 0, INF, "of the probe"),
    ("features_seconds", "seconds", 0, INF, "of both"),
)  # fmt: skip


def describe_columns(columns: Sequence[FeatureColumn] = FEATURE_COLUMNS) -> str:
    """Columns with unit, range and definition, as a Markdown table; docs/columns.md has that of the features."""
    lines = ["| column | unit | range | definition |", "| --- | --- | --- | --- |"]
    for column in columns:
        ends = [f"{end:g}" if math.isfinite(end) else "" for end in (column.minimum, column.maximum)]
        span = f"{ends[0]} to {ends[1]}" if all(ends) else f"from {ends[0]}" if ends[0] else f"to {ends[1]}"
        lines.append(f"| `{column.name}` | {column.unit} | {span if any(ends) else ''} | {column.definition} |")
    return "\n".join(lines)
