"""The files of a model's folder: which are loaded, what they say of sizes and of code, before anything is built.

A folder comes from a stranger. Its index may name files elsewhere, its configuration may ask for ten million layers or
for code of the hub: each is one line here. Reading the headers of an 8B model's files takes some milliseconds.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from raylora.errors import ErrorKind, UserError, errors_are, one_line, reason

CONFIG = "config.json"
SETTINGS = (CONFIG, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files of a model's folder that hold a JSON object of settings."""
MOST_SETTINGS_BYTES = 16 << 20
"""Bytes of a file of settings, at most (16 MiB): the largest tokenizer_config.json on the hub has a tenth of it."""
ADAPTER_CONFIG = "adapter_config.json"
_LAYERS = re.compile(r"(n|num|encoder|decoder)_(\w+_)?layers?")
"""Names of options that count layers, as families of models have them."""
_SIZES = re.compile(
    r"(?!.*(chunk|window|image|batch|group|block)_size)(\w+_)?(size|dim|embd|inner|d_model|d_ff|heads|experts)"
)
"""Those that are axes of weights."""
_WIDTHS = ("hidden_size", "n_embd", "d_model", "vocab_size")
"""Sizes that every model has a whole axis of."""
MOST_LAYERS = 10_000
MOST_SIZE = 1 << 25
"""What is believed where there is no file to compare with. The longest list of tokens on the hub has 2^18."""
MANY_TENSORS = 1_000
"""As many layers may be named whatever the files have: building them without numbers takes a second or two."""
_NOT_OF_EACH_OTHER = "they do not belong together, or weights are missing"
_KERNEL = re.compile(r"(attn|experts)_implementation(_internal)?")


def read_settings(path: Path, most: int = MOST_SETTINGS_BYTES) -> dict[str, Any]:
    """The JSON object in a file that somebody else has written.

    Raises:
        UserError: it is no regular file, larger than ``most`` bytes, or no JSON object.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: is no regular file")
        if found.st_size > most:
            raise UserError(f"{path}: has {found.st_size:,} bytes, and a file of settings at most {most:,}")
        value = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: not UTF-8 (byte {error.start + 1})") from error
    except RecursionError as error:
        raise UserError(f"{path}: cannot be read: its lists and objects lie too deep in each other") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is no JSON object")
    return value


@errors_are(ErrorKind.MODEL)
def check_folder(folder: Path) -> None:
    """Check the files of a model's folder that say what is loaded, and as what.

    Raises:
        UserError: one cannot be read, an index names a file outside of the folder, the configuration does not agree
            with the files of weights, or the folder is an adapter's, whose base would be loaded from another place.
    """
    settings = {name: read_settings(folder / name) for name in SETTINGS if (folder / name).exists()}
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{folder}: has an {ADAPTER_CONFIG} beside its {CONFIG}: transformers would load the base that this names "
            "from elsewhere; give the base as --model, or `raylora merge` the adapter"
        )
    check_sizes(folder / CONFIG, settings.get(CONFIG, {}), tensor_shapes(folder))


def indexed_files(folder: Path) -> list[Path]:
    """The files that indexes of weights name, in order.

    Raises:
        UserError: an index cannot be read, or names a file outside of the folder.
    """
    named: dict[str, None] = {}
    for index in sorted(folder.glob("*.index.json")):
        weight_map = read_settings(index, 8 * MOST_SETTINGS_BYTES).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: has no weight_map, the object that names a file for each weight")
        for name in map(str, weight_map.values()):
            if name not in named and leads_outside(name):
                raise UserError(f"{index}: names {name}, which is outside of the model's folder")
            named[name] = None
    return [folder / name for name in sorted(named)]


def leads_outside(name: str) -> bool:
    """Whether a file's name, as a folder's index has it, may lead out of the folder. What is a link is not followed."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return bool(posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a folder's weights are loaded from: those of its index, or all of its own.

    Raises:
        UserError: see ``indexed_files``.
    """
    indexed = [path for path in indexed_files(folder) if path.suffix == ".safetensors"]
    single = folder / "model.safetensors"  # is taken before an index
    files = [single] if single.is_file() else indexed or sorted(folder.glob("*.safetensors"))
    return [path for path in files if path.is_file()]


def files_below(folder: Path) -> Iterator[Path]:
    """Files in a folder's own folders that are loaded with a model: weights by an index, code, and chat templates."""
    yield from (path for path in indexed_files(folder) if path.parent != folder and path.is_file())
    for suffix in ("py", "jinja"):
        yield from (path for path in folder.glob(f"*/**/*.{suffix}") if path.is_file())


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a folder's safetensors files by name; empty where one is damaged, which loading it will say.

    Raises:
        UserError: see ``indexed_files``.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return {}
    return shapes


def check_sizes(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a configuration asks for no more layers, and no larger ones, than there are weights for.

    Args:
        path: of the configuration.
        shapes: from ``tensor_shapes``; empty: they are not known, and only what no model has is refused.

    Raises:
        UserError: it does. To build such a model, even without its numbers, would take hours, or all memory.
    """
    axes = {axis for shape in shapes.values() for axis in shape}
    most_layers = max(MANY_TENSORS, len(shapes)) if shapes else MOST_LAYERS
    # Twice: some sizes are those of two matrices that lie in one.
    most_size = 2 * max(axes) if axes else MOST_SIZE
    for key, value in _numbers(config):
        if _LAYERS.fullmatch(key) and value > most_layers:
            there = f"its files have {len(shapes)} tensors" if shapes else "no model has so many"
            raise UserError(f"{path}: {key} is {value}, and {there}: {_NOT_OF_EACH_OTHER}")
        if _SIZES.fullmatch(key) and value > most_size:
            there = f"no tensor of its files has an axis above {max(axes)}" if axes else "no model has so many"
            raise UserError(f"{path}: {key} is {value}, and {there}: {_NOT_OF_EACH_OTHER}")
    for key in _WIDTHS if axes and "auto_map" not in config else ():
        width = config.get(key)
        if isinstance(width, int) and not isinstance(width, bool) and width not in axes:
            text = f"{key} is {width}, and no tensor of its files has an axis of that length"
            raise UserError(f"{path}: {text}: {_NOT_OF_EACH_OTHER}")


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Numbers in a configuration, and in those of its parts, with their names."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield str(key), number


def folder_of(source: str) -> Path | None:
    """The folder of a model; of one of the hub that in this machine's cache, None where it is not there."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(source, CONFIG)
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


@errors_are(ErrorKind.MODEL)
def check_source(source: str, trust_remote_code: bool) -> None:
    """Check, before a model is built, that its files agree, and that it runs no code that the user does not trust.

    Args:
        source: from ``resolve_model``.

    Raises:
        UserError: see ``check_folder``; or its configuration names a kernel of the hub, which is code.
    """
    if (folder := folder_of(source)) is None:  # loading it will say so, or fetch it
        return
    if not Path(source).is_dir():
        check_folder(folder)
    kernel = None if trust_remote_code else _kernel_of(read_settings(folder / CONFIG))
    if kernel:
        raise UserError(
            f"--model {source}: its {CONFIG} names the kernel {kernel}, code that would be fetched from the hub and "
            "run: take that out, or give --trust-remote-code if you trust who made it"
        )


def _kernel_of(config: Any) -> str | None:
    """A kernel of the hub, ``owner/name``, that a configuration or one of its parts names; None where there is none."""
    for key, value in config.items():
        if _KERNEL.fullmatch(str(key).lstrip("_")):
            named = _texts(value)
            if kernel := next((text for text in named if "/" in text), None):
                return kernel
        elif isinstance(value, dict) and (kernel := _kernel_of(value)):
            return kernel
    return None


def _texts(value: Any) -> list[str]:
    """A text, or those that an object holds at any depth: implementations are named for each part of a model."""
    if isinstance(value, dict):
        return [text for part in value.values() for text in _texts(part)]
    return [value] if isinstance(value, str) else []
