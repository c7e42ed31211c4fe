"""The page of a finished or half-finished run, written anew.

python -m raylora.report results/chunk_001
python -m raylora.report results/chunk_001 --price 2.5    # of a GPU-hour, for the costs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from raylora.errors import UserError
from raylora.report.page import write_report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def main(argv: list[str]) -> int:
    parser = _Parser(prog="python -m raylora.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a run's folder, such as results/chunk_001")
    parser.add_argument("--price", type=float, help="price of a GPU-hour, in your currency")
    options = parser.parse_args(argv)
    if options.price is not None and not 0 <= options.price < float("inf"):
        raise UserError(f"--price: expected a price of a GPU-hour, from 0 up, got {options.price}")
    try:
        path = write_report(options.folder, options.price)
    except OSError as error:
        raise UserError(f"{options.folder}: the report cannot be written there: {error.strerror}") from error
    print(path)
    return 0
