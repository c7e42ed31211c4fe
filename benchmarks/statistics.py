"""Do intervals hold what they promise, and how often is nothing called something? Simulated, as a table in Markdown.

    python -m benchmarks.statistics                  all sections, some minutes on one core
    python -m benchmarks.statistics accuracy seeds   these alone

docs/mmlu.md and docs/prediction.md show its tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks.simulations.accuracy import accuracy
from benchmarks.simulations.predictor import predictor
from benchmarks.simulations.rate import Rate
from benchmarks.simulations.seeds import real_seeds, seeds

SECTIONS: dict[str, Callable[[], list[Rate]]] = {
    "accuracy": accuracy,
    "seeds": seeds,
    "real_seeds": real_seeds,
    "predictor": predictor,
}
"""By name, a function that makes its figures. Each is seeded."""


def markdown(rates: list[Rate]) -> str:
    """A table with a row for each rate."""
    lines = ["| what | setting | measured | wanted |", "| --- | --- | --- | --- |"]
    lines += [f"| {r.what} | {r.setting} | {r.rate:.3f} | {r.wanted} |" for r in rates]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.statistics")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    for name in parser.parse_args(argv).sections or SECTIONS:
        print(f"### {name}\n\n{markdown(SECTIONS[name]())}\n", flush=True)


if __name__ == "__main__":
    main()
