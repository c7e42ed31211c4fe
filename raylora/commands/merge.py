"""A plain model out of an adapter and its base.

raylora merge results/chunk_001/experiments/EXPERIMENT --output my_model
"""

from __future__ import annotations

from pathlib import Path

from raylora.commands.options import MergeConfig
from raylora.console import make_console, print_notes
from raylora.model.adapter_files import adapter_in, adapter_name
from raylora.model.merging import merge

FOLDER = Path("results/merged")


def run(config: MergeConfig) -> int:
    console, folder = make_console(), adapter_in(config.folder)
    output = config.output or FOLDER / adapter_name(folder)
    merged = merge(folder, output, config.model, config.trust_remote_code)
    print_notes(console, (f"{folder}: {note}" for note in merged.notes))
    size = f"{merged.num_parameters:,} parameters in {merged.dtype}"
    console.print(f"{output}: {merged.base} with {adapter_name(folder)}, {size}", soft_wrap=True)
    return 0
