"""Whole runs with data, questions and results on a real S3 server: real Ray, real processes, a tiny model."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from raylora.commands.run_command import call_command
from raylora.config.run import load_config
from raylora.errors import LockLostError, RemoteError, UserError
from raylora.mmlu.question_set import DEMO_QUESTIONS
from raylora.planning.plan import find_files, make_plan
from raylora.records import ResultRow
from raylora.rows import load_results
from raylora.storage.damage import damage_told
from raylora.storage.digests import seal, write_parquet
from raylora.storage.places import location
from raylora.storage.remote_store import RemoteStore, store_at
from tests.helpers.chunks import OPTIONS, command, run, still, write_dataset
from tests.helpers.damages import CONTENT, remove
from tests.helpers.objects import BUCKET, SECRET, Objects, s3_server
from tests.helpers.pool import make_experiment
from tests.helpers.store_proxy import StoreProxy

NUM_DATASETS = 3
OUT = "out/chunk_1"


@pytest.fixture(scope="module")
def server():
    with s3_server() as (_, objects):
        yield objects


@pytest.fixture(scope="module")
def ray_on_s3(server):
    """After the server, so that its workers know it."""
    import ray

    ray.init(num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture
def objects(server: Objects, tmp_path, monkeypatch):
    server.remove("")
    for i in range(NUM_DATASETS):
        path = write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i)
        server.put(f"data/chunk_1/{path.name}", path.read_bytes())
    server.put("mmlu/questions.json", DEMO_QUESTIONS.read_bytes())
    return server


@pytest.fixture
def options(tiny_model_folder, tmp_path):
    place = f"s3://{BUCKET}"
    return {
        **OPTIONS, "model": str(tiny_model_folder), "mmlu": f"{place}/mmlu/questions.json",
        "data_root": f"{place}/data", "output": f"{place}/out",
    }  # fmt: skip


@contextmanager
def on_machine(folder: Path):
    """A machine is told from another one by what it keeps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLORA_CACHE", str(folder))
        yield folder


def only_process(command_line, machine: Path, **kwargs):
    environment = {**os.environ, "RAYLORA_CACHE": str(machine)}
    return subprocess.Popen(command_line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)


def plan_of(options, **more):
    config = load_config(**options, chunk="chunk_1", **more)
    chunk, files = find_files(config)
    return make_plan(config, files, chunk)


def stages_logged(objects: Objects, folder: str) -> list[str]:
    return [line.partition(" INFO ")[2] for line in objects.get(f"{folder}/log.txt").decode().splitlines()]


@pytest.mark.slow
def test_a_run_on_s3_leaves_what_one_on_a_disk_leaves_and_a_rerun_does_nothing(
    ray_on_s3, objects, options, tmp_path, capsys
):

    rows = run(options, transfer=True)
    at_home = {"data_root": tmp_path / "data", "mmlu": str(DEMO_QUESTIONS), "output": tmp_path / "here"}
    local = run({**options, **at_home}, transfer=True)
    assert len(rows) == NUM_DATASETS
    assert {k: still(v) for k, v in rows.items()} == {k: still(v) for k, v in local.items()}
    here = {p.relative_to(tmp_path / "here").as_posix() for p in (tmp_path / "here").rglob("*") if p.is_file()}
    there = {name.removeprefix("out/") for name in objects.names("out/")}
    stamped = {n for n in here | there if "batch_mmlu_results" in n}
    needs_files = {n for n in here if n.endswith((".lock", "questions.parquet"))}
    machinery = {n for n in there if "/run.lock/" in n or n.endswith("/edition")}
    assert here - stamped - needs_files == there - stamped - machinery
    assert len(stamped) == 2
    table = load_results(f"s3://{BUCKET}/{OUT}")
    assert sorted(table["dataset"]) == sorted(rows)
    assert list(pd.read_csv(location(f"s3://{BUCKET}/{OUT}/results.csv").open("rb"))["status"]) == ["ok"] * 3
    before = {n: d for n, d in objects.everything().items() if "/experiments/" in n or "/base/" in n}
    results = [json.loads(line) for line in objects.get(f"{OUT}/results.jsonl").splitlines()]
    assert [line["raylora"].get("dataset") for line in results] == [None, *sorted(rows)]
    found = [line["results"]["demo" if "demo" in line["results"] else "questions"]["acc,none"] for line in results[1:]]
    assert found == [rows[name]["overall_accuracy"] for name in sorted(rows)]
    cells = objects.get(f"{OUT}/transfer.csv")
    assert len(pd.read_csv(io.BytesIO(cells))) == NUM_DATASETS**2
    assert run(options, transfer=True) == rows
    assert {n: d for n, d in objects.everything().items() if n in before} == before
    assert objects.get(f"{OUT}/transfer.csv") == cells
    call_command("batch", [*command(options, "--transfer")[3:], "--dry-run"])
    assert "3 experiments, 3 done" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ci
def test_no_secret_is_in_anything_that_is_kept(ray_on_s3, objects, options):
    run(options, limit=1)
    kept = objects.everything()
    assert not [name for name, data in kept.items() if SECRET.encode() in data]
    manifest = json.loads(kept[f"{OUT}/run.json"])
    assert manifest["configuration"]["output"] == f"s3://{BUCKET}/out"


@pytest.mark.slow
def test_a_half_done_experiment_goes_on_on_another_machine(objects, options, tmp_path):
    """As after a machine that died in MMLU: adapter and features are uploaded, nothing else is left."""
    from raylora.experiment.story import run_experiment
    from raylora.experiment.workbench import Workbench

    with on_machine(tmp_path / "first"):
        plan = plan_of(options, limit=1)
        (experiment,) = plan.experiments
        with plan.store.held(False):
            whole = run_experiment(Workbench(plan.config, plan.store), experiment)
        folder = f"{OUT}/experiments/{experiment.experiment_id}"
        assert not plan.store.folder(experiment).exists(), "what is finished takes no room on the machine"
    for name in ("result.json", "mmlu.json", "scores.parquet", "log.txt"):
        objects.remove(f"{folder}/{name}")
    adapter = objects.get(f"{folder}/adapter/adapter_model.safetensors")
    shutil.rmtree(tmp_path / "first")
    with on_machine(tmp_path / "second"):
        plan = plan_of(options, limit=1)
        assert plan.done() == {}
        assert [plan.store.why_not_done(experiment, s) for s in ("features", "train", "mmlu")] == ["", "", "new"]
        with plan.store.held(False):
            again = run_experiment(Workbench(plan.config, plan.store), experiment)
    assert still(again.values) == still(whole.values)
    assert again.values["train_seconds"] == whole.values["train_seconds"], "it was not trained again"
    assert objects.get(f"{folder}/adapter/adapter_model.safetensors") == adapter
    assert stages_logged(objects, folder)[:3] == ["features: done before", "train: done before", "mmlu: started"]


def test_a_stage_without_its_json_file_is_made_again(objects, options, tmp_path):
    from raylora.experiment.story import run_experiment
    from raylora.experiment.workbench import Workbench

    with on_machine(tmp_path / "first"):
        plan = plan_of(options, limit=1, stages="train")
        (experiment,) = plan.experiments
        with plan.store.held(False):
            bench = Workbench(plan.config, plan.store)
            first = run_experiment(bench, experiment)
            folder = f"{OUT}/experiments/{experiment.experiment_id}"
            for name in ("result.json", "train.json"):  # killed between two uploads
                objects.remove(f"{folder}/{name}")
            objects.put(f"{folder}/adapter/adapter_model.safetensors", b"half of it")
            second = run_experiment(bench, experiment)
    assert still(first.values) == still(second.values)
    assert len(objects.get(f"{folder}/adapter/adapter_model.safetensors")) > 1000


def test_the_first_base_score_is_everybodys(objects, tmp_path):
    place = location(f"s3://{BUCKET}/{OUT}")
    with on_machine(tmp_path / "a"):
        one = store_at(place)
        one.open(False)
    with on_machine(tmp_path / "b"):
        two = store_at(place)
        two.open(False)
    files = [store.base_file("key", "scores.parquet") for store in (one, two)]
    for file, text in zip(files, ("one", "two"), strict=True):
        file.parent.mkdir(parents=True)
        write_parquet(pd.DataFrame({"by": [text]}), file)
    two.share(files[1])
    one.share(files[0])
    assert [pd.read_parquet(f)["by"].item() for f in files] == ["two", "two"]
    files[0].unlink()
    one.fetch(files[0])
    assert pd.read_parquet(files[0])["by"].item() == "two"


@pytest.mark.slow
@pytest.mark.parametrize("damage", [*CONTENT, "remove"])
@pytest.mark.parametrize("name", ["loss_curve.csv", "adapter/adapter_model.safetensors", "train.json", "result.json"])
def test_a_damaged_object_is_made_again(objects, tmp_path, name, damage):
    """What lies here is fetched again where the object is whole; else the stage is no longer done."""
    one, told = make_experiment("one"), []
    files = ("loss_curve.csv", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")
    with on_machine(tmp_path / "a"), damage_told(told.append):
        store = store_at(location(f"s3://{BUCKET}/{OUT}"))
        with store.held(False):
            for file in files:
                path = store.folder(one) / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{file}: {list(range(20))}")
            store.write_stage(one, "train", {"train_loss": 1.25, "steps": [name, damage, *range(20)]})
            row = ResultRow({"dataset": "one", "experiment_id": "one", "status": "ok", "accuracy": 0.25})
            store.write_row(one, row)
            assert (store.read_row(one), store.read_rows([one])) == (row, {"one": row})
            harm, place = {**CONTENT, "remove": remove}[damage], store.folder(one) / name
            if name in files:
                whole = place.read_bytes()
                harm(place)
                store.take_out(one)
                assert place.read_bytes() == whole
                assert told == []
            object_name = f"{OUT}/experiments/one/{name}"
            place.write_bytes(objects.get(object_name))
            harm(place)
            objects.put(object_name, place.read_bytes()) if place.exists() else objects.remove(object_name)
            store.take_out(one)
            assert (store.read_stage(one, "train") is None) == (name != "result.json")
            assert (store.read_row(one) is None) == (store.read_rows([one]) == {}) == (name == "result.json")
            assert len(told) == (1 if damage != "remove" or name in files else 0), told
            store.write_row(one, row)
            assert store.read_row(one) == row


@pytest.mark.parametrize("damage", CONTENT)
def test_a_damaged_base_score_is_nobodys(objects, tmp_path, damage):
    """Neither on a machine nor on the object store, where it is replaced by the next one that is made."""
    with on_machine(tmp_path / "a"):
        one = store_at(location(f"s3://{BUCKET}/{OUT}"))
        one.open(False)
    file = one.base_file("key", "scores.parquet")
    file.parent.mkdir(parents=True)
    write_parquet(pd.DataFrame({"by": ["one"]}), file)
    whole = file.read_bytes()
    one.share(file)
    CONTENT[damage](file)
    damaged = file.read_bytes()
    one.fetch(file)
    assert file.read_bytes() == whole, "the object store's is taken"
    objects.put(f"{OUT}/base/key/scores.parquet", damaged)
    file.write_bytes(damaged)
    one.fetch(file)
    assert not file.exists()
    file.write_bytes(whole)
    one.share(file)
    assert file.read_bytes() == objects.get(f"{OUT}/base/key/scores.parquet") == whole


def test_fresh_begins_anew_on_every_machine(objects, options, tmp_path):
    with on_machine(tmp_path / "m"):
        plan = plan_of(options, limit=1)
        (experiment,) = plan.experiments
        with plan.store.held(False):
            plan.store.write_row(experiment, ResultRow({"status": "ok"}))
            old = plan.store.root
            (old / "base").mkdir()
        other = make_other_machine(plan.store)
        assert other.root == old
        with plan.store.held(True):
            assert plan.store.root != old
            assert not plan.done()
            assert not old.exists()
            assert make_other_machine(plan.store).root == plan.store.root
        assert plan_of(options, limit=1).done() == {}


def make_other_machine(store) -> RemoteStore:
    import pickle

    return pickle.loads(pickle.dumps(store))


def test_another_process_of_the_run_publishes_until_another_run_takes_over(objects, tmp_path):
    """As the sink's process does, which gets the store without the thread that renews its lock."""
    from raylora.storage.objects import Remote
    from raylora.storage.run_lock import FOLDER

    place = f"s3://{BUCKET}/{OUT}"
    with on_machine(tmp_path / "m"):
        store = store_at(location(place))
        with store.held(False):
            copy = make_other_machine(store)
            copy.write_file("results.csv", lambda p: p.write_text("first"))
            Remote(place).write(f"{FOLDER}/{99:08d}", b"{}")
            with pytest.raises(LockLostError, match="another run took it over"):
                copy.write_file("results.csv", lambda p: p.write_text("second"))
    assert objects.get(f"{OUT}/results.csv") == b"first"


def test_a_run_that_was_taken_over_writes_nothing_more_into_the_other_one_s(objects, options, tmp_path):
    """Whoever was suspended for longer than its lock lasts does not know it, and goes on where it was."""
    from raylora.storage.objects import Remote
    from raylora.storage.run_lock import FOLDER

    with on_machine(tmp_path / "m"):
        plan = plan_of(options, limit=1)
        (experiment,), store = plan.experiments, plan.store
        with store.held(False):
            folder = store.folder(experiment)
            folder.mkdir(parents=True)
            (folder / "log.txt").write_text("a line\n")
            shared = store.base_file("key", "scores.parquet")
            shared.parent.mkdir(parents=True)
            shared.write_bytes(b"scores")
            torn = seal({"origin": experiment.origins["train"], "values": {}, "files": {}})
            objects.put(f"{OUT}/experiments/{experiment.experiment_id}/train.json", torn.encode())
            Remote(str(store.place)).write(f"{FOLDER}/{99:08d}", b"{}")
            before = objects.everything()
            for write in (
                lambda: store.write_row(experiment, ResultRow({"dataset": "data_0"})),
                lambda: store.write_stage(experiment, "features", {}),
                lambda: store.write_pushed(experiment, {}),
                lambda: store.put_away(experiment),
                lambda: store.take_out(experiment),
                lambda: store.share(shared),
                lambda: store.write_json("run.json", {}),
            ):
                with pytest.raises(LockLostError, match="another run took it over: this run stops"):
                    write()
            assert objects.everything() == before
    assert objects.everything() == before


@pytest.fixture
def proxy(objects, monkeypatch):
    """In front of the store, with faults to be injected."""
    s3fs = pytest.importorskip("s3fs")
    with StoreProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()  # instances keep the address that they were made with
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_many_experiments_are_looked_at_without_a_request_for_each(proxy, tmp_path):
    one, two = make_experiment("one"), make_experiment("two")
    with on_machine(tmp_path / "m"):
        store = store_at(location(f"s3://{BUCKET}/{OUT}"))
        store.open(False)
        store.write_stage(one, "features", {})
        with store.read_ahead({"one": ["features", "train"], "two": ["train"]}):
            proxy.inject("503", times=10**6)
            assert store.why_not_done(one, "features") == ""
            assert store.why_not_done(one, "train") == store.why_not_done(two, "train") == "new"
            assert not store.is_damaged(one, "mmlu")
        proxy.clear()
        assert store.why_not_done(one, "features") == ""


@pytest.mark.slow
def test_a_worker_that_starts_while_the_store_does_not_answer_is_patient(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr("raylora.storage.objects.FIRST_PATIENCE_SECONDS", 0.5)
    one = make_experiment("one")
    with on_machine(tmp_path / "m"):
        store = store_at(location(f"s3://{BUCKET}/{OUT}"))
        store.open(False)
        copy, unopened = make_other_machine(store), store_at(location(f"s3://{BUCKET}/{OUT}"))
        proxy.inject("500", times=1)
        with pytest.raises(RemoteError):
            unopened.read_row(one)
        proxy.inject("500", times=1)
        assert copy.read_row(one) is None
        assert not proxy.num_left()


def test_reports_find_what_other_machines_made(objects, options, tmp_path):
    from raylora.experiment.story import run_experiment
    from raylora.experiment.workbench import Workbench

    with on_machine(tmp_path / "first"):
        plan = plan_of(options, limit=1)
        (experiment,) = plan.experiments
        with plan.store.held(False):
            run_experiment(Workbench(plan.config, plan.store), experiment)
    with on_machine(tmp_path / "second"):
        store = store_at(location(f"s3://{BUCKET}/{OUT}"))
        store.open(False)
        store.collect()
        folder = store.folder(experiment)
        assert {p.name for p in folder.iterdir()} == {"loss_curve.csv", "scores.parquet", "result.json"}
        assert len([*store.root.glob("base/*/scores.parquet")]) == 1
        store.write_file("report.html", lambda p: p.write_text("<p>"))
    assert objects.get(f"{OUT}/report.html") == b"<p>"


def wait_for(condition) -> None:
    for _ in range(1800):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with_and_a_second_one_is_told(objects, options, tmp_path):
    num_datasets = 24  # so many that the first run is not done before it is killed
    for i in range(NUM_DATASETS, num_datasets):
        path = write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i)
        objects.put(f"data/chunk_1/{path.name}", path.read_bytes())
    words = command(options, "--num-workers", "1")
    first = only_process(words, tmp_path / "first")
    wait_for(lambda: objects.names(f"{OUT}/run.lock"))
    told = pytest.raises(UserError, match="another run is writing here")
    with on_machine(tmp_path / "second"), told, plan_of(options).store.held(False):
        pass
    wait_for(lambda: [n for n in objects.names(OUT) if n.endswith("result.json")])
    first.send_signal(signal.SIGKILL)
    first.wait()
    rows_before = {n: objects.get(n) for n in objects.names(OUT) if n.endswith("result.json")}
    assert 1 <= len(rows_before) < num_datasets
    second = only_process(words, tmp_path / "second", text=True)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert len(load_results(f"s3://{BUCKET}/{OUT}")) == num_datasets
    assert {n: objects.get(n) for n in rows_before} == rows_before, "what was finished is not done again"
    assert f"s3://{BUCKET}/{OUT}" in output


@pytest.mark.slow
def test_a_store_that_goes_down_ends_the_run_within_a_minute(objects, options, tmp_path):
    num_datasets = 12
    for i in range(NUM_DATASETS, num_datasets):
        path = write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i)
        objects.put(f"data/chunk_1/{path.name}", path.read_bytes())
    words = command(options, "--num-workers", "1")
    with StoreProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        process = only_process(words, tmp_path / "m", text=True)
        wait_for(lambda: [n for n in objects.names(OUT) if n.endswith("result.json")])
        proxy.inject("500", times=10**6)
        began = time.monotonic()
        shown, _ = process.communicate(timeout=200)
        took = time.monotonic() - began
        assert process.returncode == 1, shown
        assert "Traceback" not in shown
        assert shown.strip().splitlines()[-1].endswith("What is finished is kept: the same command resumes from here.")
        assert took < 70, shown
        proxy.clear()
        shown, _ = only_process(words, tmp_path / "m", text=True).communicate(timeout=300)
    assert len(load_results(f"s3://{BUCKET}/{OUT}")) == num_datasets, shown
