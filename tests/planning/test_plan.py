"""What will run, before anything does: files, names, sizes, what is done already."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

from raylora.commands.run_command import call_command
from raylora.config.method import LORA_TARGETS
from raylora.config.run import load_config
from raylora.console import make_console
from raylora.errors import ErrorKind, UserError
from raylora.mmlu.power import power_line
from raylora.planning.plan import find_files, make_plan, planned_methods, read_order
from raylora.planning.show_plan import power_of, print_plan
from raylora.records import ResultRow
from raylora.rows import load_results, make_row
from tests.helpers.chunks import OPTIONS, planned, run, write_dataset
from tests.helpers.dataset_files import json_list, parquet
from tests.helpers.families import save_family
from tests.helpers.feature_rows import make_records
from tests.helpers.objects import BUCKET


def test_dry_run_shows_sizes_and_what_is_done_and_starts_nothing(options, tmp_path, capsys):
    write_dataset(tmp_path / "data" / "chunk_1", "data_a")
    (tmp_path / "data" / "chunk_1" / "empty.json").touch()
    argv = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    assert call_command("batch", ["--chunk", "1", "--dry-run", *argv]) == 0
    shown = capsys.readouterr().out
    assert "data_a" in shown
    assert "2 experiments, 0 done" in shown
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
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


LINES = "".join(json.dumps({"question": f"What is {i}?", "answer": f"It is {i}."}) + "\n" for i in range(4))


def test_datasets_of_the_hub_stand_beside_files_each_with_its_commit(options, tmp_path, dataset_hub):
    dataset_hub.add("org/name", {"train.jsonl": LINES, "test.jsonl": LINES[:80]})
    dataset_hub.add("org/gated", {"train.jsonl": LINES}, needs="gated")
    write_dataset(tmp_path / "data" / "chunk_1", "data_a")
    near, far = write_dataset(tmp_path / "near", "data_b"), write_dataset(tmp_path / "far", "data_b", offset=1)
    names = ["hf://datasets/org/name", "hf://datasets/org/name:test", "hf://datasets/org/gated", str(near), str(far)]
    found = {e.dataset: e for e in planned({**options, "stages": ("features",)}, dataset=names).experiments}
    assert {*found} == {
        "data_a", "org--name", "org--name--test", "org--gated", "near/data_b.json", "far/data_b.json"
    }  # fmt: skip
    assert len({e.experiment_id for e in found.values()}) == 6
    commit = dataset_hub.commit("org/name")
    assert found["org--name"].dataset_source == found["org--name"].path == f"hf://datasets/org/name@{commit}:train"
    assert found["org--name--test"].dataset_source == f"hf://datasets/org/name@{commit}:test"
    assert "its owner has to give access" in found["org--gated"].error
    assert found["data_a"].dataset_source == ""


def test_a_run_of_nothing_but_what_the_hub_does_not_give_ends_before_it_begins(options, dataset_hub):
    config = load_config(**options, dataset=("hf://datasets/org/nothing", "hf://datasets/org/none"))
    chunk, places = find_files(config)
    assert chunk == "datasets"
    with pytest.raises(UserError, match="org/nothing: no such dataset on the hub, or a private one"):
        make_plan(config, places, chunk)


def test_one_dataset_of_the_hub_is_run_in_this_process(options, dataset_hub, tmp_path, capsys):
    dataset_hub.add("org/name", {"en/train.jsonl": LINES, "fr/train.jsonl": LINES})
    argv = [w for k, v in options.items() if k != "data_root" for w in (f"--{k.replace('_', '-')}", str(v))]
    argv += ["--stages", "features", "--probe-steps", "0"]
    assert call_command("experiment", ["hf://datasets/org/name/en", *argv]) == 0
    row = load_results(tmp_path / "results" / "single").iloc[0]
    assert row["dataset"] == "org--name--en"
    assert row["dataset_source"] == f"hf://datasets/org/name@{dataset_hub.commit('org/name')}/en:train"
    with pytest.raises(UserError, match="several configurations, en, fr") as caught:
        call_command("experiment", ["hf://datasets/org/name", *argv])
    assert "\n" not in str(caught.value)


def test_salvage_costs_nothing_of_what_is_whole(options, tmp_path):
    """A fix that the error row itself names."""
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


@pytest.mark.slow
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
    assert {"a.json", "a.jsonl", "a b"} < {e.dataset for e in plan.experiments}, "of one stem, they are named whole"


def test_one_stem_in_every_kind_of_file_and_a_folder_of_shards(options, tmp_path):
    folder = tmp_path / "data" / "chunk_1"
    records = [{"question": f"Q{i}", "answer": "A"} for i in range(3)]
    (folder / "a").mkdir(parents=True)
    for name in ("a.json", "b.JSON"):
        (folder / name).write_bytes(json_list(records))
    for name in ("a.parquet", "a/train-00000-of-00001.parquet"):
        (folder / name).write_bytes(parquet(records))
    plan = planned(options)
    assert sorted(e.dataset for e in plan.experiments) == ["a", "a.json", "a.parquet", "b"]
    assert len({e.experiment_id for e in plan.experiments}) == 4
    assert {e.error for e in plan.experiments} == {""}
    assert [e.num_examples for e in plan.experiments] == [3] * 4


def test_names_of_columns_are_part_of_what_a_row_is_made_from(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "a", num=2)
    plain, named, again = (
        planned(options, columns=columns).experiments[0]
        for columns in ((), "question=q,answer=a", {"answer": "a", "question": "q"})
    )
    assert plain.experiment_id == planned(options).experiments[0].experiment_id
    assert named.experiment_id == again.experiment_id != plain.experiment_id
    assert named.origins == again.origins
    assert named.origins["train"]["data"] != plain.origins["train"]["data"]
    with pytest.raises(UserError, match="--columns frage=q: frage is no key of a record"):
        planned(options, columns="frage=q")


def test_a_pipe_in_a_chunk_is_a_row_and_hangs_nothing(options, tmp_path):
    folder = tmp_path / "data" / "chunk_1"
    write_dataset(folder, "a", num=2)
    os.mkfifo(folder / "b.json")
    good, bad = sorted(planned(options).experiments, key=lambda e: e.dataset)
    assert not good.error
    assert bad.error.startswith(f"{folder / 'b.json'}: a pipe or a device, which cannot be read twice: ")


def test_repeats_share_their_features_and_another_seed_asks_the_same_questions(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    plan = planned(options, repeats=3)
    assert [e.settings["seed"] for e in sorted(plan.experiments, key=lambda e: e.settings["seed"])] == [0, 1, 2]
    assert len({e.experiment_id for e in plan.experiments}) == 3
    assert len({str(e.origins["features"]) for e in plan.experiments}) == 1
    assert len({str(e.origins["train"]) for e in plan.experiments}) == 3
    first, *others = sorted(plan.experiments, key=lambda e: e.settings["seed"])
    assert all(e.estimated_seconds < first.estimated_seconds for e in others), "only the first measures features"
    other_seed, other_questions = planned(options, seed=1), planned(options, question_seed=1)
    assert other_seed.hashes == plan.hashes
    assert other_questions.hashes["questions"] != plan.hashes["questions"]
    (alone,), (asked,) = planned(options).experiments, other_questions.experiments
    assert alone.origins == first.origins, "one more seed makes nothing again"
    assert (asked.origins["train"], asked.origins["features"]) == (alone.origins["train"], alone.origins["features"])


def test_a_grid_that_says_a_value_twice_runs_it_once(tmp_path, tiny_model_folder):
    write_dataset(tmp_path / "data", "a")
    config = load_config(model=str(tiny_model_folder), grid={"lora_r": [8, 8, 4]}, output=tmp_path / "out", **OPTIONS)
    plan = make_plan(config, [tmp_path / "data" / "a.json"], "single")
    assert sorted(e.settings["lora_r"] for e in plan.experiments) == [4, 8]


@pytest.mark.slow
@pytest.mark.ci
def test_a_server_that_is_gone_is_one_line(objects, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    script = (
        "from raylora.config.run import load_config\nfrom raylora.planning.plan import find_files\n"
        f"find_files(load_config(data_root='s3://{BUCKET}/data', chunk='chunk_1'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"UserError: s3://{BUCKET}/data" in done.stderr
    assert "127.0.0.1:9" in done.stderr.strip().splitlines()[-1]


def test_examples_longer_than_the_model_can_see_are_refused_before_anything_starts(tiny_model_folder, tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[{"question": "Why?", "answer": "So."}]')
    config = load_config(model=str(tiny_model_folder), mmlu="demo", output=tmp_path / "results", max_length=4096)
    with pytest.raises(UserError, match=r"--max-length 4096: .* can look at 2048 tokens"):
        make_plan(config, [file], "single")


def test_the_batch_takes_an_order_and_its_limit(tiny_model_folder, tmp_path):
    folder = tmp_path / "chunk_002"
    folder.mkdir()
    for i in range(4):
        (folder / f"set_{i}.json").write_text(json.dumps(make_records(2 + i, seed=i)))
    order = tmp_path / "ranking.csv"
    order.write_text("rank,dataset\n1,set_2\n2,set_0\n3,not_here\n4,set_1\n")
    options = {"chunk": "chunk_002", "data_root": tmp_path, "model": str(tiny_model_folder), "stages": "train"}
    options |= {"output": tmp_path / "out"}
    config = load_config(**options, order=order)
    name, files = find_files(config)
    assert [e.dataset for e in make_plan(config, files, name).experiments] == ["set_2", "set_0", "set_1", "set_3"]
    assert [f.stem for f in find_files(load_config(**options, order=order, limit=2))[1]] == ["set_2", "set_0"]
    plain = load_config(**options)
    assert make_plan(plain, find_files(plain)[1], name).experiments[0].dataset == "set_3"


def test_a_budget_is_of_experiments_and_not_of_files(tiny_model_folder, tmp_path):
    folder = tmp_path / "chunk_002"
    folder.mkdir()
    for i in range(2):
        (folder / f"set_{i}.json").write_text(json.dumps(make_records(3, seed=i)))
    options = {"chunk": "chunk_002", "data_root": tmp_path, "model": str(tiny_model_folder), "stages": "train"}
    options |= {"output": tmp_path / "out", "grid": {"lora_r": [2, 4, 8]}}
    config = load_config(**options)
    _, files = find_files(config)
    every = [e.experiment_id for e in make_plan(config, files, "chunk_002").experiments]
    assert len(every) == 6
    order = tmp_path / "ranking.csv"
    order.write_text("dataset,experiment_id\n" + "".join(f"x,{name}\n" for name in every[::-1]))
    chosen = make_plan(load_config(**options, order=order, max_experiments=2), files, "chunk_002").experiments
    assert [e.experiment_id for e in chosen] == every[:-3:-1]


def test_an_order_names_experiments_of_a_grid(tmp_path):
    path = tmp_path / "o.csv"
    path.write_text("dataset,experiment_id\na,a-2\na,a-1\nb,b-1\n")
    place = read_order(path)
    assert (place["a-2"], place["a-1"], place["b-1"], place["a"], place["b"]) == (0, 1, 2, 0, 2)


@pytest.mark.parametrize("content", [None, "", "name\nx\n", '"\n'])
def test_an_order_that_cannot_be_read_is_one_line(tmp_path, content):
    path = tmp_path / "o.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_order(path)
    assert str(caught.value).startswith(f"--order {path}: ")
    assert "\n" not in str(caught.value)


def test_what_the_questions_can_show_is_measured_from_rows_that_are_there(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data_a")
    plan = planned(options, stages=("mmlu", "train"), grid={"seed": [0, 1], "lora_r": [4, 8]})
    assert len(plan.experiments) == 4
    num = plan.num_questions
    rows = [ResultRow({"num_gained": k, "num_lost": 1, "total_questions": num}) for k in (1, 2, 3)]
    failed = ResultRow({"num_gained": None, "num_lost": None, "total_questions": None})
    assert power_of(plan, [*rows, failed]) == power_line(num, 1, 3 / num, num_tests=2), "seeds are tested together"
    assert power_of(plan, [failed]) == power_line(num, 1, None, num_tests=2)


def plan_of(options, model, **more):
    return planned(options, model=str(model), stages=("train",), **more)


def test_auto_is_no_other_experiment_than_its_names(options, tmp_path, tiny_model_folder):
    """Rows and adapters of runs before there was an auto count as done."""
    write_dataset(tmp_path / "data" / "chunk_1", "data_a")
    (auto,) = plan_of(options, tiny_model_folder).experiments
    (named,) = plan_of(options, tiny_model_folder, target_modules=",".join(LORA_TARGETS)).experiments
    assert (auto.experiment_id, auto.identity, auto.origins) == (named.experiment_id, named.identity, named.origins)
    assert auto.settings["target_modules"] == list(LORA_TARGETS)
    assert (auto.num_adapted_modules, auto.modules_without_adapter) == (14, "")
    grid = {"target_modules": ["auto", ",".join(LORA_TARGETS), "q_proj"]}
    assert len(plan_of(options, tiny_model_folder, grid=grid).experiments) == 2


def test_names_that_match_in_part_are_noted_and_the_row_has_those_that_do(options, tmp_path, capsys):
    write_dataset(tmp_path / "data" / "chunk_1", "data_a")
    plan = plan_of(options, save_family("phi3", tmp_path / "phi3"), target_modules=LORA_TARGETS)
    assert len(plan.notes) == 1
    assert "no layer is called q_proj or k_proj or v_proj or gate_proj or up_proj" in plan.notes[0]
    row = make_row(plan.config, plan.experiments[0], "ok").values
    assert (row["target_modules"], row["num_adapted_modules"]) == ("o_proj,down_proj", 4)
    assert row["modules_without_adapter"] == "qkv_proj,gate_up_proj"
    print_plan(plan, make_console())
    assert "4 layers get an adapter (o_proj, down_proj); without one: qkv_proj, gate_up_proj" in capsys.readouterr().out


def test_names_that_match_nothing_stop_the_run_before_it_begins(options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data_a")
    folder = save_family("gpt2", tmp_path / "gpt2")
    with pytest.raises(UserError, match="no layer is called q_proj; there are c_attn, c_proj, c_fc") as raised:
        plan_of(options, folder, target_modules="q_proj")
    assert raised.value.kind is ErrorKind.TARGET_MODULES
    (experiment,) = plan_of(options, folder).experiments
    assert experiment.settings["target_modules"] == ["c_attn", "c_proj", "c_fc"]
    assert not plan_of(options, folder).notes
    assert planned(options, model=str(folder), stages=("features",), probe_steps=0, target_modules="q_proj").experiments


def test_a_model_whose_layers_are_not_known_has_the_seven_names(options, tmp_path, tiny_model_folder):
    """Its own code may be missing here, and be on the machines that run it."""
    config = load_config(**{**options, "chunk": "chunk_1", "grid": {"target_modules": ["auto", "c_attn"]}})
    assert [m.target_modules for m in planned_methods(config, None)] == [LORA_TARGETS, ("c_attn",)]
