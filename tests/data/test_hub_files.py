"""Datasets of a hub of this machine, read through the hub's own client."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylora.data import datasets
from raylora.errors import ErrorKind, UserError
from raylora.storage.hub_names import HubDataset, dataset_location
from tests.helpers.dataset_hub import TOKEN


def lines(word: str, num: int = 2) -> str:
    return "".join(json.dumps({"question": f"{word} {i}?", "answer": f"{word}."}) + "\n" for i in range(num))


def parquet(word: str, num: int = 2) -> bytes:
    stream = io.BytesIO()
    rows = [{"question": f"{word} {i}?", "answer": f"{word}."} for i in range(num)]
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def place(text: str) -> HubDataset:
    found = dataset_location(text)
    assert isinstance(found, HubDataset)
    return found


def answers(text: str) -> list[str]:
    return [e.answer for e in datasets.read_dataset(place(text)).examples]


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        datasets.read_dataset(place(text))
    assert caught.value.kind in {ErrorKind.DATA, ErrorKind.TRUNCATED_FILE}
    assert "\n" not in str(caught.value)
    return str(caught.value)


README = """---
configs:
- config_name: short
  default: true
  data_files:
  - split: train
    path: short/part-*.jsonl
  - split: test
    path: short/held.jsonl
- config_name: long
  data_files: long/*.jsonl
---
# Two of them
"""


def test_only_the_files_of_the_split_are_downloaded(dataset_hub):
    dataset_hub.add(
        "org/name",
        {
            "README.md": "Nothing that says what is what.",
            "data/train-00000-of-00002.parquet": parquet("one"),
            "data/train-00001-of-00002.parquet": parquet("two"),
            "data/test-00000-of-00001.parquet": parquet("test"),
            "image.png": b"...",
        },
    )
    assert answers("hf://datasets/org/name") == ["one.", "one.", "two.", "two."]
    assert [name for name in dataset_hub.downloads() if "parquet" in name] == [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]
    assert answers("hf://datasets/org/name:test") == ["test.", "test."]


def test_configurations_of_the_readme(dataset_hub):
    files = {"short/part-0.jsonl": lines("a"), "short/part-1.jsonl": lines("b"), "short/held.jsonl": lines("c")}
    dataset_hub.add("org/name", {"README.md": README, **files, "long/x.jsonl": lines("d")})
    assert answers("hf://datasets/org/name") == ["a.", "a.", "b.", "b."]
    assert answers("hf://datasets/org/name/short:test") == ["c.", "c."]
    assert answers("hf://datasets/org/name/long") == ["d.", "d."]
    assert "no configuration, folder or dataset file 'other' in it: it has short, long" in refusal(
        "hf://datasets/org/name/other"
    )
    assert "no split test in its configuration long: it has train" in refusal("hf://datasets/org/name/long:test")


def test_several_configurations_and_none_given(dataset_hub):
    dataset_hub.add("org/name", {"en/train.jsonl": lines("one"), "fr/train.jsonl": lines("un")})
    assert "several configurations, en, fr: name one" in refusal("hf://datasets/org/name")
    assert answers("hf://datasets/org/name/fr") == ["un.", "un."]
    assert answers("hf://datasets/org/name/fr/train.jsonl") == ["un.", "un."]


def test_a_name_without_an_organization_and_its_configuration(dataset_hub):
    dataset_hub.add("glue", {"cola/train.csv": "question,answer\nq,a\n", "sst2/train.csv": "question,answer\nq,b\n"})
    assert answers("hf://datasets/glue/sst2") == ["b"]
    survey = datasets.survey(place("hf://datasets/glue/cola:train"))
    assert str(survey.pinned) == f"hf://datasets/glue@{dataset_hub.commit('glue')}/cola:train"


def test_code_is_not_run_and_the_hubs_own_parquet_is_read(dataset_hub):
    dataset_hub.add("org/name", {"name.py": "raise SystemExit(3)", "raw.zip": b"PK"})
    assert "no file of a dataset in it, and the hub has made no Parquet of it" in refusal("hf://datasets/org/name")
    dataset_hub.add(
        "org/name",
        {"en/train/0000.parquet": parquet("one"), "en/train/0001.parquet": parquet("two"),
         "en/test/0000.parquet": parquet("test"), "fr/partial-train/0000.parquet": parquet("un")},
        branch="refs/convert/parquet",
    )  # fmt: skip
    assert "several configurations, en, fr" in refusal("hf://datasets/org/name")
    survey = datasets.survey(place("hf://datasets/org/name/en"))
    assert survey.num_examples == 4
    commit = dataset_hub.commit("org/name", "refs/convert/parquet")
    assert str(survey.pinned) == f"hf://datasets/org/name@{commit}/en:train"
    assert datasets.survey(place(str(survey.pinned))).data_hash == survey.data_hash
    assert "no split train in its configuration fr: it has partial-train: name one" in refusal(
        "hf://datasets/org/name/fr"
    )


def test_what_is_pinned_stays_when_the_branch_moves(dataset_hub):
    dataset_hub.add("org/name", {"train.jsonl": lines("old")})
    first = datasets.survey(place("hf://datasets/org/name"))
    dataset_hub.add("org/name", {"train.jsonl": lines("new")})
    assert answers("hf://datasets/org/name") == ["new.", "new."]
    assert answers(str(first.pinned)) == ["old.", "old."]
    assert re.fullmatch(r"hf://datasets/org/name@[0-9a-f]{40}:train", str(first.pinned))


def test_the_same_hash_as_a_folder_of_the_same_shards(dataset_hub, tmp_path):
    files = {f"data/train-{i:05}-of-00003.jsonl": lines(f"w{i}") for i in range(3)}
    dataset_hub.add("org/name", files)
    for name, text in files.items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert datasets.survey(place("hf://datasets/org/name")).data_hash == datasets.survey(tmp_path / "copy").data_hash


def test_a_second_process_of_the_machine_asks_for_nothing(dataset_hub):
    dataset_hub.add("org/name", {"README.md": README, "short/part-1.jsonl": lines("a"), "long/x.jsonl": lines("b")})
    pinned = datasets.survey(place("hf://datasets/org/name")).pinned
    dataset_hub.requests.clear()
    assert answers(str(pinned)) == ["a.", "a."]
    assert dataset_hub.requests == []


def test_offline_from_the_cache(dataset_hub, monkeypatch):
    from huggingface_hub import constants

    dataset_hub.add("org/name", {"data/train.jsonl": lines("a"), "data/test.jsonl": lines("b")})
    assert answers("hf://datasets/org/name") == ["a.", "a."]
    dataset_hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert answers("hf://datasets/org/name") == ["a.", "a."]
    for text in ("hf://datasets/org/name:test", "hf://datasets/org/other", "hf://datasets/org/name@v2"):
        assert "not in the hub's cache, and HF_HUB_OFFLINE is set" in refusal(text)
    assert dataset_hub.requests == []


def test_offline_from_a_cache_that_another_program_has_filled(dataset_hub, monkeypatch):
    from huggingface_hub import constants, snapshot_download

    dataset_hub.add("org/name", {f"train-{i:05}-of-00002.jsonl": lines(f"w{i}") for i in range(2)})
    folder = Path(snapshot_download("org/name", repo_type="dataset"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert answers("hf://datasets/org/name") == ["w0.", "w0.", "w1.", "w1."]
    (folder / "train-00001-of-00002.jsonl").unlink()
    assert "only 1 of the 2 shards of train are there" in refusal("hf://datasets/org/name")


def test_what_the_hub_does_not_give_is_one_line_with_the_fix(dataset_hub, monkeypatch):
    dataset_hub.add("org/name", {"train.jsonl": lines("a")})
    dataset_hub.add("org/private", {"train.jsonl": lines("b")}, needs="private")
    dataset_hub.add("org/gated", {"train.jsonl": lines("c")}, needs="gated")
    assert "no such dataset on the hub, or a private one" in refusal("hf://datasets/org/nothing")
    assert "set HF_TOKEN" in refusal("hf://datasets/org/private")
    assert f"ask for access on {dataset_hub.endpoint}/datasets/org/gated" in refusal("hf://datasets/org/gated")
    assert "no revision v9" in refusal("hf://datasets/org/name@v9")
    assert "no split test: it has train" in refusal("hf://datasets/org/name:test")
    assert "no configuration, folder or dataset file 'en'" in refusal("hf://datasets/org/name/en")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert answers("hf://datasets/org/private") == ["b.", "b."]
    assert answers("hf://datasets/org/gated") == ["c.", "c."]
    assert TOKEN not in refusal("hf://datasets/org/nothing")


@pytest.mark.parametrize("token", ["", TOKEN])
def test_a_server_that_gives_no_reasons(dataset_hub, monkeypatch, token):
    monkeypatch.setattr(dataset_hub, "code_of_missing", "")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert "no such dataset on the hub" in refusal("hf://datasets/org/name")


def test_a_hub_that_is_not_there(dataset_hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://user:secret@127.0.0.1:9")
    text = refusal("hf://datasets/org/name")
    assert "cannot be reached" in text
    assert "secret" not in text


def test_a_bad_file_is_named_by_the_hub(dataset_hub):
    dataset_hub.add("org/name", {"train.json": '[{"question": "a", "answer": "b"}, {"quest'})
    assert refusal("hf://datasets/org/name").startswith("hf://datasets/org/name: train.json: ")


def test_a_cache_that_cannot_be_written(dataset_hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    dataset_hub.add("org/name", {"train.jsonl": lines("a")})
    assert "set HF_HOME" in refusal("hf://datasets/org/name")


def test_a_listing_that_is_damaged_is_asked_for_again(dataset_hub, tmp_path):
    dataset_hub.add("org/name", {"train.jsonl": lines("a")})
    answers("hf://datasets/org/name")
    (listing,) = (tmp_path / "hub-cache" / "datasets--org--name" / "raylora").iterdir()
    listing.write_text("{")
    assert answers("hf://datasets/org/name") == ["a.", "a."]
    shutil.rmtree(listing.parent)
    assert answers("hf://datasets/org/name") == ["a.", "a."]
