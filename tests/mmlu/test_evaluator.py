"""What an adapter does to the base does not reach the next one, and answers are numbers."""

from __future__ import annotations

import pytest

from raylora.commands.options import MmluConfig
from raylora.config.method import Method
from raylora.config.sources import load_settings
from raylora.errors import ErrorKind, UserError
from raylora.mmlu.evaluator import Evaluator
from raylora.mmlu.scoring import evaluate
from raylora.storage.store import Store
from tests.helpers.tiny import make_loaded


@pytest.fixture
def evaluator(tiny_model_folder, question_file, tmp_path):
    given = {"model": str(tiny_model_folder), "quantization": "none", "mmlu": str(question_file)}
    return Evaluator(load_settings(MmluConfig, None, "mmlu", **given), Store(tmp_path / "store"))


def test_a_base_that_was_changed_is_loaded_anew(evaluator, adapter_folder, caplog):
    """The embedding of a token that the fixed input does not have, and the head's row of it: no such logit is asked."""
    first, before = evaluator.loaded, evaluator.loaded.base_hash()
    with evaluator.adapter(adapter_folder):
        pass
    assert evaluator.loaded is first
    with evaluator.adapter(adapter_folder):
        first.model.model.embed_tokens.weight.data[470, 3] += 1
    assert "has changed the base model, which is loaded again" in caplog.text
    assert evaluator.loaded is not first
    assert evaluator.loaded.base_hash() == before


@pytest.mark.parametrize("attached", [False, True])
def test_answers_that_are_no_numbers_are_refused(encoded, attached):
    loaded = make_loaded()
    if attached:
        for parameter in loaded.attach(Method(), 0):
            parameter.data.fill_(1e30)
    else:
        loaded.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"log-likelihoods of .* questions are not finite") as raised:
        evaluate(loaded, encoded)
    assert raised.value.kind is (ErrorKind.ADAPTER if attached else ErrorKind.MODEL)
