"""Places: local paths and URIs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora import errors, rows
from raylora.commands.options import MmluConfig, PredictConfig, ReportConfig
from raylora.config.run import EvaluationConfig, load_config
from raylora.config.sources import load_settings
from raylora.data.datasets import read_dataset
from raylora.errors import UserError
from raylora.mmlu.mask import find_masked
from raylora.mmlu.question_set import load_question_set
from raylora.mmlu.questions import load_questions
from raylora.planning.plan import find_files
from raylora.rows import read_table
from raylora.storage.places import check_regular, location
from tests.helpers.objects import BUCKET
from tests.helpers.questions import make_questions

# Places


def test_local_places_are_plain_paths(tmp_path):
    assert location("results") == Path("results")
    assert location(str(tmp_path)) == tmp_path
    assert location(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert location(tmp_path) is tmp_path
    assert type(location("results")) is type(Path("results"))


def test_a_home_folder_is_meant_wherever_a_place_is_named(monkeypatch, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (home / "run.yaml").write_text("data_root: ~/data\norder: ~/order.csv\ninit_adapter: ~/adapter\n")
    monkeypatch.setenv("RAYLORA_OUTPUT", "~/out")
    (tmp_path / ".env").write_text("RAYLORA_DATASET=~/a.json\n")
    config = load_config(["--config", "~/run.yaml"])
    places = (config.output, config.data_root, config.order, *config.dataset, Path(config.init_adapter))
    assert places == tuple(home / name for name in ("out", "data", "order.csv", "a.json", "adapter"))
    assert load_config(output=Path("~/x")).output == home / "x"
    assert load_settings(MmluConfig, ["--adapter", "~/a", "~/b"], "").adapter == [home / "a", home / "b"]
    assert load_settings(ReportConfig, ["~/run"], "").folder == home / "run"
    assert load_settings(PredictConfig, ["~/p", "~/t", "--output=~/o"], "").output == home / "o"
    assert load_config(output="~nobody-of-that-name/x").output == Path("~nobody-of-that-name/x")


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
        ("memory://x", "a run has several"),
        ("zip://a/b.zip", "unpack it"),
        ("tar://a", "unpack it"),
        ("github://a/b", "cannot be used here"),
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
    script = "import sys; sys.modules['gcsfs'] = None; from raylora.storage.places import location; location('gs://bucket/x')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "UserError: gs://bucket/x: needs a package more: pip install 'raylora[gs]'" in done.stderr


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


def test_a_pipe_or_a_device_is_one_line_wherever_a_file_is_read(tmp_path):
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    (question,) = make_questions(1)[:1]
    readers = (read_dataset, load_questions, read_table, lambda path: find_masked(str(path), [question]))
    for path in (pipe, Path("/dev/zero")):
        for read in readers:
            with pytest.raises(UserError, match=f"{path}: a pipe or a device, which cannot be read twice"):
                read(path)
    check_regular(tmp_path)
    check_regular(tmp_path / "nothing there")
