"""What will run, before anything does: files, names, sizes, what is done already."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

from raylora.commands.run_command import call_command
from raylora.config import load_config
from raylora.errors import UserError
from raylora.planning.plan import find_files, make_plan
from tests.helpers.chunks import planned, run, write_dataset


def test_dry_run_shows_sizes_and_what_is_done_and_starts_nothing(options, tmp_path, capsys):
    write_dataset(tmp_path / "data" / "chunk_1", "data_a")
    (tmp_path / "data" / "chunk_1" / "empty.json").touch()
    argv = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    assert call_command("batch", ["--chunk", "1", "--dry-run", *argv]) == 0
    shown = capsys.readouterr().out
    assert "data_a" in shown
    assert "2 experiments, 0 done" in shown
    assert not (tmp_path / "results").exists()


def test_what_users_call_things_is_no_markup_and_a_name_that_is_no_text_is_one_row(
    options, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "400")
    folder = tmp_path / "data" / "chunk_1"
    write_dataset(folder, "data [red] [bold]")
    (folder / "bad.json").write_text('[{"messages": [{"role": "[/INST]", "content": "x"}]}]')
    (folder / os.fsdecode(b"lat\xe9n.json")).write_text("[]")
    argv = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    assert call_command("batch", ["--chunk", "1", "--dry-run", *argv]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert "[red][bold]" in shown
    assert "[/INST]" in shown
    rows = run(options, stages=("features",), probe_steps=0)
    assert rows["lat\\xe9n"]["error"].endswith("its name is not UTF-8: rename it")
    assert rows["data [red] [bold]"]["status"] == "ok"


def test_salvage_costs_nothing_of_what_is_whole(options, tmp_path):
    """A mend that the error row itself names."""
    folder = tmp_path / "data" / "chunk_1"
    write_dataset(folder, "whole")
    text = json.dumps([{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(4)])
    (folder / "cut.json").write_text(text[:-20])
    options = {**options, "stages": ("train",)}
    before, after = ({e.dataset: e for e in planned(options, salvage=salvage).experiments} for salvage in (False, True))
    assert before["whole"].origins == after["whole"].origins
    assert before["whole"].identity == after["whole"].identity
    assert "--salvage keeps the 3 complete records" in before["cut"].error
    assert not after["cut"].error


def test_at_a_terminal_the_chunks_are_listed_and_one_is_asked_for(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_3", "data_of_three")
    write_dataset(tmp_path / "data" / "chunk_20", "data_of_twenty")
    words = [sys.executable, "-m", "raylora.batch", "--dry-run"]
    for key, value in options.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    terminal, inside = pty.openpty()
    process = subprocess.Popen(words, stdin=inside, stdout=inside, stderr=inside, env={**os.environ, "COLUMNS": "200"})
    os.close(inside)
    os.write(terminal, b"2\n")
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 1000)
        except OSError:  # the other end is closed
            break
    assert process.wait(timeout=60) == 0, shown
    assert b"1  chunk_3" in shown
    assert b"2  chunk_20" in shown
    assert b"data_of_twenty" in shown
    assert b"data_of_three" not in shown


def test_without_a_chunk_or_a_model_one_line_says_what_there_is(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_7", "data")
    with pytest.raises(UserError, match=r"--chunk: name one of .*chunk_7"):
        find_files(load_config(**options))
    config = load_config(**{**options, "model": ""}, chunk="chunk_7")
    with pytest.raises(UserError, match="MODEL_NAME"):
        make_plan(config, find_files(config)[1], "chunk_7")
    config = load_config(**{**options, "mmlu": None}, chunk="chunk_7")
    with pytest.raises(UserError, match="--mmlu FILE"):
        make_plan(config, find_files(config)[1], "chunk_7")


def test_names_never_leave_the_output_folder_nor_collide(options, tmp_path):
    folder = tmp_path / "data" / "chunk_1"
    names = ["a..%2fup", "ä", "a", "a b", "a_b", "новый", "x" * 200, "line\nbreak", "-rf", "con"]
    for name in names:
        write_dataset(folder, name, num=2)
    (folder / "a.jsonl").write_text('{"question": "Q", "answer": "A"}\n{"question": "Q2", "answer": "A"}\n')
    plan = planned(options)
    ids = [e.experiment_id for e in plan.experiments]
    assert len(set(ids)) == len(names) + 1
    for experiment in plan.experiments:
        assert plan.store.folder(experiment).resolve().parent == (tmp_path / "results/chunk_1/experiments").resolve()
        assert experiment.experiment_id.isascii()
