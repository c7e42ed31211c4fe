"""Twenty-four small datasets of the demo's material, so that ``benchmarks.outcomes`` has many real pairs to compare.

    python -m benchmarks.small_datasets FOLDER
    python -m raylora.batch --config configs/demo.yaml --data-root FOLDER --chunk small --stages train,mmlu
    python -m benchmarks.outcomes results/small

Of each of four of the demo's datasets 4, 7 and 10 records, drawn twice. The repeated facts are not among them: drawn
records of theirs would be the same ones.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from raylora.data.datasets import read_dataset
from raylora.errors import UserError
from raylora.planning.plan import DEMO_CHUNK, DEMO_FOLDER
from raylora.records import Message

SOURCES = ("country_facts.json", "country_wrong_facts.jsonl", "general_knowledge.json", "shuffled_answers.jsonl")
SIZES = (4, 7, 10)
NUM_DRAWS = 2


def write_datasets(folder: Path) -> list[Path]:
    """Write ``folder/small/*.jsonl``, and say where."""
    (folder / "small").mkdir(parents=True, exist_ok=True)
    paths = []
    for source in SOURCES:
        examples = read_dataset(DEMO_FOLDER / DEMO_CHUNK / source).examples
        records = [{"messages": [*map(vars, (*e.messages, Message("assistant", e.answer)))]} for e in examples]
        for size in SIZES:
            for draw in range(NUM_DRAWS):
                path = folder / "small" / f"{source.partition('.')[0]}_{size:02d}_{'ab'[draw]}.jsonl"
                drawn = random.Random(f"{source} {size} {draw}").sample(records, size)
                path.write_text("".join(json.dumps(record) + "\n" for record in drawn), encoding="utf-8")
                paths.append(path)
    return paths


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("give a folder to write to")
    print(f"{len(write_datasets(Path(sys.argv[1])))} datasets in {sys.argv[1]}/small")


if __name__ == "__main__":
    main()
