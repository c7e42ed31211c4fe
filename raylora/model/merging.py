"""A plain model out of a base and an adapter: PEFT's ``merge_and_unload`` on the unquantized base.

    W + (alpha / r) B A    in the place of W, rounded to the dtype of the base's files

Weights that the base ties (output head and embeddings) stay tied only where the adapter leaves them equal: PEFT would
add what it learned for one of the two to both.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file

from raylora.errors import ErrorKind, UserError, errors_are, one_line
from raylora.model.adapter_files import check_adapter, check_base, read_adapter_config, tensor_names
from raylora.model.adapters import LoadedModel
from raylora.model.loaded_weights import check_loaded, is_finite
from raylora.model.model_files import check_source
from raylora.model.sources import has_only_pickles, quiet_libraries, resolve_model
from raylora.records import digest
from raylora.storage.atomic import PARTIAL, write_atomically
from raylora.storage.places import cache_folder, caching, writing

GENERATION = "generation_config.json"
SHARD = "5GB"
"""The most that one safetensors file holds, as on the hub."""


@dataclass(frozen=True)
class Merged:
    """What was merged."""

    base: str
    """The folder or hub name that the base was read from."""
    num_parameters: int
    dtype: str
    notes: tuple[str, ...]


@errors_are(ErrorKind.ADAPTER)
def merge(folder: Path, output: Path, base: str | None = None, trust_remote_code: bool = False) -> Merged:
    """Write the model of a base and an adapter to ``output``, a folder that transformers loads without PEFT.

    Args:
        folder: from ``adapter_in``.
        output: there is none, or it is empty. It appears when all of it is written.
        base: as users name a model; None: what ``adapter_config.json`` names.

    Raises:
        UserError: one line: the adapter cannot be used or is of another base, the base is quantized or cannot be
            loaded, a merged number is not finite, or ``output`` cannot be written.
    """
    from transformers import GenerationConfig

    quiet_libraries()
    output = output.resolve()  # ``.`` has no name that another could be made of
    check_adapter(folder)
    tensor_names(folder)  # raises where the file is damaged
    check_output(output)
    config = read_adapter_config(folder)
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        raise UserError(f"{folder}: was trained for {task}: only adapters of causal language models are merged")
    source, revision = _source(folder, config, base)
    check_source(source, trust_remote_code)
    notes = check_base(folder, source)
    _check_finite(folder, load_file(folder / "adapter_model.safetensors"))
    model, tokenizer = _load(source, revision, trust_remote_code)
    kept_generation = _file_of(source, revision, GENERATION)
    merged = _merge(LoadedModel(model, tokenizer, source, "none"), folder)

    def write(partial: Path) -> None:
        # transformers refuses to write settings that it has read, such as a temperature without sampling.
        merged.generation_config = GenerationConfig()
        merged.save_pretrained(partial, max_shard_size=SHARD)
        tokenizer.save_pretrained(partial)
        (partial / GENERATION).unlink()
        if kept_generation is not None:
            shutil.copyfile(kept_generation, partial / GENERATION)

    with _one_at_a_time(output), writing("--output", output):
        check_output(output)
        try:
            write_atomically(output, write)
        except (SafetensorError, ValueError, RuntimeError) as error:  # a full disk is safetensors' own error
            raise UserError(f"--output {output}: cannot be written: {one_line(error)}") from error
    return Merged(source, sum(p.numel() for p in merged.parameters()), str(merged.dtype).split(".")[-1], notes)


def check_output(output: Path) -> None:
    """Check that a folder can be made at ``output`` without anything being lost.

    Raises:
        UserError: there is a file, or a folder that is not empty.
    """
    with writing("--output", output):
        if output.is_dir() and any(output.iterdir()):
            raise UserError(f"--output {output}: is not empty: give a folder that does not exist yet")
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output}: is a file: give a folder that does not exist yet")
        output.absolute().parent.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _one_at_a_time(output: Path) -> Iterator[None]:
    """Inside, no other merge of this machine writes to ``output``; what a killed one left half-written is deleted."""
    output, locks = output.absolute(), cache_folder() / "locks"
    with contextlib.ExitStack() as stack:
        with caching("a lock"):
            locks.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(locks / f"{digest(str(output), 32)}.lock"))
        for left in output.parent.glob(f"{PARTIAL}*-{output.name}"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _source(folder: Path, config: dict[str, Any], base: str | None) -> tuple[str, str | None]:
    """The base's folder or hub name, and the revision that the adapter's configuration asks for."""
    if base is not None:
        return resolve_model(base), None
    if not (named := config.get("base_model_name_or_path")):
        raise UserError(f"{folder / 'adapter_config.json'}: names no base: give it with --model")
    try:
        return resolve_model(str(named)), config.get("revision")
    except UserError as error:
        text = f"{folder}: its base {named} is not here: give the base's folder or hub name with --model"
        raise UserError(text) from error


@errors_are(ErrorKind.MODEL)
def _load(source: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """The base as its files have it, on the CPU, and its tokenizer as it is."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision:
        options["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if quantized := getattr(config, "quantization_config", None):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
            text = f"--model {source}: its weights are quantized ({getattr(method, 'value', method)}): "
            raise UserError(f"{text}give the model that it was made from")
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", use_safetensors=True, output_loading_info=True, **options
        )
        check_loaded(model, info, source, source)
    except UserError:
        raise
    except Exception as error:  # the hub's client, a damaged file's parser and a model's own code raise anything
        if has_only_pickles(source):
            raise UserError(f"--model {source}: its weights are pickle files: convert them to safetensors") from None
        raise UserError(f"--model {source}: cannot be loaded: {one_line(error)}") from error
    return model.eval().requires_grad_(False), tokenizer


def _file_of(source: str, revision: str | None, name: str) -> Path | None:
    """A file of a model, which was loaded just now; None where it has none."""
    from transformers.utils import cached_file

    found = cached_file(source, name, revision=revision or "main", _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def _merge(loaded: LoadedModel, folder: Path) -> Any:
    """The base with the adapter in its weights.

    Raises:
        UserError: the adapter is of another model, or cannot be merged, or a number is not finite.
    """
    tied = _tied(loaded.model)
    loaded.attach_saved(folder)
    if tied:
        _untie(loaded.model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of weights that are no longer tied
            merged = loaded.peft_model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        raise UserError(f"{folder}: cannot be merged into {loaded.source}: {one_line(error)}") from error
    _check_finite(folder, merged.state_dict())
    if tied:
        _tie_again(merged)
    vars(merged).pop("peft_config", None)
    return merged


def _check_finite(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check an adapter's tensors, or those that it was merged into.

    Raises:
        UserError: a number is NaN or infinite.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(f"{folder}: its {name} is not finite in {str(tensor.dtype).split('.')[-1]}")


def _tied(model: Any) -> bool:
    """Whether the output head and the embeddings are one tensor."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def _inner(module: Any) -> Any:
    """The base's own module within PEFT's wrappers."""
    for name in ("original_module", "base_layer"):
        while hasattr(module, name):
            module = getattr(module, name)
    return module


def _untie(model: Any) -> None:
    head, embeddings = (_inner(m) for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    if head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _tie_again(model: Any) -> None:
    """Tie the head where it still equals the embeddings; the configuration says which of both is the case."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if is_tied := torch.equal(head.weight, embeddings.weight):
        head.weight = embeddings.weight
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = is_tied
