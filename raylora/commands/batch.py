"""Train, evaluate and describe every dataset of a chunk.

    python -m raylora.batch --chunk chunk_001

Exit code 0: all rows are good; 1: some failed (they have rows too); 2: wrong use; 130: stopped by Ctrl-C.
"""

from __future__ import annotations

import sys

from rich.console import Console

from raylora.config import DEMO, Config, load_config
from raylora.console import make_console
from raylora.data import datasets
from raylora.errors import UserError


def main(argv: list[str]) -> int:
    console = make_console()
    config = ask_for_chunk(load_config(argv), console)
    # Only here: torch and transformers take seconds to import, which a mistake and --help need not wait for.
    from raylora.errors import StoppedError
    from raylora.planning.plan import DEMO_CHUNK, find_files, make_plan
    from raylora.planning.show_plan import print_plan
    from raylora.report.terminal import print_results
    from raylora.run.execute import how_to_go_on, run_plan
    from raylora.run.interrupts import exit_on_sigterm

    chunk, files = find_files(config)
    plan = make_plan(config, files, chunk)
    for note in plan.notes:
        console.print(f"Note: {note}", soft_wrap=True)
    if config.dry_run:
        print_plan(plan, console)
        return 0
    exit_on_sigterm()
    try:
        rows = run_plan(plan, console)
    except (KeyboardInterrupt, StoppedError) as stop:
        console.print(f"{stop or 'Stopped.'} {how_to_go_on(config)}", soft_wrap=True)
        return 130 if isinstance(stop, KeyboardInterrupt) else 1
    print_results(rows, plan.store, console)
    if config.model == DEMO:
        yours = "YOUR_CHUNK" if chunk == DEMO_CHUNK else chunk
        console.print(f"Next: python -m raylora.batch --chunk {yours} --model YOUR_MODEL (see --help)")
    return 0 if all(row.ok for row in rows) else 1


def ask_for_chunk(config: Config, console: Console) -> Config:
    """Where no chunk is named at a terminal: list those there are, and ask."""
    if config.chunk is not None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return config
    chunks = datasets.list_chunks(config.data_root)
    if not chunks:
        return config
    for i, chunk in enumerate(chunks, 1):
        console.print(f"{i:3d}  {chunk.name}")
    try:
        answer = console.input("Chunk, by number or name: ").strip()
    except EOFError:
        answer = ""
    if not answer:
        raise UserError("--chunk: none was chosen")
    return config.model_copy(update={"chunk": answer})
