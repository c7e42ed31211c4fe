"""The Python API, with the names of the research code that users come from; it calls what the commands call.

``raylora.run``, which is new, is in ``run/from_python.py``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from pydantic import ValidationError

from raylora.config.keywords import ConfigKeywords, EvaluationKeywords, RunKeywords
from raylora.config.method import Method
from raylora.config.options import MASKED, ModelOptions
from raylora.config.run import Config, EvaluationConfig, load_config
from raylora.config.sources import explain, load_settings
from raylora.console import make_console
from raylora.data import datasets
from raylora.data.columns import check_columns
from raylora.data.encoding import StoredEncoded, encode_each
from raylora.data.rendered import TemplateCounts
from raylora.data.template_check import hold_to_counts
from raylora.errors import ErrorKind, OutOfMemoryError, UserError, one_line
from raylora.experiment.story import run_experiment as run_planned_experiment
from raylora.experiment.workbench import Workbench, use_threads
from raylora.mmlu.prompts import encode_questions, thinking_of
from raylora.mmlu.question_set import load_question_set
from raylora.mmlu.scoring import evaluate
from raylora.mmlu.statistics import summarize
from raylora.model.adapter_files import ONLY_IN_LAYERS, check_adapter, note_on_base
from raylora.model.adapters import LoadedModel
from raylora.model.loading import as_loaded, borrowed, context_window, load_model
from raylora.model.lora_config import check_options, going_on
from raylora.model.memory import is_out_of_memory
from raylora.planning.plan import find_files, make_plan
from raylora.records import Dataset, Example, Score
from raylora.rows import load_results
from raylora.run.execute import run_plan
from raylora.run.pushes import Pushes, pushing
from raylora.storage.hub_names import dataset_location
from raylora.storage.legacy import legacy_result
from raylora.training.loop import train_adapter

log = logging.getLogger("raylora")


class FineTuner:
    """Train one adapter, step by step.

    >>> tuner = FineTuner(model="demo")
    >>> dataset = tuner.prepare_context_dataset("train.json")
    >>> model, tokenizer, lora = tuner.prepare_model()
    >>> tuner.train(dataset, model, tokenizer, lora)["training_metrics"]

    Args:
        options: any option of the batch command, such as ``model``, ``quantization`` or ``num_epochs``.

    Raises:
        UserError: an option is unknown or its value does not fit.
    """

    def __init__(self, **options: Unpack[ConfigKeywords]) -> None:
        self.config: Config = load_config(**options)
        self._loaded: LoadedModel | None = None

    def __repr__(self) -> str:
        given = sorted({"model", "quantization", *self.config.model_fields_set})
        options = ", ".join(f"{name}={getattr(self.config, name)!r}" for name in given)
        return f"FineTuner({options}): {'the model is loaded' if self._loaded else 'no model is loaded yet'}"

    def prepare_context_dataset(self, path: str | Path) -> Dataset:
        """Read a dataset file in any of the formats of the batch command, or ``hf://datasets/org/name`` of the hub.

        Raises:
            UserError: the file cannot be read, or holds no valid record.
            MachineError: it is large, and there is no room for it.
        """
        config = self.config
        check_columns(config.column_names)
        return datasets.read_dataset(
            dataset_location(path), config.salvage, config.max_records, config.column_names, config.max_record_chars
        )

    def prepare_model(self) -> tuple[Any, Any, dict[str, Any]]:
        """The quantized base model, its tokenizer, and the hyperparameters of the adapter.

        Raises:
            UserError: there is no such model, or options of the adapter do not go with it.
        """
        method = self.config.method()
        check_options(method, self.config.quantization, bool(self.config.max_memory))
        self._loaded = self._loaded or load_model(ModelOptions(**self.config.settings_of(ModelOptions)))
        if method.init_adapter:
            method = going_on(method, self.config.model_fields_set, self._loaded.source)
        return self._loaded.model, self._loaded.tokenizer, method.model_dump()

    def train(
        self,
        dataset: Dataset | Sequence[Example],
        model: Any,
        tokenizer: Any,
        lora_config_info: dict[str, Any],
        output_dir: str | Path | None = None,
    ) -> dict[str, Any]:
        """Train a new adapter on ``model``. It replaces the last one, and stays active in the model.

        Args:
            dataset: what ``prepare_context_dataset`` returned, or Examples.
            lora_config_info: hyperparameters, as ``prepare_model`` returned them or changed.
            output_dir: where the adapter is saved, in PEFT's format; None: nowhere.

        Returns:
            ``num_refused``, examples that the chat template refuses; ``template_note``, what it leaves out of others;
            ``training_metrics`` (seconds, losses, counts and rates), ``loss_curve`` (a dict for each optimizer step),
            ``adapter_path``.

        Raises:
            UserError: a hyperparameter is unknown, or its value does not fit; no example has a supervised token; or the
                chat template refuses all, or cuts most answers.
            TrainingDivergedError: the loss became infinite or NaN.
            OutOfMemoryError: a single example does not fit; a RayloraError, too.
        """
        if self._loaded is None or self._loaded.model is not model:
            self._loaded = as_loaded(model, tokenizer)
        loaded, method = self._loaded, _method_of(lora_config_info)
        if not isinstance(dataset, Dataset):
            dataset = Dataset("", tuple(dataset), len(dataset), 0)
        seed = (dataset.seed ^ method.seed) % 2**62
        ordered = datasets.sample_examples(dataset.examples, 0, seed)
        loaded.detach()
        counts = TemplateCounts()
        encoded = StoredEncoded(encode_each(tokenizer, ordered, method.max_length, counts))
        parameters = loaded.attach(method, seed, examples=encoded)
        note = hold_to_counts(replace(dataset, examples=ordered), counts).template_note
        with _memory_explained():
            result = train_adapter(loaded, parameters, encoded, method, seed)
        if output_dir is not None:
            loaded.save_adapter(Path(output_dir))
        metrics = {**vars(result.metrics), "train_runtime": result.metrics.train_seconds}
        return {
            "num_refused": len(counts.refused),
            "template_note": note,
            "training_metrics": metrics,
            "loss_curve": result.loss_curve(),
            "adapter_path": str(output_dir) if output_dir is not None else None,
        }


def run_experiment(
    dataset_path: str | Path, max_samples: int | None = None, **options: Unpack[RunKeywords]
) -> dict[str, Any]:
    """Run one dataset through all stages in this process, without Ray.

    Args:
        dataset_path: a dataset file, a folder of shards, or ``hf://datasets/org/name`` of the hub.
        max_samples: MMLU questions asked (default: all).
        options: any option of the batch command.

    Returns:
        ``dataset``, ``status``, ``error``, ``training_info.training_metrics``, and ``results.finetuned_model`` and
        ``results.base_model``, each with ``overall_accuracy``, ``total_questions`` and ``correct_questions``.

    Raises:
        UserError: it cannot be run; ``kind`` says what kind of cause that has.
        MachineError: something changed under it, or the model cannot be loaded here.
    """
    path = dataset_location(dataset_path)
    config = _config(max_samples=max_samples, **options)
    plan = make_plan(config, [path], "single")
    if len(plan.experiments) != 1:
        raise UserError(f"grid, repeats: {len(plan.experiments)} experiments, and one is run here; use process_folder")
    use_threads(config)
    with plan.store.held(config.fresh):
        bench = Workbench(config, plan.store)
        (experiment,) = plan.experiments
        row = plan.done().get(experiment.experiment_id)
        if row is None:
            plan.check_fit()
            plan.write_columns()
            row = run_planned_experiment(bench, experiment)
        with pushing(Pushes(plan, make_console()), [row]):
            pass
    if not row.ok:
        raise UserError(row.values["error"], kind=ErrorKind(row.values.get("error_kind") or ""))
    return legacy_result(row)


def process_folder(
    folder_name: str, max_samples: int | None = None, **options: Unpack[RunKeywords]
) -> list[dict[str, Any]]:
    """Run all datasets of a chunk, on every GPU, as the batch command does.

    Args:
        folder_name: the chunk.
        max_samples: MMLU questions asked (default: all).
        options: any other option of the batch command.

    Returns:
        A result for each experiment, failed ones too, as ``run_experiment`` returns it.

    Raises:
        UserError: an option or the chunk cannot be used.
    """
    config = _config(chunk=folder_name, max_samples=max_samples, **options)
    chunk, files = find_files(config)
    rows = run_plan(make_plan(config, files, chunk), make_console())
    return [legacy_result(row) for row in rows]


def evaluate_mmlu(
    base_model_path: str,
    adapter_path: str | Path | None = None,
    dataset_path: str | Path | None = None,
    batch_size: int = 4,
    max_samples: int | None = None,
    **options: Unpack[EvaluationKeywords],
) -> dict[str, Any]:
    """Load a model, with or without an adapter, and score it on MMLU.

    Args:
        dataset_path: questions; without it ``mmlu_dataset/test_all_subjects.json``.
        batch_size: ignored, and accepted for callers of the research code: batches are filled up to ``token_budget``.
        max_samples: questions asked, a seeded sample stratified by subject (default: all).
        options: any option of ``python -m raylora.mmlu``, such as ``num_fewshot`` or ``quantization``.

    Returns:
        What ``evaluate_mmlu_with_model`` returns.

    Raises:
        UserError: the model, the adapter or the questions cannot be used.
    """
    config = _evaluation_config(dataset_path, max_samples, {**options, "model": base_model_path})
    if adapter_path is not None:
        check_adapter(Path(adapter_path))
    for name in config.question_sets:  # so that a bad file is an error before the model is loaded
        load_question_set(config, name)
    loaded = load_model(ModelOptions(**config.settings_of(ModelOptions)))
    if adapter_path is not None:
        if note := note_on_base(Path(adapter_path), loaded.source):
            log.warning("%s: %s", adapter_path, note)
        loaded.attach_saved(Path(adapter_path))
    return _evaluate_with(config, loaded.model, loaded.tokenizer)


def evaluate_mmlu_with_model(
    model: Any,
    tokenizer: Any,
    dataset_path: str | Path | None = None,
    batch_size: int = 4,
    max_samples: int | None = None,
    **options: Unpack[EvaluationKeywords],
) -> dict[str, Any]:
    """Score a loaded model on MMLU as it is now, its active adapter included; arguments as in ``evaluate_mmlu``.

    A model that the caller has loaded in 8 bits computes with LLM.int8 here too, and a line in the log says so: the
    options ``quantization`` and ``int8_activations`` are for models that raylora loads.

    Returns:
        ``overall_accuracy`` (0 to 1), ``total_questions``, ``correct_questions``, ``overall_stderr``,
        ``overall_stderr_clustered`` (for other questions like these, of subjects like these), ``macro_accuracy``,
        ``balanced_accuracy`` (mean over right letters), ``prediction_share_a`` to ``_d`` (of the answers),
        ``correct_probability`` (mean over questions, 0 to 1) and ``brier`` (0 to 2), both None for written answers,
        ``groups`` and ``subjects`` (a dict each), ``num_unparsed``, ``num_truncated``, ``thinking`` (empty,
        ``off``, ``closed`` or ``on``: docs/mmlu.md), and ``questions``, a DataFrame with a row for each question.
        With ``questions=("NAME=FILE",)`` or ``mask`` there is ``sets``, the same by name (``masked`` for the mask's).

    Raises:
        UserError: the questions cannot be used, the prompt style is ``chat`` and the tokenizer has no template, or the
            model is PEFT's with an adapter that does its work outside of the model's layers.
    """
    return _evaluate_with(_evaluation_config(dataset_path, max_samples, options), model, tokenizer)


def _evaluation_config(
    dataset_path: str | Path | None, max_samples: int | None, options: Mapping[str, Any]
) -> EvaluationConfig:
    given = _given(mmlu=str(dataset_path) if dataset_path is not None else None, max_samples=max_samples, **options)
    return load_settings(EvaluationConfig, None, "evaluate_mmlu", **given)


def _evaluate_with(config: EvaluationConfig, model: Any, tokenizer: Any) -> dict[str, Any]:
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UserError(f"{model.active_peft_config.peft_type.value}: {ONLY_IN_LAYERS}", kind=ErrorKind.ADAPTER)
    question_sets = {name: load_question_set(config, name) for name in config.question_sets}
    thinking = thinking_of(tokenizer, config.prompt_style, config.scoring)
    found: dict[str, Score] = {}
    for name, asked in question_sets.items():
        encoded = encode_questions(
            tokenizer,
            asked.questions,
            asked.shots,
            config.prompt_style,
            context_window(model),
            thinking,
            config.scoring,
        )
        with _memory_explained(), borrowed(model, tokenizer) as loaded:
            score = evaluate(
                loaded,
                encoded,
                config.scoring,
                config.token_budget,
                thinking=thinking,
                cloze_per=config.cloze_per,
            )
        found[name] = score
        if config.mask and not name:
            found[MASKED] = score.without(asked.masked)
    results = {
        name: {**summarize(score), "thinking": thinking, "questions": score.questions} for name, score in found.items()
    }
    first = results.pop("")
    return {**first, "sets": results} if results else first


def _method_of(values: dict[str, Any]) -> Method:
    try:
        return Method(**values)
    except ValidationError as error:
        raise UserError(explain(Method, error)) from None


@contextlib.contextmanager
def _memory_explained() -> Iterator[None]:
    """Raise raylora's own error where memory runs out: torch has several, of which some are a plain RuntimeError."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fix = "lower max_length or token_budget, or quantization='4bit'"
        raise OutOfMemoryError(f"a single example does not fit: {fix} ({one_line(error)})") from error


def _config(**options: Any) -> Config:
    config = load_config(**_given(**options))
    if config.dry_run:
        raise UserError("dry_run: a plan is printed by the commands alone: python -m raylora.batch --dry-run")
    return config


def _given(**options: Any) -> dict[str, Any]:
    """The options that the caller gave: those that are None keep their value from the environment, or their default."""
    return {name: value for name, value in options.items() if value is not None}


__all__ = ["FineTuner", "evaluate_mmlu", "evaluate_mmlu_with_model", "load_results", "process_folder", "run_experiment"]
