"""The names of a run's datasets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.planning.names import name_datasets
from raylora.storage.hub_names import dataset_location


def names(*places: str) -> list[str]:
    return [dataset.name for dataset in name_datasets([dataset_location(place) for place in places])]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["/d/a.json", "/d/b.parquet"], ["a", "b"]),
        (["/d/a.json", "/d/a.parquet"], ["a.json", "a.parquet"]),
        (["/d/a.json", "/e/a.json", "/e/a.csv"], ["d/a.json", "e/a.json", "a.csv"]),
        (["/x/d/a.json", "/y/d/a.json"], ["x/d/a.json", "y/d/a.json"]),
        (["/a.json", "/d/a.json"], ["/a.json", "d/a.json"]),
        (["/d/a.json", "/d/a.json"], ["a"]),
        (["hf://datasets/org/name", "hf://datasets/org/name:test"], ["org--name", "org--name--test"]),
        (["hf://datasets/org/name/x", "hf://datasets/org/name:x"],
         ["hf://datasets/org/name/x", "hf://datasets/org/name:x"]),
        (["hf://datasets/org/name", "/d/org--name.json"], ["hf://datasets/org/name", "org--name.json"]),
    ],
)  # fmt: skip
def test_names_are_short_and_no_two_are_one(places, expected):
    assert names(*places) == expected


def test_ids_hold_a_folder_only_where_two_files_have_one_name():
    (alone,) = name_datasets([Path("/d/a.json")])
    (moved,) = name_datasets([Path("/e/a.json")])
    both = name_datasets([Path("/d/a.json"), Path("/e/a.json")])
    assert alone.identity == moved.identity == ("a", ".json")
    assert both[0].identity != both[1].identity


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "a.json", "a.csv"]), min_size=1, max_size=3).map("/".join)
        | st.sampled_from(["hf://datasets/a", "hf://datasets/a/b", "hf://datasets/a:b", "hf://datasets/a@v"]),
        max_size=6,
    )
)
def test_every_dataset_has_a_name_and_an_identity_of_its_own(places):
    found = name_datasets([dataset_location(place) for place in places])
    assert len(found) == len({*places})
    assert len({dataset.name for dataset in found}) == len(found)
    assert len({dataset.identity for dataset in found}) == len(found)
