"""Train, evaluate and describe every dataset of a chunk.

python -m raylora.batch --chunk chunk_001
"""

from __future__ import annotations

import sys

from rich.console import Console

from raylora.config.options import DEMO
from raylora.config.run import Config
from raylora.console import make_console, print_notes
from raylora.data import datasets
from raylora.errors import UserError


def run(config: Config) -> int:
    console = make_console()
    config = ask_for_chunk(config, console)
    # Imported here: torch and transformers take seconds to import, and the question for the chunk does not need them.
    from raylora.planning.plan import DEMO_CHUNK, find_files, make_plan
    from raylora.planning.show_plan import print_plan
    from raylora.report.terminal import print_results
    from raylora.run.execute import run_plan
    from raylora.run.pushes import Pushes

    chunk, files = find_files(config)
    plan = make_plan(config, files, chunk)
    print_notes(console, plan.notes)
    if config.dry_run:
        print_plan(plan, console)
        return 0
    pushes = Pushes(plan, console)
    rows = run_plan(plan, console, pushes=pushes)
    print_results(rows, plan.store, console)
    if config.model == DEMO:
        next_chunk = "YOUR_CHUNK" if chunk == DEMO_CHUNK else chunk
        console.print(f"Next: python -m raylora.batch --chunk {next_chunk} --model YOUR_MODEL (see --help)")
    return 0 if all(row.ok for row in rows) and not pushes.failures else 1


def ask_for_chunk(config: Config, console: Console) -> Config:
    """If no chunk is named and the command runs at a terminal, list the chunks and ask for one.

    Raises:
        UserError: none was chosen.
    """
    if config.chunk is not None or config.dataset or not (sys.stdin.isatty() and sys.stdout.isatty()):
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
