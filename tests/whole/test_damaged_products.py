"""Everything in ``--output`` may be damaged: it is made again, with one line, and the row is what it was.

A table of products and damages. Slow: each is a run of a tiny model.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from raylora.commands.run_command import call_command
from raylora.errors import UserError
from raylora.mmlu.scoring import load_score
from raylora.predict.predictor import load_predictor
from raylora.report.read_run import load_run
from raylora.rows import read_table
from raylora.storage.digests import write_parquet
from tests.helpers.chunks import OPTIONS, command, still, write_dataset
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
    "questions": Product(f"{B}/questions.parquet", [ROW, MMLU, f"{E}/scores.parquet", f"{E}/scores-many.parquet"]),
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


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip_bit", "torn"])
def test_features_that_trainings_share_are_measured_again(tmp_path, tiny_model_folder, capsys, damage):
    words = words_of(
        tmp_path, tiny_model_folder, "--repeats", "2", "--stages", "features,train", "--output", str(tmp_path)
    )
    assert call_command("experiment", words) == 0
    first = pd.read_parquet(tmp_path / "single" / "results.parquet")
    for path in [*places_of(tmp_path, ROW), *places_of(tmp_path, f"{E}/features.json")]:
        path.unlink()
    (shared,) = places_of(tmp_path, f"{B}/features.json")
    CONTENT[damage](shared)
    capsys.readouterr()
    assert call_command("experiment", words) == 0
    assert capsys.readouterr().out.count(f"Note: {shared}: damaged: it is made again") == 1
    again = pd.read_parquet(tmp_path / "single" / "results.parquet")
    rows = [[still(row) for row in table.to_dict("records")] for table in (first, again)]
    assert pd.DataFrame(rows[0]).equals(pd.DataFrame(rows[1]))


@pytest.mark.slow
def test_the_line_of_a_worker_is_in_what_the_command_prints(tmp_path, tiny_model_folder):
    """Once, though its supervisor, the worker and the command each find it."""
    for i in range(2):
        write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i)
    places = {"model": str(tiny_model_folder), "data_root": tmp_path / "data", "output": tmp_path / "out"}
    words = command({**OPTIONS, **places}, "--num-workers", "1")
    tables = []
    for harmed in ([], ["adapter/adapter_model.safetensors", "result.json"], ["scores.parquet"], []):
        folder = next((tmp_path / "out").glob("chunk_1/experiments/data_0*"), tmp_path)
        for name in harmed:
            CONTENT["flip_bit"](folder / name)
        found = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
        assert found.returncode == 0, found.stdout + found.stderr
        lines = [line for line in found.stdout.splitlines() if ": damaged: " in line]
        assert sorted(lines) == [f"Note: {folder / name}: damaged: it is made again" for name in sorted(harmed)]
        assert "damaged" not in found.stderr
        table = pd.read_parquet(tmp_path / "out" / "chunk_1" / "results.parquet")
        tables.append(pd.DataFrame([still(row) for row in table.to_dict("records")]))
    assert all(table.equals(tables[0]) for table in tables)


@pytest.fixture(scope="module")
def asked(tmp_path_factory, tiny_model_folder, adapter_folder, question_file) -> tuple[list[str], Path]:
    """A command that asks a model and two adapters, and what it left."""
    root = tmp_path_factory.mktemp("asked")
    other = shutil.copytree(adapter_folder, root / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2}))
    words = ["--model", str(tiny_model_folder), "--quantization", "none", "--questions", str(question_file)]
    words += ["--adapter", str(adapter_folder), str(other)]
    assert call_command("mmlu", [*words, "--output", str(root / "out")]) == 0
    return words, root / "out"


@pytest.mark.slow
@pytest.mark.parametrize("damage", CONTENT)
@pytest.mark.parametrize("pattern", ["adapter-*.parquet", "scores.parquet"])
def test_scores_that_are_kept_are_asked_again(asked, tmp_path, capsys, pattern, damage):
    words, left = asked
    out = shutil.copytree(left, tmp_path / "out")
    harmed = sorted(out.rglob(pattern))[0]
    before = load_score(harmed).questions
    CONTENT[damage](harmed)
    capsys.readouterr()
    assert call_command("mmlu", [*words, "--output", str(out)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ": damaged: " in line]
    assert lines == [f"Note: {harmed}: damaged: it is made again"]
    pd.testing.assert_frame_equal(load_score(harmed).questions, before, atol=1e-5)
    summaries = [pd.read_csv(next(folder.rglob("summary.csv"))) for folder in (left, out)]
    assert summaries[0]["overall_accuracy"].tolist() == summaries[1]["overall_accuracy"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACE)
def test_a_link_or_folder_for_a_kept_score_is_one_line(asked, tmp_path, place):
    words, left = asked
    out = shutil.copytree(left, tmp_path / "out")
    harmed = sorted(out.rglob("adapter-*.parquet"))[0]
    PLACE[place](harmed)
    with pytest.raises(UserError, match="where a file belongs"):
        call_command("mmlu", [*words, "--output", str(out)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("damage", ["flip_bit", "cut_short", "torn"])
def test_who_uses_a_damaged_adapter_of_a_run_is_told_in_one_line(done, tmp_path, name, damage):
    shutil.copytree(done.output, tmp_path / "out")
    (path,) = places_of(tmp_path / "out", f"{E}/adapter/{name}")
    CONTENT[damage](path)
    model = done.words[done.words.index("--model") + 1]
    for words in (
        ["merge", str(path.parent), "--output", str(tmp_path / "merged")],
        ["mmlu", "--model", model, "--quantization", "none", "--questions", "demo", "--adapter", str(path.parent)],
        ["experiment", *done.words, "--init-adapter", str(path.parent), "--output", str(tmp_path / "next")],
    ):
        with pytest.raises(UserError) as raised:
            call_command(words[0], words[1:])
        assert f"{path}: damaged: remove " in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", CONTENT)
def test_reports_and_predictors_are_not_made_of_damaged_tables(tmp_path, damage, forty):
    folder = tmp_path / "run"
    folder.mkdir()
    write_parquet(pd.read_parquet(forty / "results.parquet"), folder / "results.parquet")
    shutil.copy(forty / "results.csv", folder)
    CONTENT[damage](folder / "results.parquet")
    assert len(load_run(folder).table) == 40, "the CSV file has the same"
    (folder / "results.csv").unlink()
    for read in (load_run, read_table):
        with pytest.raises(UserError) as raised:
            read(folder)
        assert str(raised.value).startswith(f"{folder / 'results.parquet'}: ")
        assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [name for name in CONTENT if name != "flip_bit"])
def test_a_damaged_predictor_is_one_line(tmp_path, predictor, damage):
    """Its parts have checksums of their own: it is a ZIP file."""
    path = predictor.save(tmp_path)
    CONTENT[damage](path)
    try:
        line, again = "", load_predictor(path)
    except UserError as error:
        line = str(error)
    assert line.startswith(f"{path}: ") or (damage == "change_digit" and again.card == predictor.card)
    assert "\n" not in line
