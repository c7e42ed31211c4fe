"""Whatever names and errors hold, a line on the terminal is one line."""

from __future__ import annotations

import io

from rich.table import Table

from raylora.console import clock, make_console, print_notes

EVIL = "a\x1b[2J\rb\nworker 1: forged\u202e"


def shown(what) -> str:
    out = io.StringIO()
    make_console(file=out, width=200).print(what)
    return out.getvalue()


def test_a_name_breaks_no_line():
    assert shown(f"worker 0: {EVIL} · train") == "worker 0: a\\x1b[2J\\rb\\nworker 1: forged\\u202e · train\n"
    out = io.StringIO()
    print_notes(make_console(file=out), [EVIL])
    assert len(out.getvalue().splitlines()) == 1


def test_nor_does_a_cell_a_header_or_a_title():
    table = Table(EVIL, title=EVIL, caption=EVIL)
    plain = Table("a", title="b", caption="c")
    table.add_row(EVIL)
    plain.add_row("d")
    text = shown(table)
    assert len(text.splitlines()) == len(shown(plain).splitlines())
    assert not set(text) & {"\x1b", "\r", "\u202e"}


def test_markup_and_secrets():
    assert shown("[x] :smile: https://u:hunter2@host") == "[x] :smile: https://...@host\n"


def test_durations():
    assert [clock(s) for s in (42, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 5 min"]
