"""Which files of a repository are a configuration and a split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.data.hub_splits import Choice, choose
from raylora.errors import UserError


def files(tree: list[str], metadata=None, config: str = "", split: str = "") -> list[str]:
    return list(choose(tree, metadata, config, split).files)


def configs(*entries: dict) -> dict:
    return {"configs": list(entries)}


@pytest.mark.parametrize(
    ("tree", "train"),
    [
        (["data.jsonl"], ["data.jsonl"]),
        (["a.csv", "b.csv"], ["a.csv", "b.csv"]),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["my_train_file.json", "dev.json"], ["my_train_file.json"]),
        (["train/1.parquet", "train/2.parquet", "validation/1.parquet"], ["train/1.parquet", "train/2.parquet"]),
        (["data/train.jsonl.gz", "data/test.jsonl.gz"], ["data/train.jsonl.gz"]),
        (["data/train-00000-of-00001-0a1b2c.parquet", "data/x-00000-of-00001.parquet"],
         ["data/train-00000-of-00001-0a1b2c.parquet"]),
        (["shards/some-00001-of-00002.parquet", "shards/some-00000-of-00002.parquet"],
         ["shards/some-00000-of-00002.parquet", "shards/some-00001-of-00002.parquet"]),
        (["part-10.jsonl", "part-2.jsonl"], ["part-2.jsonl", "part-10.jsonl"]),
        (["train.jsonl", "notes.jsonl"], ["train.jsonl"]),
        (["a.parquet", "b.parquet", "a.csv"], ["a.parquet", "b.parquet"]),
        (["a.json", "b.jsonl"], ["a.json", "b.jsonl"]),
        (["train.jsonl", "dataset_infos.json", ".hidden/train.jsonl", "__MACOSX/train.jsonl"], ["train.jsonl"]),
        (["only/train.csv", "only/test.csv", "README.md", "code.py"], ["only/train.csv"]),
        (["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"],
         ["default/train/0000.parquet", "default/train/0001.parquet"]),
    ],
)  # fmt: skip
def test_splits_by_names(tree, train):
    assert files(tree) == train


def test_splits_that_have_names_of_their_own():
    tree = [f"data/{split}-00000-of-00001.parquet" for split in ("train_sft", "test_sft", "train_gen")]
    assert files(tree, split="train_sft") == [tree[0]]
    with pytest.raises(UserError, match="no split train: it has test_sft, train_gen, train_sft: name one"):
        choose(tree, None, "", "")
    converted = ["default/unusual/0000.parquet", "default/other/0000.parquet"]
    assert files(converted, split="unusual") == [converted[0]]
    assert files(["default/unusual/0000.parquet"], split="unusual") == ["default/unusual/0000.parquet"]


@pytest.mark.parametrize("split", ["validation", "dev", "valid", "val"])
def test_other_names_of_a_split(split):
    assert files(["train.jsonl", "dev.jsonl"], split=split) == ["dev.jsonl"]
    metadata = configs({"config_name": "a", "data_files": [{"split": "validation", "path": "x.jsonl"}]})
    assert files(["x.jsonl", "y.jsonl"], metadata, split=split) == ["x.jsonl"]


TREE = ["a/1.jsonl", "a/2.jsonl", "a/held.jsonl", "b/train.jsonl", "b/test.jsonl", "b/deep/train.jsonl"]


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"data_files": "a/1.jsonl"}, ["a/1.jsonl"]),
        ({"data_files": ["a/1.jsonl", "./a/2.jsonl"]}, ["a/1.jsonl", "a/2.jsonl"]),
        ({"data_files": "a/[0-9].jsonl"}, ["a/1.jsonl", "a/2.jsonl"]),
        ({"data_files": {"train": "a/*.jsonl"}}, ["a/1.jsonl", "a/2.jsonl", "a/held.jsonl"]),
        ({"data_files": [{"split": "train", "path": ["a/1.jsonl", "b/train.jsonl"]}]}, ["a/1.jsonl", "b/train.jsonl"]),
        ({"data_files": [{"split": "train", "path": "b/**"}]}, ["b/deep/train.jsonl", "b/test.jsonl", "b/train.jsonl"]),
        ({"data_dir": "b", "data_files": "tr*"}, ["b/train.jsonl"]),
        ({"data_dir": "b"}, ["b/deep/train.jsonl", "b/train.jsonl"]),
        ({"data_dir": "a"}, ["a/1.jsonl", "a/2.jsonl", "a/held.jsonl"]),
    ],
)
def test_configurations_of_a_readme(entry, found):
    assert files(TREE, configs({"config_name": "c", **entry})) == found
    assert choose(TREE, configs({"config_name": "c", **entry}), "c", "train") == Choice("c", "train", tuple(found))


def test_which_configuration_is_the_default():
    one, two = ({"config_name": n, "data_files": f"a/{i}.jsonl"} for i, n in enumerate(["one", "two"], 1))
    with pytest.raises(UserError, match="several configurations, one, two: name one"):
        choose(TREE, configs(one, two), "", "")
    assert files(TREE, configs(one, {**two, "default": True})) == ["a/2.jsonl"]
    assert files(TREE, configs(one, {**two, "config_name": "default"})) == ["a/2.jsonl"]
    assert files(TREE, configs(one, two), "two") == ["a/2.jsonl"]
    assert files(TREE, configs(one, two), "b", "test") == ["b/test.jsonl"]


@pytest.mark.parametrize(
    ("tree", "options", "says"),
    [
        (["x.py", "y.zip"], {}, "no file of a dataset"),
        (["en/a.jsonl", "fr/a.jsonl"], {}, "several configurations, en, fr"),
        (["en/a.jsonl", "fr/a.jsonl"], {"config": "de"}, "'de' in it: it has en, fr"),
        (["a.jsonl"], {"config": "de"}, "it has none: leave it out"),
        (["a.jsonl"], {"config": "a.jsonl", "split": "train"}, "name no split with it"),
        (["test.jsonl"], {}, "no split train: it has test: name one"),
        (["test.jsonl"], {"split": "x"}, "no split x: it has test"),
        (["a.csv", "a.parquet"], {}, "a.csv, a.parquet: name one file"),
        (["a.txt", "b.jsonl"], {"metadata": configs({"data_files": "*.txt"})}, "for its configuration default"),
    ],
)
def test_what_cannot_be_chosen(tree, options, says):
    with pytest.raises(UserError) as caught:
        choose(tree, **{"metadata": None, "config": "", "split": "", **options})
    assert says in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.text(max_size=5) | st.sampled_from(["train", "*.jsonl", "[z-a]", "a/**"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["configs", "config_name", "data_files", "data_dir", "split", "path", "default"]), inner
    ),
    max_leaves=12,
)  # fmt: skip
paths = st.lists(
    st.lists(st.sampled_from(["train", "test", "a", "b", "data", "partial-train", "x-00000-of-00002"]), min_size=1,
             max_size=3).map("/".join).flatmap(
        lambda path: st.sampled_from([".jsonl", ".parquet", ".csv", ".py", "/0000.parquet"]).map(path.__add__)
    ),
    unique=True,
    max_size=6,
)  # fmt: skip


@given(paths, json_values, st.sampled_from(["", "a", "data", "default"]), st.sampled_from(["", "train", "test"]))
def test_any_repository_gives_files_of_its_own_or_one_line(tree, metadata, config, split):
    metadata = {"configs": [metadata]} if isinstance(metadata, dict) else metadata
    try:
        found = choose(tree, metadata, config, split)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 (one of two outcomes)
        return
    assert found.files
    assert {*found.files} <= {*tree}
    assert choose(tree, metadata, found.config, found.split).files == found.files
