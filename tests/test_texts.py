"""What is shown holds no secret, no line break and nothing that a terminal obeys."""

from __future__ import annotations

import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.errors import UserError, one_line
from raylora.texts import LineFormatter, printable, shown_line, shown_values, without_secrets

TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:hunter2@host/x", "https://...@host/x"),
        ("https://user:p@ss:w/rd@host/x", "https://...@host/x"),
        ("https://token@host/x is down", "https://...@host/x is down"),
        ("s3://b/k?X-Amz-Signature=abc&x=1, again", "s3://b/k?... again"),
        (f"GET /api {TOKEN}: 401", "GET /api hf_...: 401"),
        ("X-Amz-Signature=abc123 password=hunter2;", "X-Amz-Signature=... password=...;"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ..."),
        ("hf://datasets/org/name@main/config:train", "hf://datasets/org/name@main/config:train"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("a.json: line 7, column 12: not JSON", "a.json: line 7, column 12: not JSON"),
        ("write to a@b.org: eos_token=</s>, hf_small", "write to a@b.org: eos_token=</s>, hf_small"),
    ],
)
def test_secrets_within_texts(text, shown):
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown
    assert str(UserError(text)) == shown


def test_what_variables_hold_is_no_text(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:correct horse@host:5000 ")
    monkeypatch.setenv("OTHER_TRACKING_URI", "http://me:battery9@host:5000")
    monkeypatch.setenv("SHORT_KEY", "none")
    monkeypatch.setenv("SORT_KEY", "experiment")
    assert (
        without_secrets("0123456789abcdef refused, battery9 too; none, experiment")
        == "... refused, ... too; none, experiment"
    )


def test_a_secret_is_gone_before_a_text_is_cut():
    text = "x" * 280 + " http://user:" + "secret" * 10 + "@host"
    assert "secret" not in one_line(RuntimeError(text))


@given(st.text())
def test_a_line_is_one_line(text):
    shown = shown_line(text)
    assert len(shown.splitlines()) <= 1
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert printable(shown) == shown


def test_names_of_all_scripts_stay_as_they_are():
    for name in ("données", "数据 集", "данные", "a\u00a0b", "x=[1]:smile:"):
        assert shown_line(name) == name
    assert shown_line("a\nb\x1b[2J\u202e\u200bc\r") == r"a\nb\x1b[2J\u202e\u200bc\r"


def test_values_at_any_depth():
    value = {"model": "https://u:p@h", "n": 3, "sets": ["s3://b?x", None], "seeds": (1, 2)}
    assert shown_values(value) == {"model": "https://...@h", "n": 3, "sets": ["s3://b?...", None], "seeds": [1, 2]}


def test_a_name_forges_no_line_of_the_log(tmp_path):
    handler = logging.FileHandler(tmp_path / "log.txt", encoding="utf-8")
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.Logger("test")
    log.addHandler(handler)
    forged = "\n2026-01-01 00:00:00 INFO finished: ok"
    log.info("dataset %s", f"a{forged}")
    try:
        raise ValueError(f"http://u:hunter2@h{forged}")
    except ValueError:
        log.exception("failed")
    handler.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert not [line for line in lines if line.startswith("2026-01-01")]
    assert not [line for line in lines if "hunter2" in line]
    assert [line[24:].lstrip() for line in lines[:2]] == [
        r"INFO dataset a\n2026-01-01 00:00:00 INFO finished: ok",
        "ERROR failed",
    ]
    assert all(line.startswith("  ") for line in lines[2:])
