"""Every feature column: group, unit, range, definition. The row's schema and the documentation come from here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FeatureColumn:
    """One column. ``minimum`` and ``maximum`` are the ends of what can come out."""

    name: str
    group: str
    unit: str
    minimum: float
    maximum: float
    definition: str


def _group(group: str, *columns: tuple[str, str, float, float, str]) -> tuple[FeatureColumn, ...]:
    return tuple(FeatureColumn(name, group, *rest) for name, *rest in columns)  # type: ignore[arg-type]


INF = math.inf
TEXT_COLUMNS = _group(
    "size and text",
    ("dataset_num_items", "records", 0, INF, "records in the file"),
    ("dataset_total_chars", "characters", 0, INF, "characters over all string fields of all records"),
    ("avg_input_length", "tokens", 0, INF, "mean length of the questions, with their contexts"),
    ("input_length_std", "tokens", 0, INF, "population standard deviation of it"),
    ("avg_output_length", "tokens", 0, INF, "mean length of the answers"),
    ("output_length_std", "tokens", 0, INF, "population standard deviation of it"),
    ("io_length_ratio", "ratio", 0, INF, "mean answer length / mean question length"),
    ("input_ttr", "share", 0, 1, "mean over questions of distinct words / words, case-folded"),
    ("output_ttr", "share", 0, 1, "mean over answers of distinct words / words, case-folded"),
    ("output_ngram_repetition", "share", 0, 1, "mean over answers of 1 - distinct / all 3-grams (Welleck et al. 2020)"),
    ("vocab_complexity", "share", 0, 1, "share of words longer than 8 letters"),
    ("special_char_ratio", "share", 0, 1, "share of characters in Unicode categories P and S"),
    ("approximate_duplicates", "share", 0, 1, "share of examples with another one at TF-IDF cosine > 0.8"),
    ("answer_groundedness", "share", 0, 1, "mean share of an answer's 1-, 2-, 3-grams in its context or question"),
)  # fmt: skip
SEMANTIC_COLUMNS = _group(
    "semantic",
    ("semantic_diversity", "1 - cosine", 0, 2, "1 - mean pairwise cosine of the examples' embeddings"),
    ("io_similarity", "cosine", -1, 1, "mean cosine between question's and answer's mean token states"),
    ("semantic_consistency", "cosine", -1, 1, "mean pairwise cosine of an answer's sentences (two or more)"),
    ("embedding_outlier_ratio", "share", 0, 1, "share of embeddings that an isolation forest calls outlying"),
)  # fmt: skip
PERPLEXITY_COLUMNS = _group(
    "perplexity",
    ("reference_perplexity", "perplexity", 1, INF, "mean over examples of exp(token loss) of question and answer"),
    ("reference_perplexity_std", "perplexity", 0, INF, "population standard deviation of it"),
    ("base_model_perplexity", "perplexity", 1, INF, "the same of the answer, given the question"),
    ("base_perplexity_std", "perplexity", 0, INF, "population standard deviation of it"),
    ("instruction_following_difficulty", "ratio", 0, INF, "mean loss(answer | question) / loss(answer)"),
)  # fmt: skip
ACTIVATION_COLUMNS = _group(
    "dynamic",
    ("avg_activation_sparsity", "share", 0, 1, "share of MLP activations below 10% of their token's root mean square"),
)
PROBE_COLUMNS = _group(
    "dynamic",
    ("perplexity_change_rate", "ratio", -1, INF, "(held-out answer perplexity after the probe - before) / before"),
    ("initial_loss", "nats a token", 0, INF, "held-out loss before the probe's first step"),
    ("loss_decay_rate", "ratio", -INF, 1, "(initial - final held-out loss) / initial"),
    ("loss_stability", "score", 0, 1, "1 / (1 + standard deviation of step losses around their linear trend)"),
    ("avg_grad_norm", "L2 norm", 0, INF, "mean global norm of the adapter's gradient before clipping"),
    ("gradient_consistency", "cosine", -1, 1, "mean pairwise cosine between the probe's micro-batch gradients"),
    ("avg_grad_sparsity", "share", 0, 1, "share of gradient entries below 1% of their tensor's root mean square"),
    ("avg_param_change", "L2 norm", 0, INF, "norm of the adapter's change from its start"),
    ("relative_weight_update", "ratio", 0, INF, "mean over modules of norm((alpha / r) B A) / norm(frozen weight)"),
    ("landscape_flatness", "score", 0, INF, "1 / (1 + s), s = held-out loss at w + 0.05 g / norm(g) minus loss at w"),
    ("catastrophic_forgetting", "ratio", -1, INF, "relative rise of the loss on general-knowledge texts"),
)  # fmt: skip
BOOKKEEPING_COLUMNS = _group(
    "bookkeeping",
    ("static_valid_count", "examples", 0, INF, "examples of the sample that could be measured"),
    ("static_skipped_count", "examples", 0, INF, "examples of the sample that could not"),
    ("static_imputed_count", "features", 0, INF, "features filled in without a measurement: none ever is"),
    ("static_coverage", "share", 0, 1, "share of the static features that are not null"),
    ("feature_notes", "text", -INF, INF, "why a feature is null"),
)  # fmt: skip

RUN_COLUMNS = _group(
    "run",
    ("dataset", "text", -INF, INF, "the file's name"),
    ("status", "text", -INF, INF, "ok or error"),
    ("error", "text", -INF, INF, "why there is no feature"),
    ("model", "text", -INF, INF, "the base model"),
    ("quantization", "text", -INF, INF, "how it lies in memory: none, 8bit or 4bit"),
    ("seed", "number", 0, INF, "mixed with the dataset's content into every seed"),
    ("sample_size", "examples", 0, INF, "examples that the model looks at (0: all)"),
    ("probe_steps", "steps", 0, INF, "optimizer steps of the probe (0: none)"),
    ("data_hash", "text", -INF, INF, "what the file holds"),
    ("text_seconds", "seconds", 0, INF, "of the features of size and text, part of static_seconds"),
    ("static_seconds", "seconds", 0, INF, "of all features without a probe"),
    ("probe_seconds", "seconds", 0, INF, "of the probe"),
    ("features_seconds", "seconds", 0, INF, "of both"),
)  # fmt: skip

STATIC_COLUMNS = (*TEXT_COLUMNS, *SEMANTIC_COLUMNS, *PERPLEXITY_COLUMNS, *ACTIVATION_COLUMNS)
COLUMNS = (*STATIC_COLUMNS, *PROBE_COLUMNS, *BOOKKEEPING_COLUMNS)
STATIC_NAMES = tuple(column.name for column in STATIC_COLUMNS)
PROBE_NAMES = tuple(column.name for column in PROBE_COLUMNS)
FEATURE_NAMES = tuple(column.name for column in COLUMNS)


def describe_columns(columns: Sequence[FeatureColumn] = COLUMNS) -> str:
    """Columns with unit, range and definition, as a Markdown table; README's is that of the features."""
    lines = ["| column | unit | range | definition |", "| --- | --- | --- | --- |"]
    for column in columns:
        ends = [f"{end:g}" if math.isfinite(end) else "" for end in (column.minimum, column.maximum)]
        reach = f"{ends[0]} to {ends[1]}" if all(ends) else f"from {ends[0]}" if ends[0] else f"to {ends[1]}"
        lines.append(f"| `{column.name}` | {column.unit} | {reach if any(ends) else ''} | {column.definition} |")
    return "\n".join(lines)
