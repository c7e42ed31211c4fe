"""What lies on a real S3 server, and what several machines and runs make of it."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest

from raylora.errors import LockLostError, RemoteError
from raylora.records import ResultRow
from raylora.storage.damage import damage_told
from raylora.storage.digests import seal, write_parquet
from raylora.storage.places import location
from raylora.storage.remote_store import RemoteStore, store_at
from tests.helpers.chunks import planned, still
from tests.helpers.damages import CONTENT, remove
from tests.helpers.objects import BUCKET, Objects
from tests.helpers.pool import make_experiment
from tests.helpers.s3_runs import OUT, behind_proxy, on_machine, options_on_s3, put_chunk

NUM_DATASETS = 3


@pytest.fixture
def objects(objects, tmp_path):
    """The bucket, with data and questions in it."""
    put_chunk(objects, tmp_path / "data", NUM_DATASETS)
    return objects


@pytest.fixture
def options(tiny_model_folder):
    return options_on_s3(tiny_model_folder)


@pytest.fixture
def proxy(objects):
    with behind_proxy() as proxy:
        yield proxy


def stages_logged(objects: Objects, folder: str) -> list[str]:
    return [line.partition(" INFO ")[2] for line in objects.get(f"{folder}/log.txt").decode().splitlines()]


@pytest.mark.slow
def test_a_half_done_experiment_goes_on_on_another_machine(objects, options, tmp_path):
    """As after a machine that died in MMLU: adapter and features are uploaded, nothing else is left."""
    from raylora.experiment.story import run_experiment
    from raylora.experiment.workbench import Workbench

    with on_machine(tmp_path / "first"):
        plan = planned(options, limit=1)
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
        plan = planned(options, limit=1)
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
        plan = planned(options, limit=1, stages="train")
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
        plan = planned(options, limit=1)
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
        assert planned(options, limit=1).done() == {}


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
        plan = planned(options, limit=1)
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
        plan = planned(options, limit=1)
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
