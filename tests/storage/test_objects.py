"""Objects on a real S3 server."""

from __future__ import annotations

import pickle
import threading

import pytest

from raylora.errors import RemoteError
from raylora.storage.objects import Remote


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
