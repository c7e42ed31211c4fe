"""Objects on a real S3 server."""

from __future__ import annotations

import pickle
import threading
import time

import pytest

from raylora.errors import RemoteError
from raylora.storage import objects as object_module
from raylora.storage.objects import Remote, one_try
from tests.helpers.objects import BUCKET
from tests.helpers.s3_runs import behind_proxy


def test_objects_are_written_whole_read_listed_and_removed(remote, objects, tmp_path):
    assert remote.read("a") is None
    assert remote.list("") == []
    remote.write("a", b"1")
    remote.write("d/e/f", b"2")
    remote.write("d/g", b"3")
    remote.write("d2", b"4")
    objects.put("outside", b"5")
    objects.put("out2/other", b"6")
    assert remote.list("") == ["a", "d/e/f", "d/g", "d2"]
    assert remote.list("d") == ["d/e/f", "d/g"]
    assert remote.read_many(["a", "nothing", "d/g"]) == {"a": b"1", "d/g": b"3"}
    assert remote.download("d", tmp_path / "d")
    assert (tmp_path / "d" / "e" / "f").read_bytes() == b"2"
    remote.upload("copy", tmp_path / "d")
    assert remote.list("copy") == ["copy/e/f", "copy/g"]
    assert not remote.download("nothing", tmp_path / "nothing")
    remote.remove("d")
    remote.remove("d")
    assert remote.list("") == ["a", "copy/e/f", "copy/g", "d2"]
    assert objects.names("out2") == ["out2/other"]


def test_of_many_who_create_an_object_one_succeeds(remote):
    won = []

    def create(number: int) -> None:
        if Remote(remote.place).create("one", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert remote.read("one") == str(won[0]).encode()


def test_a_create_whose_answer_was_lost_is_known_to_have_succeeded(remote):
    assert remote.create("one", b"token")
    assert remote.create("one", b"token"), "the second try of the same write"
    assert not remote.create("one", b"other")


def test_an_error_says_where_and_why_and_travels(objects):
    with pytest.raises(RemoteError) as caught:
        Remote("s3://no-such-bucket-here/x").write("name", b"")
    text = str(pickle.loads(pickle.dumps(caught.value)).strerror)
    assert text.startswith("s3://no-such-bucket-here/x/name: ")
    assert "\n" not in text


@pytest.fixture
def remote_and_proxy(objects):
    """A folder of the store as it is seen through a proxy that injects faults, and the proxy."""
    with behind_proxy() as proxy:
        remote = Remote(f"s3://{BUCKET}/out")
        remote.write("known", b"here")
        yield remote, proxy


def test_what_a_store_does_not_find_for_a_moment_is_asked_for_again(remote_and_proxy, tmp_path):
    remote, proxy = remote_and_proxy
    for ask, answer in (
        (lambda: remote.read("known"), b"here"),
        (lambda: remote.read_many(["known", "nothing"]), {"known": b"here"}),
        (lambda: remote.list(""), ["known"]),
        (lambda: remote.download("known", tmp_path / "copy"), True),
    ):
        proxy.inject("404")
        assert ask() == answer
        assert not proxy.num_left(), "the fault did not strike"
    assert (tmp_path / "copy").read_bytes() == b"here"
    assert remote.read("nothing") is None


def test_an_object_that_is_said_to_exist_and_does_not_is_created(remote_and_proxy, objects):
    remote, proxy = remote_and_proxy
    proxy.inject("412")
    assert remote.create("new", b"mine")
    assert objects.get("out/new") == b"mine"


@pytest.mark.parametrize("fault", ["500", "503", "cut"])
def test_a_store_that_fails_once_is_asked_again(remote_and_proxy, objects, fault):
    remote, proxy = remote_and_proxy
    proxy.inject(fault)
    assert remote.create("one", b"1")
    assert objects.get("out/one") == b"1"
    assert not proxy.num_left(), "the fault did not strike"


def test_a_store_that_is_down_is_given_up_once_and_not_by_each_operation(remote_and_proxy, monkeypatch):
    remote, proxy = remote_and_proxy
    monkeypatch.setattr(object_module, "PATIENCE_SECONDS", 2.5)
    proxy.inject("500", times=10**6)
    began = time.monotonic()
    with pytest.raises(RemoteError, match="out/a: "):
        remote.write("a", b"1")
    took = time.monotonic() - began
    assert 0.9 < took < 2.5, "it was asked again, for less than its patience"
    for _ in range(3):
        with pytest.raises(RemoteError):
            remote.write("b", b"1")
    assert time.monotonic() - began < 2 * took + 3
    proxy.clear()
    remote.write("a", b"1")
    assert remote.read("a") == b"1"


def test_what_the_user_set_for_s3_stays(objects, monkeypatch):
    from fsspec.config import conf

    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 77, "user_agent_extra": "lab"}})
    options = one_try(f"s3://{BUCKET}/out")["config_kwargs"]
    assert (options["read_timeout"], options["user_agent_extra"], options["connect_timeout"]) == (77, "lab", 10)
    assert one_try("gs://bucket/out") == {}
