"""Places: local paths, URIs, and objects on a real S3 server."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora import errors, rows
from raylora.config import EvaluationConfig, load_config
from raylora.config_sources import load_settings
from raylora.data import datasets
from raylora.errors import RemoteError, UserError
from raylora.mmlu.question_set import load_question_set
from raylora.planning.plan import find_files
from raylora.storage import run_lock
from raylora.storage.objects import Remote
from raylora.storage.places import location
from raylora.storage.run_lock import RunLock
from tests.helpers.objects import BUCKET, Objects, s3_server

RECORDS = b'[{"question": "Who?", "answer": "I."}]'


@pytest.fixture(scope="module")
def server():
    with s3_server() as (_, objects):
        yield objects


@pytest.fixture
def objects(server: Objects):
    server.remove("")
    return server


@pytest.fixture
def remote(objects: Objects) -> Remote:
    return Remote(f"s3://{BUCKET}/out")


# Places


def test_local_places_are_plain_paths(tmp_path):
    assert location("results") == Path("results")
    assert location(str(tmp_path)) == tmp_path
    assert location(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert location(tmp_path) is tmp_path
    assert type(location("results")) is type(Path("results"))


def test_places_of_a_configuration_are_kept_as_they_were_given(objects):
    config = load_config(output=f"s3://{BUCKET}/out/", data_root=f"s3://{BUCKET}/data")
    assert str(config.output) == f"s3://{BUCKET}/out"
    assert config.model_dump(mode="json")["data_root"] == f"s3://{BUCKET}/data"
    assert str(pickle.loads(pickle.dumps(config)).output / "chunk_1") == f"s3://{BUCKET}/out/chunk_1"
    assert load_config(["--output", f"s3://{BUCKET}/out"]).output == config.output


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("s3://someone:hunter2@bucket/x", "password"),
        ("s3://AKIA:hunter2/with/slashes@bucket/x", "password"),
        ("s3://bucket/x?X-Amz-Signature=hunter2", "query"),
        ("nothing://bucket/x", "no protocol"),
    ],
)
@pytest.mark.parametrize("option", ["output", "data_root", "mmlu"])
def test_bad_uris_are_one_line_that_does_not_repeat_the_secret(option, uri, word):
    with pytest.raises(UserError) as caught:
        load_config([f"--{option.replace('_', '-')}", uri])
    text = str(caught.value)
    assert text.startswith(f"--{option.replace('_', '-')}: ")
    assert word in text
    assert "\n" not in text
    assert "hunter2" not in text


@given(st.text(st.characters(exclude_characters="@?# \t\n\r", categories=("L", "N", "P")), min_size=1, max_size=20))
def test_no_secret_is_ever_shown(secret):
    uri = f"s3://name:{secret}xyzzy@bucket/folder"
    with pytest.raises(UserError) as caught:
        location(uri)
    assert "xyzzy" not in str(caught.value)
    assert "xyzzy" not in errors.without_secrets(f"could not read {uri}")


def test_a_missing_package_is_named_with_its_extra():
    script = "import sys; sys.modules['gcsfs'] = None; from raylora.files import location; location('gs://bucket/x')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "UserError: gs://bucket/x: needs a package more: pip install 'raylora[gs]'" in done.stderr


# Reading


def test_datasets_are_read_from_s3_as_from_a_disk(objects, tmp_path):
    contents = {"b.json": RECORDS, "a.jsonl": RECORDS[1:-1] + b"\n", "bad.json": b"[{", "note.txt": b"-"}
    (tmp_path / "chunk_10").mkdir()
    for name, data in contents.items():
        (tmp_path / "chunk_10" / name).write_bytes(data)
        objects.put(f"data/chunk_10/{name}", data)
    objects.put("data/chunk_10/", b"")  # what a web console makes for a folder
    objects.put("data/chunk_2/x.json", RECORDS)
    root = location(f"s3://{BUCKET}/data")
    assert [c.name for c in datasets.list_chunks(root)] == ["chunk_2", "chunk_10"]
    there = datasets.list_dataset_files(datasets.find_chunk(root, "chunk_10"))
    here = datasets.list_dataset_files(tmp_path / "chunk_10")
    assert [p.name for p in there] == [p.name for p in here] == ["a.jsonl", "b.json", "bad.json"]
    for a, b in zip(here[:2], there[:2], strict=True):
        assert tuple(datasets.load_dataset(a).examples) == tuple(datasets.load_dataset(b).examples)
    with pytest.raises(UserError, match=f"s3://{BUCKET}/data/chunk_10/bad.json: line 1"):
        datasets.load_dataset(there[2])


def test_what_is_not_there_is_one_line(objects):
    for root in (f"s3://{BUCKET}/nothing", "s3://no-such-bucket-here/x"):
        with pytest.raises(UserError) as caught:
            find_files(load_config(data_root=root, chunk="chunk_1"))
        assert root in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="is missing"):
            load_question_set(load_settings(EvaluationConfig, None, "test", mmlu=f"{root}/q.json"))
        with pytest.raises(UserError, match="no such table"):
            rows.load_results(root)


def test_a_server_that_is_gone_is_one_line(objects, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    script = (
        "from raylora.config import load_config\nfrom raylora.plan import find_files\n"
        f"find_files(load_config(data_root='s3://{BUCKET}/data', chunk='chunk_1'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"UserError: s3://{BUCKET}/data" in done.stderr
    assert "127.0.0.1:9" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("form", ["json", "parquet", "folder"])
def test_questions_are_read_from_s3(objects, form, tmp_path):
    import json

    import pandas as pd

    from raylora.mmlu.question_set import DEMO_QUESTIONS

    raw = json.loads(DEMO_QUESTIONS.read_text())[:8]
    name = {"json": "q.json", "parquet": "q.parquet", "folder": "q/test/part.parquet"}[form]
    data = json.dumps(raw).encode() if form == "json" else pd.DataFrame(raw).to_parquet()
    objects.put(f"mmlu/{name}", data)
    config = load_settings(EvaluationConfig, None, "test", mmlu=f"s3://{BUCKET}/mmlu/{name.split('/')[0]}")
    assert [q.question for q in load_question_set(config).questions] == [q["question"] for q in raw]


# Objects


def test_objects_are_written_whole_read_listed_and_removed(remote, objects, tmp_path):
    assert remote.read("a") is None
    assert remote.list("") == []
    remote.write("a", b"1")
    remote.write("d/e/f", b"2")
    remote.write("d/g", b"3")
    remote.write("d2", b"4")
    objects.put("outside", b"5")
    objects.put("out2/other", b"6")
    assert remote.list("") == ["a", "d/e/f", "d/g", "d2"]
    assert remote.list("d") == ["d/e/f", "d/g"]
    assert remote.read_many(["a", "nothing", "d/g"]) == {"a": b"1", "d/g": b"3"}
    assert remote.download("d", tmp_path / "d")
    assert (tmp_path / "d" / "e" / "f").read_bytes() == b"2"
    remote.upload("copy", tmp_path / "d")
    assert remote.list("copy") == ["copy/e/f", "copy/g"]
    assert not remote.download("nothing", tmp_path / "nothing")
    remote.remove("d")
    remote.remove("d")
    assert remote.list("") == ["a", "copy/e/f", "copy/g", "d2"]
    assert objects.names("out2") == ["out2/other"]


def test_of_many_who_create_an_object_one_succeeds(remote):
    won = []

    def create(number: int) -> None:
        if Remote(remote.place).create("one", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert remote.read("one") == str(won[0]).encode()


def test_a_create_whose_answer_was_lost_is_known_to_have_succeeded(remote):
    assert remote.create("one", b"token")
    assert remote.create("one", b"token"), "the second try of the same write"
    assert not remote.create("one", b"other")


def test_an_error_says_where_and_why_and_travels(objects):
    with pytest.raises(RemoteError) as caught:
        Remote("s3://no-such-bucket-here/x").write("name", b"")
    text = str(pickle.loads(pickle.dumps(caught.value)).strerror)
    assert text.startswith("s3://no-such-bucket-here/x/name: ")
    assert "\n" not in text


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_an_output_that_cannot_be_reached_is_one_line(objects, tiny_model_folder, more):
    objects.put("data/chunk_1/a.json", RECORDS)
    words = ["--chunk", "chunk_1", "--data-root", f"s3://{BUCKET}/data", "--output", "s3://no-such-bucket-here/out"]
    words += ["--model", str(tiny_model_folder), "--stages", "train", "--quantization", "none", *more]
    done = subprocess.run([sys.executable, "-m", "raylora.batch", *words], capture_output=True, text=True)
    if more:  # nothing can be there yet, and nothing is written
        assert done.returncode == 0
        assert "1 experiments, 0 done" in done.stdout
    else:
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("raylora: --output s3://no-such-bucket-here/out")


# One run at a time


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "KEEP_SECONDS", 2.0)


def test_a_second_run_is_told_who_has_it_and_the_next_gets_it(remote, quick):
    told = pytest.raises(UserError, match=r"another run is writing here \(process \d+ on ")
    with RunLock(remote).held(), told, RunLock(remote).held():
        pass
    with RunLock(remote).held():
        assert remote.list("run.lock") == ["run.lock/00000001", "run.lock/00000002"]
    assert remote.list("run.lock") == ["run.lock/00000002"]


def test_a_dead_run_of_this_machine_is_known_at_once(remote, monkeypatch):
    script = (
        "import os; from raylora.files import Remote; from raylora.lease import Lease\n"
        f"with Lease(Remote({remote.place!r})).held(): os._exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 1
    monkeypatch.setattr(run_lock, "KEEP_SECONDS", 1e9)
    with RunLock(remote).held():
        assert "run.lock/00000002" in remote.list("run.lock")


def test_a_dead_run_of_another_machine_is_waited_for(remote, quick):
    dead = RunLock(remote)
    dead._state["process"] = ["another machine", 1]
    dead._acquire()  # and never renewed
    with RunLock(remote).held():
        assert "run.lock/00000002" in remote.list("run.lock")


def test_who_slept_too_long_finds_that_it_was_taken_over(remote, quick):
    sleeper = RunLock(remote)
    sleeper._state["process"] = ["another machine", 1]
    sleeper._acquire()
    with RunLock(remote).held():
        sleeper.check()  # it does not know yet
        sleeper._keep_renewing()
        with pytest.raises(UserError, match="another run took it over"):
            sleeper.check()
        sleeper._release()
        assert b'"released": false' in (remote.read("run.lock/00000001") or b""), "it touches nothing any more"


def test_of_many_who_wait_for_a_dead_run_one_gets_it(remote, quick):
    dead = RunLock(remote)
    dead._state["process"] = ["another machine", 1]
    dead._acquire()
    held, told = [], []
    all_done = threading.Barrier(4)

    def run() -> None:
        try:
            with RunLock(Remote(remote.place)).held():
                held.append(1)
                all_done.wait(60)
        except UserError:
            told.append(1)
            all_done.wait(60)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(told)) == (1, 3)
