"""A base of its own for every test, as training's hooks and failures may leave it changed."""

from __future__ import annotations

import pytest

from raylora.data.encoding import encode_example
from raylora.model.adapters import LoadedModel
from tests.helpers.tiny import make_model
from tests.helpers.training import make_examples


@pytest.fixture
def loaded(tokenizer):
    return LoadedModel(make_model().requires_grad_(False), tokenizer, "tiny", "none")


@pytest.fixture
def encoded(tokenizer):
    return [encode_example(tokenizer, e, 256) for e in make_examples(16)]
