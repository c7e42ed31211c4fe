"""A base of its own for every test, as hooks and failures may leave it changed."""

from __future__ import annotations

import pytest

from tests.helpers.tiny import make_loaded


@pytest.fixture
def loaded():
    return make_loaded()
