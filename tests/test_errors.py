"""Every exception is in ``raylora/errors.py``, has a kind, and keeps kind and text on its way between processes."""

from __future__ import annotations

import ast
import inspect
import pickle
from pathlib import Path

import pytest

from raylora import errors
from raylora.errors import ErrorKind, MachineError, RayloraError, RemoteError, UserError, errors_are, kind_of
from raylora.records import ProgressStage
from tests.helpers import ROOT

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, BaseException)]


def classes_of(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases)
    ]


def test_no_exception_is_defined_elsewhere():
    paths = [p for p in (ROOT / "raylora").rglob("*.py") if p.name != "errors.py"]
    assert [found for path in paths for found in classes_of(path)] == []
    assert len(classes_of(ROOT / "raylora" / "errors.py")) == len(CLASSES)


@pytest.mark.parametrize("error_class", CLASSES)
def test_kind_and_text_survive_pickling(error_class):
    assert issubclass(error_class, RayloraError)
    words = ("s3://bucket/x", "no such key") if issubclass(error_class, RemoteError) else ("a.json: line 1: empty",)
    error = error_class(*words)
    assert error.kind is error_class.kind
    if not issubclass(error_class, RemoteError):
        error.kind = ErrorKind.TIMEOUT
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is error_class
    assert (str(again), again.kind) == (str(error), error.kind)


def test_what_is_more_than_a_text_survives_too():
    again = pickle.loads(pickle.dumps(errors.NotJsonError("Expecting value", pos=3, line=2, column=1)))
    assert (again.message, again.pos, again.line, again.column) == ("Expecting value", 3, 2, 1)
    assert pickle.loads(pickle.dumps(errors.BadRecordError("empty", ", qa_pairs[1]"))).place == ", qa_pairs[1]"
    assert pickle.loads(pickle.dumps(UserError("x", kind=ErrorKind.MODEL))).kind is ErrorKind.MODEL
    assert pickle.loads(pickle.dumps(RemoteError("s3://a", "b"))).strerror == "s3://a: b"


def test_a_machines_fault_is_no_mistake_of_the_user():
    assert not issubclass(MachineError, UserError)
    assert issubclass(UserError, ValueError)
    assert issubclass(RemoteError, OSError)


def test_a_kind_that_is_not_known_is_unknown():
    assert ErrorKind("diverged") is ErrorKind.DIVERGED
    assert {ErrorKind(""), ErrorKind("of a later raylora"), kind_of(RuntimeError("x"))} == {ErrorKind.UNKNOWN}
    assert kind_of(errors.DoesNotFitError("x")) is ErrorKind.DOES_NOT_FIT


def test_the_closer_kind_stays():
    with pytest.raises(UserError) as caught, errors_are(ErrorKind.DATA):
        raise UserError("x", kind=ErrorKind.NOT_UTF8)
    assert caught.value.kind is ErrorKind.NOT_UTF8
    with pytest.raises(UserError) as caught, errors_are(ErrorKind.MODEL), errors_are(ErrorKind.DATA):
        raise UserError("x")
    assert caught.value.kind is ErrorKind.DATA


def test_questions_can_be_shared_and_a_training_cannot():
    assert [stage for stage in ProgressStage if stage.can_share] == [ProgressStage.BASE_MMLU, ProgressStage.MMLU]
