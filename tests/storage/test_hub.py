"""What goes to the hub, by its own client, and what is said where the hub or the name is not good."""

from __future__ import annotations

import pytest

from raylora.errors import HubError, UserError
from raylora.storage.hub import check_push, push_files
from tests.helpers.hub import TOKEN


def test_files_lie_in_a_private_repository_that_is_made_once(hub, tmp_path):
    (tmp_path / "big").write_bytes(b"\0" * 100_000)
    files = {"adapter_model.safetensors": tmp_path / "big", "README.md": "ä".encode()}
    commit = push_files("org/one", files, "first", public=False)
    assert len(commit) == 40
    assert hub.files == {"org/one": {"adapter_model.safetensors": b"\0" * 100_000, "README.md": "ä".encode()}}
    assert hub.private == {"org/one": True}
    push_files("org/one", {"README.md": b"b"}, "second", public=False)
    assert hub.files["org/one"].keys() == files.keys()
    assert hub.files["org/one"]["README.md"] == b"b"
    push_files("org/two", {"README.md": b"c"}, "first", public=True)
    assert not hub.private["org/two"]


@pytest.mark.parametrize(
    ("where", "code", "of_all"), [("create", 403, True), ("commit", 403, True), ("/one", 400, False)]
)
def test_a_refusal_is_one_line(hub, where, code, of_all):
    hub.refuses = {where: code}
    with pytest.raises(HubError, match="the stand-in refuses") as caught:
        push_files("org/one", {"README.md": b"a"}, "first", public=False)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.of_all == of_all


@pytest.mark.parametrize("token", ["hf_wrong0123456789", "hf_not\x01a\nheader", "hf_käse0123456789"])
def test_no_text_holds_the_token(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError) as caught:
        push_files("org/one", {"README.md": b"a"}, "first", public=False)
    parts = [token[:12], token.encode("unicode_escape").decode()[:12], "wrong0123", "header", "0123456789"]
    assert not [part for part in parts if part in str(caught.value)], caught.value
    assert len(str(caught.value).splitlines()) == 1


def test_a_hub_that_is_not_there_is_one_line(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="refused") as caught:
        push_files("org/one", {"README.md": b"a"}, "first", public=False)
    assert caught.value.of_all


@pytest.mark.parametrize(
    "name", ["name", "a/b/c", "org/", "/name", "org/na me", "org/a--b", "org/ä", "org/" + "x" * 80]
)
def test_names_are_checked(hub, name):
    with pytest.raises(UserError, match="--push-to-hub") as caught:
        check_push("--push-to-hub", name)
    assert len(str(caught.value).splitlines()) == 1
    check_push("--push-to-hub", "org/name_1.x")


def test_without_a_token_or_offline_it_is_one_line(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no token of the hub: set HF_TOKEN"):
        check_push("--push-to-hub", "org/name")
    (tmp_path / "token").write_text(TOKEN)  # as a login keeps it
    check_push("--push-to-hub", "org/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        check_push("--push-to-hub", "org/name")
