"""The records that everything is made of."""

from __future__ import annotations

from raylora import records


def test_digests_of_nothing_have_the_right_shape():
    assert records.digests_of([]).shape == (0, 32)
