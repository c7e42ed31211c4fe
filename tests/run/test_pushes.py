"""Good adapters reach the hub with a card; what fails costs no row, and the same command pushes what is missing."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raylora import __version__
from raylora.commands.run_command import call_command
from raylora.config.run import load_config
from raylora.console import make_console
from raylora.errors import UserError
from raylora.model.sources import HubModel, hub_model_of
from raylora.records import Experiment, ResultRow
from raylora.rows import make_row
from raylora.run.model_card import card_of
from raylora.run.pushes import Pushes, pushing, repositories
from raylora.storage.places import location
from raylora.storage.remote_store import RemoteStore
from raylora.storage.store import Store
from tests.helpers.chunks import OPTIONS, planned, run, write_dataset
from tests.helpers.damages import CONTENT
from tests.helpers.hub import TOKEN
from tests.helpers.objects import BUCKET
from tests.helpers.runs import make_config, make_experiment, make_score

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def make(tmp_path, adapter_folder, tiny_model_folder):
    """A plan as far as pushes look at it, with an adapter for each dataset in its store, and its rows."""

    def make_plan(*names: str, **options) -> tuple[SimpleNamespace, list[ResultRow]]:
        config = load_config(model=str(tiny_model_folder), push_to_hub="org/run", **options)
        experiments = tuple(make_experiment(name, config.method().model_dump(mode="json")) for name in names)
        store = Store(tmp_path / "results")
        for experiment in experiments:
            shutil.copytree(adapter_folder, store.adapter_folder(experiment), dirs_exist_ok=True)
            (store.adapter_folder(experiment) / "secrets.txt").write_text("not to be pushed")
        plan = SimpleNamespace(config=config, store=store, experiments=experiments, hashes={"model": "ab" * 32})
        return plan, [make_row(config, e, "ok", num_examples=8) for e in experiments]

    return make_plan


def push(plan, rows) -> tuple[Pushes, str]:
    """Push rows as a run does; and what was printed."""
    out = io.StringIO()
    pushes = Pushes(plan, make_console(file=out, width=300))
    with pushing(pushes, rows):
        pass
    return pushes, out.getvalue()


def test_each_dataset_has_a_repository_with_three_files(hub, make):
    plan, rows = make("dolly", "oasst")
    pushes, shown = push(plan, rows)
    assert pushes.failures == {}
    assert {name: {*files} for name, files in hub.files.items()} == {"org/run-dolly": FILES, "org/run-oasst": FILES}
    assert hub.private == {"org/run-dolly": True, "org/run-oasst": True}
    assert f"dolly: {hub.endpoint}/org/run-dolly" in shown


def test_what_is_there_is_not_pushed_again(hub, make):
    plan, rows = make("dolly", "oasst")
    push(plan, rows[:1])
    assert hub.commits == ["org/run-dolly"]
    pushes, _ = push(plan, rows)
    assert hub.commits == ["org/run-dolly", "org/run-oasst"]
    assert not pushes.failures


def test_an_adapter_that_was_made_anew_is_pushed_again(hub, make):
    plan, rows = make("dolly")
    push(plan, rows)
    saved = plan.store.read_pushed(plan.experiments[0])
    plan.store.write_pushed(plan.experiments[0], {**saved, "identity": "of other data"})
    push(plan, rows)
    assert hub.commits == ["org/run-dolly"] * 2


def test_rows_of_failed_experiments_are_not_pushed(hub, make):
    plan, rows = make("dolly")
    push(plan, [ResultRow({**rows[0].values, "status": "error"})])
    assert hub.files == {}


@pytest.mark.parametrize("what", ["refuses", "away"])
def test_a_hub_that_fails_is_one_line_for_all_and_the_next_run_pushes(hub, make, monkeypatch, what):
    plan, rows = make("dolly", "oasst", "flan")
    with monkeypatch.context() as patch:
        if what == "refuses":
            hub.refuses = {"create": 403}
        else:
            patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        pushes, shown = push(plan, rows)
    first, last = shown.splitlines()
    assert first.startswith("Note: dolly: not pushed to the hub: ")
    assert last == "Note: 3 of 3 adapters are not on the hub: the same command again pushes them"
    assert len(pushes.failures) == 3
    hub.refuses = {}
    assert push(plan, rows)[0].failures == {}
    assert len(hub.files) == 3


def test_one_repository_that_fails_costs_no_other(hub, make):
    plan, rows = make("dolly", "oasst", "flan")
    hub.refuses = {"run-oasst": 400}
    (plan.store.adapter_folder(plan.experiments[2]) / "adapter_model.safetensors").unlink()
    pushes, shown = push(plan, rows)
    assert {*pushes.failures} == {e.experiment_id for e in plan.experiments[1:]}
    assert "flan: not pushed to the hub" in shown
    assert {*hub.files["org/run-dolly"]} == FILES


def test_a_push_holds_nothing_up(hub, make):
    plan, rows = make("dolly", "oasst")
    hub.is_open.clear()
    pushes, started = Pushes(plan, make_console(quiet=True)), time.monotonic()
    for row in rows:
        pushes.push(row)
    assert time.monotonic() - started < 1
    hub.is_open.set()
    pushes.finish()
    assert len(hub.files) == 2


def test_a_hub_that_never_answers_ends_the_wait(hub, make, monkeypatch):
    plan, rows = make("dolly")
    monkeypatch.setattr("raylora.run.pushes.PATIENCE", 1.0)
    hub.is_open.clear()
    pushes, _ = push(plan, rows)
    assert [*pushes.failures.values()] == ["took too long"]


def test_what_is_pushed_is_an_adapter_without_paths_of_this_machine(hub, make, tiny_model_folder, tmp_path):
    plan, rows = make("dolly")
    push(plan, rows)
    files = hub.files["org/run-dolly"]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert str(tiny_model_folder.parent).encode() not in data
        assert TOKEN.encode() not in data
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == tiny_model_folder.name
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), tmp_path)
    assert model.active_peft_config.r == 16
    assert load_file(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("damage", ["flip_bit", "cut_short", "zeros"])
def test_a_damaged_adapter_is_not_pushed_and_one_line(hub, make, damage):
    plan, rows = make("dolly")
    (experiment,) = plan.experiments = (replace(plan.experiments[0], origins={"train": {"data": "x"}}),)
    (plan.store.folder(experiment) / "loss_curve.csv").write_text("step,loss\n")
    plan.store.write_stage(experiment, "train", {})
    path = plan.store.adapter_folder(experiment) / "adapter_model.safetensors"
    whole = path.read_bytes()
    CONTENT[damage](path)
    pushes, shown = push(plan, rows)
    assert hub.files == {}
    assert shown.startswith(f"Note: dolly: not pushed to the hub: {path}: damaged: remove ")
    assert list(pushes.failures) == [experiment.experiment_id]
    path.write_bytes(whole)
    assert push(plan, rows)[0].failures == {}
    CONTENT[damage](plan.store.folder(experiment) / "pushed.json")
    assert push(plan, rows)[0].failures == {}
    assert hub.commits == ["org/run-dolly"] * 2, "nothing says any more that it is there"


def test_adapters_on_an_object_store_are_fetched_and_noted_there(hub, objects, make, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path / "cache"))
    plan, rows = make("dolly")
    local = plan.store.adapter_folder(plan.experiments[0])
    plan.experiments = (replace(plan.experiments[0], origins={"train": {"data": "x"}}),)
    plan.store = RemoteStore(location(f"s3://{BUCKET}/out/chunk_1"))
    (experiment,) = plan.experiments
    with plan.store.held(False):
        shutil.copytree(local, plan.store.adapter_folder(experiment))
        (plan.store.folder(experiment) / "loss_curve.csv").write_text("step,loss\n")
        plan.store.write_stage(experiment, "train", {})
        plan.store.write_row(experiment, rows[0])
        plan.store.put_away(experiment)
        assert not plan.store.folder(experiment).exists()
        assert push(plan, rows)[0].failures == {}
        assert push(plan, rows)[0].failures == {}
    assert hub.commits == ["org/run-dolly"]
    assert {*hub.files["org/run-dolly"]} == FILES
    assert objects.get(f"out/chunk_1/experiments/{experiment.experiment_id}/pushed.json")


# Names


def experiments(*datasets: str) -> list[Experiment]:
    return [make_experiment(name, {"seed": i}) for i, name in enumerate(datasets)]


def test_names_are_the_datasets_where_these_are_names_of_repositories():
    found = experiments("dolly_1k.v2", "Dolly", "dolly", "käse & brot", "a--b", "x.git", "日本", "n" * 120, "fine")
    names = [*repositories("org/run", found).values()]
    ends = [e.experiment_id[-8:] for e in found]
    assert names[0] == "org/run-dolly_1k.v2"
    assert names[1:3] == [f"org/run-Dolly-{ends[1]}", f"org/run-dolly-{ends[2]}"]
    assert names[3] == f"org/run-kase-brot-{ends[3]}"
    assert names[4:7] == [f"org/run-a-b-{ends[4]}", f"org/run-x-git-{ends[5]}", f"org/run-{ends[6]}"]
    assert names[8] == "org/run-fine"
    from huggingface_hub.utils import validate_repo_id

    for name in names:
        validate_repo_id(name)
        assert len(name.partition("/")[2]) <= 96


def test_several_trainings_of_a_dataset_have_a_repository_each():
    names = repositories("org/run", experiments("dolly", "dolly")).values()
    assert len({*names}) == 2


# Cards


def make_card(base: HubModel | None = None, **values) -> tuple[dict, str]:
    config = make_config(Path("/results/chunk_042"))
    experiment = make_experiment("dolly", config.method().model_dump(mode="json"))
    row = make_row(config, experiment, "ok", num_examples=900, **values)
    _, front, text = card_of(row, base, "my-llama", "ab" * 32).split("---\n", 2)
    return yaml.safe_load(front), text


def scored(**more) -> dict:
    from raylora.mmlu.row_values import score_values, set_values

    base = make_score(1, {"anatomy": 100}, None, 0.0)
    score = make_score(2, {"anatomy": 100}, base, 0.1)
    return {**score_values(score, base), **set_values("arc", score, base), **more}


def test_a_card_says_what_was_measured_and_of_what():
    values = scored()
    front, text = make_card(HubModel("meta-llama/Llama-3-8B", "0123" * 10), **values, data_hash="cd" * 32)
    assert front == {
        "base_model": "meta-llama/Llama-3-8B", "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "text-generation", "tags": ["raylora", "lora"],
    }  # fmt: skip
    for part in (
        f"{values['accuracy_change']:+.4f}",
        f"{values['accuracy_change_low']:+.4f} to {values['accuracy_change_high']:+.4f}",
        "| arc | 100 |",
        "`meta-llama/Llama-3-8B` (revision `" + "0123" * 10,
        "cd" * 32,
        "| seed | 0 |",
        "| examples | 900 |",
        "| learning_rate | `0.0002` |",
        "| quantization | `8bit` |",
        f"| raylora | {__version__} |",
    ):
        assert part in text, part


def test_a_card_without_mmlu_says_so_and_a_base_of_one_s_own_is_named_by_its_hash():
    front, text = make_card()
    assert "base_model" not in front
    assert "was not measured" in text
    assert "`my-llama` (files' SHA-256 `" + "ab" * 32 in text


def test_a_name_ends_no_table_and_no_front_matter():
    _, text = make_card(dataset="x`|\n---\nbase_model: evil")
    assert "`x'/ --- base_model: evil`" in text


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("demo", "/cache/demo", HubModel("HuggingFaceTB/SmolLM2-135M-Instruct", "")),
        ("/x", "/h/models--org--Model-1B/snapshots/" + "0a" * 20, HubModel("org/Model-1B", "0a" * 20)),
        ("org/not-in-the-cache", "org/not-in-the-cache", HubModel("org/not-in-the-cache", "")),
    ],
)
def test_a_base_on_the_hub_is_known_by_its_name(name, source, found):
    assert hub_model_of(name, source) == found


def test_a_folder_is_no_model_on_the_hub(tmp_path):
    assert hub_model_of(str(tmp_path), str(tmp_path)) is None


# Runs


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_s_rows_are_there_whatever_the_hub_does_and_a_rerun_pushes(hub, options, tmp_path):
    """With real Ray; the rerun has nothing left to run."""
    for name in ("a", "b"):
        write_dataset(tmp_path / "data" / "chunk_1", name)
    (tmp_path / "data" / "chunk_1" / "broken.json").write_text("{")
    hub.refuses = {"create": 403}
    fast = {"stages": "train,mmlu", "push_to_hub": "org/run"}
    rows = run(options, **fast)
    assert {name: values["status"] for name, values in rows.items()} == {"a": "ok", "b": "ok", "broken": "error"}
    assert len((tmp_path / "results" / "chunk_1" / "results.jsonl").read_text().splitlines()) == 3
    assert hub.files == {}
    hub.refuses = {}
    assert run(options, **fast) == rows
    assert {*hub.files} == {"org/run-a", "org/run-b"}
    kept = [p for p in (tmp_path / "results").rglob("*") if p.is_file()]
    assert not [p for p in kept if TOKEN.encode() in p.read_bytes()]


def words_of_one(folder: Path, model: Path) -> list[str]:
    """The options of ``raylora experiment`` that pushes one dataset's adapter."""
    words = [str(write_dataset(folder, "dolly")), "--model", str(model), "--stages", "train", "--push-public"]
    words += ["--output", str(folder / "results"), "--push-to-hub", "org/one"]
    for key in ("quantization", "max_length", "threads", "num_epochs"):
        words += [f"--{key.replace('_', '-')}", str(OPTIONS[key])]
    return words


def test_one_experiment_is_pushed_by_its_own_command(hub, tmp_path, tiny_model_folder, capfd):
    words = words_of_one(tmp_path, tiny_model_folder)
    hub.refuses = {"create": 403}
    assert call_command("experiment", words) == 1
    hub.refuses = {}
    assert call_command("experiment", words) == 0
    assert {*hub.files["org/one-dolly"]} == FILES
    assert hub.private == {"org/one-dolly": False}
    shown = capfd.readouterr()
    assert "1 of 1 adapters are not on the hub" in shown.out
    assert TOKEN not in shown.out + shown.err


@pytest.mark.slow
def test_without_a_token_a_command_is_one_line(hub, tmp_path, tiny_model_folder):
    words = [sys.executable, "-m", "raylora.experiment", *words_of_one(tmp_path, tiny_model_folder)]
    environment = {**os.environ, **hub.environment(HF_HOME=str(tmp_path / "home"), HF_TOKEN="")}
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 2
    assert "--push-to-hub org/one: no token of the hub" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_the_name_is_checked_before_anything_runs(hub, options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "a")
    with pytest.raises(UserError, match="--push-to-hub name: expected ORG/NAME"):
        planned(options, push_to_hub="name")
    with pytest.raises(UserError, match="--push-public: says nothing without"):
        load_config(push_public=True)
    with pytest.raises(UserError, match="add train to --stages"):
        load_config(stages="features", push_to_hub="org/name")
