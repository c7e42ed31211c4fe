"""What becomes of files on a disk: each takes a path and harms what is there."""

from __future__ import annotations

import shutil
from pathlib import Path


def _change(path: Path, start: int, new: bytes) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:start] + new + data[start + len(new) :])


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def torn(path: Path) -> None:
    path.write_bytes(b'{"a":')


def zeros(path: Path) -> None:
    size = path.stat().st_size
    _change(path, size // 3, bytes(max(1, size // 3)))


def flip_bit(path: Path) -> None:
    data = path.read_bytes()
    place = len(data) // 2
    while data[place : place + 1].isspace():  # between the values of JSON a blank more or less says nothing
        place += 1
    _change(path, place, bytes([data[place] ^ 0x01]))


def change_digit(path: Path) -> None:
    data = path.read_bytes()
    place = next(i for i in range(len(data) // 2, len(data)) if data[i : i + 1].isdigit())
    _change(path, place, b"%d" % ((int(data[place : place + 1]) + 1) % 10))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_utf8(path: Path) -> None:
    _change(path, path.stat().st_size // 2, b"\xff\xfe")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_folder(path: Path) -> None:
    remove(path)
    path.mkdir()


def make_link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


CONTENT = {f.__name__: f for f in (cut_short, torn, zeros, flip_bit, change_digit, empty, not_utf8)}
PLACE = {f.__name__: f for f in (make_folder, make_link)}
