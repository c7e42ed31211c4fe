"""The row of an experiment: its columns, how a row is made, and how a table of rows is read."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pandas as pd

from raylora.config.method import Method
from raylora.config.run import Config
from raylora.errors import DamagedError, ErrorKind, UserError, one_line, reason
from raylora.records import Experiment, ResultRow
from raylora.storage import csv_files
from raylora.storage.digests import checked_parquet
from raylora.storage.places import location, open_regular, reading
from raylora.texts import shown_line, shown_values


@dataclass(frozen=True)
class FeatureColumn:
    """One column of features. ``minimum`` and ``maximum`` bound the values that it can have."""

    name: str
    group: str
    unit: str
    minimum: float
    maximum: float
    definition: str


def column_group(group: str, *columns: tuple[str, str, float, float, str]) -> tuple[FeatureColumn, ...]:
    """Columns of one group, each given as name, unit, minimum, maximum and definition."""
    return tuple(FeatureColumn(name, group, *rest) for name, *rest in columns)  # type: ignore[arg-type]


INF = math.inf
TEXT_COLUMNS = column_group(
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
SEMANTIC_COLUMNS = column_group(
    "semantic",
    ("semantic_diversity", "1 - cosine", 0, 2, "1 - mean pairwise cosine of the examples' embeddings"),
    ("io_similarity", "cosine", -1, 1, "mean cosine between question's and answer's mean token states"),
    ("semantic_consistency", "cosine", -1, 1, "mean pairwise cosine of an answer's sentences (two or more)"),
    ("embedding_outlier_ratio", "share", 0, 1, "share of 50 embeddings or more that isolation forests call outlying"),
)  # fmt: skip
PERPLEXITY_COLUMNS = column_group(
    "perplexity",
    ("reference_perplexity", "perplexity", 1, INF, "mean over examples of exp(token loss) of question and answer"),
    ("reference_perplexity_std", "perplexity", 0, INF, "population standard deviation of it"),
    ("base_model_perplexity", "perplexity", 1, INF, "the same of the answer, given the question"),
    ("base_perplexity_std", "perplexity", 0, INF, "population standard deviation of it"),
    ("instruction_following_difficulty", "ratio", 0, INF, "mean loss(answer | question) / loss(answer)"),
)  # fmt: skip
ACTIVATION_COLUMNS = column_group(
    "dynamic",
    ("avg_activation_sparsity", "share", 0, 1, "share of MLP activations below 10% of their token's root mean square"),
)
PROBE_COLUMNS = column_group(
    "dynamic",
    ("perplexity_change_rate", "ratio", -1, INF, "(held-out answer perplexity after the probe - before) / before"),
    ("initial_loss", "nats per token", 0, INF, "held-out loss before the probe's first step"),
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
MEASUREMENT_COLUMNS = column_group(
    "bookkeeping",
    ("static_valid_count", "examples", 0, INF, "examples of the sample that could be measured"),
    ("static_skipped_count", "examples", 0, INF, "examples of the sample that could not"),
    ("static_imputed_count", "features", 0, INF, "features filled in without a measurement: none ever is"),
    ("static_coverage", "share", 0, 1, "share of the static features that are not null"),
    ("feature_notes", "text", -INF, INF, "why a feature is null, or depends on the sample's size"),
)  # fmt: skip

STATIC_COLUMNS = (*TEXT_COLUMNS, *SEMANTIC_COLUMNS, *PERPLEXITY_COLUMNS, *ACTIVATION_COLUMNS)
FEATURE_COLUMNS = (*STATIC_COLUMNS, *PROBE_COLUMNS, *MEASUREMENT_COLUMNS)
STATIC_NAMES = tuple(column.name for column in STATIC_COLUMNS)
PROBE_NAMES = tuple(column.name for column in PROBE_COLUMNS)
FEATURE_NAMES = tuple(column.name for column in FEATURE_COLUMNS)


@dataclass(frozen=True)
class TrainingMetrics:
    """Seconds, counts and rates of a training; losses are natural-log cross entropies per supervised token."""

    train_initial_loss: float
    train_final_loss: float
    train_loss: float
    train_seconds: float
    num_train_examples: int
    num_train_steps: int
    num_train_tokens: int
    num_supervised_tokens: int
    train_samples_per_second: float
    train_steps_per_second: float
    train_tokens_per_second: float
    peak_memory_bytes: int
    micro_batch_size: int
    """Examples in the fullest minibatch."""
    num_oom_backoffs: int
    packed: bool
    """Whether minibatches held no padding."""
    graphed: bool
    """Whether passes were replayed as CUDA graphs, on a GPU."""
    num_adapters: int
    """Adapters that were trained in the same forward and backward passes. Seconds are this one's share, by tokens."""
    num_trained_parameters: int = 0
    """Numbers that were trained: the adapter's, and with them biases, whole modules, DoRA's magnitudes."""
    adapter_forward: str = ""
    """Whose forward pass computed the adapted layers: ``raylora`` (its own products, the fast ones), ``peft``, or
    ``raylora,peft``, some layers by each."""
    train_notes: str = ""
    """What is odd about the adapter; empty where nothing is."""


RESULT_COLUMNS = (
    "dataset", "experiment_id", "status", "error", "error_kind", "overall_accuracy", "base_overall_accuracy",
    "accuracy_change", "accuracy_change_low", "accuracy_change_high", "mcnemar_p_value", "num_gained", "num_lost",
    "balanced_accuracy",
    "base_balanced_accuracy", "balanced_accuracy_change", "balanced_accuracy_change_low",
    "balanced_accuracy_change_high", "prediction_share_a", "prediction_share_b", "prediction_share_c",
    "prediction_share_d", "base_prediction_share_a", "base_prediction_share_b", "base_prediction_share_c",
    "base_prediction_share_d", "correct_probability", "base_correct_probability", "correct_probability_change",
    "correct_probability_change_low", "correct_probability_change_high", "correct_probability_p_value", "brier",
    "base_brier", "brier_change", "mmlu_note", "total_questions", "correct_questions", "base_correct_questions",
    "overall_stderr", "base_overall_stderr", "overall_stderr_clustered", "base_overall_stderr_clustered",
    "macro_accuracy", "base_macro_accuracy", "accuracy_stem", "accuracy_humanities", "accuracy_social_sciences",
    "accuracy_other",
    "num_unparsed", "base_num_unparsed", "num_truncated",
    "num_held_out_examples", "held_out_loss", "base_held_out_loss", "held_out_loss_change", "transfer_mean_change",
    "num_forgotten", "transfer_note",
)  # fmt: skip
RUN_RECORD_COLUMNS = (
    "model", "quantization", "int8_activations", "device", "prompt_style", "scoring", "cloze_per", "thinking",
    "num_fewshot", "max_samples", "sample_size", "probe_steps", "question_seed", "data_hash", "dataset_source",
    "num_examples",
    "record_form", "ignored_keys", "num_bad_records", "num_lost_records", "bad_records",
    "num_answers_cut", "template_note",
    "token_budget", "mmlu_oom_backoffs", "text_seconds",
    "static_seconds", "probe_seconds", "features_seconds", "mmlu_seconds", "transfer_seconds", "total_seconds",
    "estimated_seconds", "estimated_peak_memory_bytes", "num_attempts", "num_adapted_modules",
    "modules_without_adapter",
)  # fmt: skip
ROW_COLUMNS = [
    *RESULT_COLUMNS,
    *FEATURE_NAMES,
    *Method.model_fields,
    *TrainingMetrics.__dataclass_fields__,
    *RUN_RECORD_COLUMNS,
]

NAMES = ("dataset", "experiment_id")
CELL_VALUES = ("is_own", "num_examples", "num_tokens", "base_loss", "loss", "loss_change", "low", "high", "p_value")
"""What is measured of an adapter on a dataset's held-out examples, with ``--transfer``; whether it is its own."""


def make_row(config: Config, experiment: Experiment, status: str, **values: Any) -> ResultRow:
    """A row with every column, None where neither the experiment, the configuration nor ``values`` has a value."""
    settings = {k: ",".join(v) if isinstance(v, list) else v for k, v in experiment.settings.items()}
    identity = {
        "dataset": experiment.dataset,
        "experiment_id": experiment.experiment_id,
        "status": status,
        "error": "",
        "data_hash": experiment.data_hash,
        "dataset_source": experiment.dataset_source or None,
        "record_form": experiment.record_form,
        "ignored_keys": experiment.ignored_keys,
        "estimated_seconds": experiment.estimated_seconds,
        "estimated_peak_memory_bytes": experiment.estimated_peak_memory_bytes,
        "num_attempts": 1,
        "num_adapted_modules": experiment.num_adapted_modules,
        "modules_without_adapter": experiment.modules_without_adapter,
        **{name: getattr(config, name) for name in RUN_RECORD_COLUMNS if name in type(config).model_fields},
        **settings,
    }
    # Names stay as they are: rows are found by them.
    row = {**dict.fromkeys(ROW_COLUMNS), **identity, **values}
    return ResultRow({name: value if name in NAMES else shown_values(value) for name, value in row.items()})


def error_row(config: Config, experiment: Experiment, error: str, kind: ErrorKind, **values: Any) -> ResultRow:
    """The row of an experiment that failed: the cause on one line of at most 1000 characters, and its kind."""
    text = shown_line(" ".join(error.split()))[:1000]
    return make_row(config, experiment, "error", error=text, error_kind=kind.value, **values)


COUNTS = frozenset(
    {
        *(name for name, field in (Config.model_fields | Method.model_fields).items() if field.annotation is int),
        *(name for name, field in TrainingMetrics.__dataclass_fields__.items() if field.type == "int"),
        *(name for name in ROW_COLUMNS if name.endswith(("_questions", "_count", "_unparsed", "_backoffs"))),
        *(name for name in ROW_COLUMNS if name.startswith("num_")),
        "dataset_num_items", "max_samples", "token_budget",
    } - {"num_epochs"}
)  # fmt: skip
"""Columns of integers."""
CATEGORIES = frozenset(
    {
        "status", "error_kind", "model", "quantization", "prompt_style", "scoring", "cloze_per", "target_modules",
        "lr_scheduler", "train_on", "lora_variant", "init", "bias", "adapter_forward",
    }
)  # fmt: skip
"""Columns of texts with few different values."""
TEXTS = frozenset(
    {
        "dataset", "experiment_id", "error", "data_hash", "record_form", "ignored_keys", "bad_records",
        "dataset_source", "feature_notes", "template_note", "train_notes", "mmlu_note", "transfer_note", "dataset_name",
        "modules_without_adapter", "modules_to_save", "rank_pattern", "alpha_pattern", "init_adapter",
    }
)  # fmt: skip
"""Columns of names and notes."""


def load_results(place: str | Path) -> pd.DataFrame:
    """The table of a run with fixed types of columns, the same for CSV and Parquet and whichever rows failed.

    Counts are ``Int64`` and flags ``boolean``, both with null; other numbers ``float64``; texts that repeat from row to
    row (status, model, ...) ``category``; names and notes ``string``.

    Args:
        place: the run's folder, such as ``results/chunk_001``, or a table's file.

    Raises:
        UserError: there is no table, or none that can be read.
    """
    path = location(place)
    if not path.exists():
        raise UserError(f"{path}: no such table; give the folder of a run, such as results/chunk_001")
    table = read_table(path)
    return pd.DataFrame({str(name): tidy_column(str(name), table[name]) for name in table.columns}, index=table.index)


def read_csv(stream: IO[bytes] | Path) -> pd.DataFrame:
    """A CSV table with its names as they are: a dataset called 007 keeps its zeros, and one called null is no null.

    Cells that ``write_csv`` guarded are as they were.

    Raises:
        ValueError: a row has more cells than the header, or pandas cannot parse the text.
        UnicodeDecodeError: it is not UTF-8.
    """
    data = stream.read_bytes() if isinstance(stream, Path) else stream.read()
    options: dict[str, Any] = {"encoding": "utf-8-sig", "low_memory": False}
    table = csv_files.read_csv(io.BytesIO(data), **options)
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("rows have more cells than the header; names that hold commas must be quoted")
    text_columns = [name for name in table.columns if name_of_first(name) in TEXTS]
    texts = csv_files.read_csv(io.BytesIO(data), **options, usecols=text_columns, dtype="string", keep_default_na=False)
    for name in text_columns:
        table[name] = texts[name].where(texts[name] != "")
    return table


def _first_bad_byte(file: Path) -> int:
    """The offset of the first byte that is not UTF-8. pandas' own counts from the piece that it was decoding."""
    try:
        file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def name_of_first(column: str) -> str:
    """The first set's column that means the same: ``accuracy_change`` for ``accuracy_change[arc]``."""
    return column.partition("[")[0] if column.endswith("]") else column


def tidy_column(name: str, column: pd.Series) -> pd.Series:
    """A column of a run's table with the type that ``load_results`` promises."""
    name = name_of_first(name)
    if name in CATEGORIES:
        return column.astype("string").astype("category")
    if name in TEXTS:
        return column.astype("string").fillna("")
    values = column.dropna()
    if len(values) and values.astype(str).isin(["True", "False"]).all():
        return column.map(lambda v: str(v) == "True", na_action="ignore").astype("boolean")
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers.notna().sum() < len(values):  # some are words: a column that another version of raylora wrote
        return column.astype("string")
    numbers = numbers.astype("float64")
    return numbers.astype("Int64") if name in COUNTS and numbers.dropna().mod(1).eq(0).all() else numbers


def read_table(path: Path) -> pd.DataFrame:
    """A table from a CSV or Parquet file, or from the folder of a run.

    Raises:
        UserError: it is not there, cannot be read, or has no row.
    """
    file = path
    if path.is_dir():
        files = [path / name for name in ("results.parquet", "results.csv") if (path / name).is_file()]
        if not files:
            raise UserError(f"{path}: no results.csv or results.parquet here; give a table or the folder of a run")
        file = files[0]
    try:
        # Parquet is recognized by its first bytes, as the ending of a user's file may be anything.
        with reading(file), open_regular(file) as stream:
            is_parquet = stream.read(4) == b"PAR1"
            stream.seek(0)
            table = pd.read_parquet(checked_parquet(stream.read())) if is_parquet else read_csv(stream)
    except OSError as error:
        raise UserError(f"{file}: {reason(error)}; give a table or the folder of a run") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 at byte {_first_bad_byte(file)}; save it as UTF-8 CSV or Parquet") from None
    except DamagedError as error:
        raise UserError(f"{file}: damaged: {error}; the same batch command writes it again") from None
    except (ValueError, pd.errors.ParserError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{file}: no table can be read from it: {one_line(error)}") from None
    if table.empty:
        raise UserError(f"{file}: the table has no rows")
    return table
