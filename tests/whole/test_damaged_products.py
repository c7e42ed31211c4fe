"""Everything in ``--output`` may be damaged: it is made again, with one line, and the row is what it was.

A table of products and damages. Slow: each is a run of a tiny model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from raylora.commands.run_command import call_command
from raylora.errors import UserError
from tests.helpers.chunks import OPTIONS, still, write_dataset
from tests.helpers.damages import CONTENT, PLACE, remove
from tests.helpers.questions import as_dicts, questions_of_many_sizes

Lines = list[str]


class Product(NamedTuple):
    """Where a product lies below the results, and what must be gone for it to be read."""

    file: str
    gone: Sequence[str] = ()


E, B = "experiments/*", "base/*"
ROW, MMLU, TRANSFER = f"{E}/result.json", f"{E}/mmlu.json", f"{E}/transfer.json"
PRODUCTS = {
    "row": Product(ROW),
    "features": Product(f"{E}/features.json", [ROW]),
    "train": Product(f"{E}/train.json", [ROW]),
    "loss curve": Product(f"{E}/loss_curve.csv", [ROW]),
    "mmlu": Product(MMLU, [ROW]),
    "transfer": Product(TRANSFER, [ROW]),
    "weights": Product(f"{E}/adapter/adapter_model.safetensors", [ROW, MMLU, TRANSFER]),
    "config": Product(f"{E}/adapter/adapter_config.json", [ROW, MMLU, TRANSFER]),
    "scores": Product(f"{E}/scores.parquet", [ROW]),
    "scores of a finished row": Product(f"{E}/scores.parquet"),
    "scores without their marker": Product(f"{E}/scores.parquet", [ROW, MMLU]),
    "scores of a further set": Product(f"{E}/scores-many.parquet", [ROW]),
    "cells": Product(f"{E}/transfer.parquet", [ROW]),
    "cells of a finished row": Product(f"{E}/transfer.parquet"),
    "cells without their marker": Product(f"{E}/transfer.parquet", [ROW, TRANSFER]),
    "base scores": Product(f"{B}/scores.parquet", [ROW, MMLU]),
    "questions": Product(f"{B}/questions.parquet", [ROW, MMLU, f"{E}/scores.parquet"]),
    "held-out losses": Product(f"{B}/held_out.parquet", [ROW, TRANSFER, f"{E}/transfer.parquet"]),
    "counts of the template": Product(f"{B}/template.json", [ROW]),
}
OF_EACH_FORM = {"row", "train", "weights", "config", "scores without their marker", "base scores", "questions"}
CASES = [(n, d) for n in PRODUCTS for d in CONTENT if n in OF_EACH_FORM or d in {"cut_short", "flip_bit"}]
"""All damages for one product of each form: how it was read says the rest."""


class Done(NamedTuple):
    words: list[str]
    output: Path
    row: dict


def words_of(tmp_path: Path, model: Path, *more: str) -> list[str]:
    words = [str(write_dataset(tmp_path / "data", "data", num=24)), "--model", str(model), *more]
    for key, value in OPTIONS.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words


def row_of(output: Path) -> dict:
    (row,) = pd.read_parquet(output / "single" / "results.parquet").to_dict("records")
    return {k: v for k, v in still(row).items() if v == v and v is not None}


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model_folder) -> Done:
    root = tmp_path_factory.mktemp("damaged")
    questions = root / "many.json"
    questions.write_text(json.dumps(as_dicts(questions_of_many_sizes())))
    words = words_of(root, tiny_model_folder, "--transfer", "--questions", f"many={questions}")
    assert call_command("experiment", [*words, "--output", str(root / "out")]) == 0
    return Done(words, root / "out", row_of(root / "out"))


@pytest.fixture
def again(done, tmp_path, capsys) -> Callable[[], Lines]:
    """Runs the same command on a copy of what it left; returns the lines that it printed about damage."""
    shutil.copytree(done.output, tmp_path / "out")

    def run() -> Lines:
        capsys.readouterr()
        assert call_command("experiment", [*done.words, "--output", str(tmp_path / "out")]) == 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return [line for line in out.splitlines() if ": damaged: " in line]

    return run


def places_of(folder: Path, pattern: str) -> list[Path]:
    found = sorted((folder / "single").glob(pattern))
    assert found, pattern
    return found


def harm(folder: Path, product: Product, damage: Callable[[Path], None]) -> list[Path]:
    for pattern in product.gone:
        for path in places_of(folder, pattern):
            path.unlink()
    paths = places_of(folder, product.file)[:1]
    for path in paths:
        damage(path)
    return paths


@pytest.mark.slow
@pytest.mark.parametrize(("name", "damage"), CASES)
def test_what_is_damaged_is_made_again_with_one_line(done, again, tmp_path, name, damage):
    (path,) = harm(tmp_path / "out", PRODUCTS[name], CONTENT[damage])
    lines = again()
    assert row_of(tmp_path / "out") == done.row
    assert len(lines) == 1, lines
    assert re.fullmatch(rf"Note: {re.escape(str(path))}: damaged: it is made again", lines[0])
    assert again() == [], "it is whole again"
    assert row_of(tmp_path / "out") == done.row


@pytest.mark.slow
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_gone_is_made_again(done, again, tmp_path, name):
    harm(tmp_path / "out", PRODUCTS[name], remove)
    assert again() == []
    assert row_of(tmp_path / "out") == done.row


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("name", [*PRODUCTS, "adapter"])
def test_what_has_taken_a_product_s_place_is_one_line(done, again, tmp_path, name, place):
    product = PRODUCTS.get(name, Product(f"{E}/adapter", [ROW, MMLU, TRANSFER]))
    if name == "adapter" and place == "make_folder":
        pytest.skip("a folder belongs there")
    (path,) = harm(tmp_path / "out", product, PLACE[place])
    with pytest.raises(UserError) as raised:
        again()
    line = str(raised.value)
    assert line.startswith(f"{path}: a {place.removeprefix('make_')}, where a f")
    assert "\n" not in line
    path.rmdir() if place == "make_folder" else path.unlink()
    again()
    assert row_of(tmp_path / "out") == done.row
