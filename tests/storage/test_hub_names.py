"""Names of datasets on the hub."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.errors import UserError
from raylora.storage.hub_names import HubDataset, dataset_location

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "parts", "name"),
    [
        ("hf://datasets/org/name", ("org/name",), "org--name"),
        ("hf://datasets/org/name/", ("org/name",), "org--name"),
        ("hf://datasets/name", ("name",), "name"),
        ("hf://datasets/name:test", ("name", "", "", "test"), "name--test"),
        ("hf://datasets/org/na.me_1-2/en", ("org/na.me_1-2", "", "en"), "org--na.me_1-2--en"),
        ("hf://datasets/org/name/2024.01:train_sft", ("org/name", "", "2024.01", "train_sft"),
         "org--name--2024.01--train_sft"),
        ("hf://datasets/org/name@v1.0/en:dev", ("org/name", "v1.0", "en", "dev"), "org--name--en--dev--v1.0"),
        (f"hf://datasets/org/name@{COMMIT}", ("org/name", COMMIT), "org--name--0123456789ab"),
        ("hf://datasets/name@main/en", ("name", "main", "en"), "name--en--main"),
        ("hf://datasets/org/name@a%2Fb", ("org/name", "a/b"), "org--name--a_b"),
        ("hf://datasets/org/name@refs/convert/parquet/en:train", ("org/name", "refs/convert/parquet", "en", "train"),
         "org--name--en--train--refs_convert"),
        ("hf://datasets/org/name/data/train.jsonl", ("org/name", "", "data/train.jsonl"),
         "org--name--data--train.jsonl"),
    ],
)  # fmt: skip
def test_a_name_and_its_parts(text, parts, name):
    found = dataset_location(text)
    assert found == HubDataset(*parts)
    assert isinstance(found, HubDataset)
    assert found.name == name
    assert str(found) == text.rstrip("/")
    assert dataset_location(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "hf://", "hf://datasets", "hf://datasets/", "hf://org/name", "hf://models/org/name", "hf://datasets//name",
        "hf://datasets/org/name:", "hf://datasets/org/name:train[:10]", "hf://datasets/org/name:a:b",
        "hf://datasets/org/name@", "hf://datasets/org/name@../x", "hf://datasets/org/name/../../x",
        "hf://datasets/../name", "hf://datasets/or g/name", "hf://datasets/org/a--b", "hf://datasets/org/name?x=1",
        "hf://datasets/org/name@%2E%2E%2Fx", "hf://datasets/org/name/en//x", "hf://user:secret@datasets/org/name",
        "hf://datasets/org/name\n", "hf://datasets/org/" + "n" * 100,
    ],
)  # fmt: skip
def test_what_is_no_name_is_one_line(text):
    if text.endswith("\n"):
        assert dataset_location(text) == HubDataset("org/name")
        return
    with pytest.raises(UserError) as caught:
        dataset_location(text)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@given(st.text(st.sampled_from("ab/.@:%2F-_ é\n[?"), max_size=20))
def test_any_text_is_a_name_that_is_read_again_or_one_line(text):
    try:
        found = dataset_location(f"hf://datasets/{text}")
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 (one of two outcomes)
        return
    assert isinstance(found, HubDataset)
    assert dataset_location(str(found)) == found
    assert not {"/", "\\", "\n", ":"} & {*found.name}
    assert found.name not in {"", ".", ".."}
