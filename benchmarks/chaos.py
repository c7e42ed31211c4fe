"""Strike the real command with faults, and count what was lost: rows, tables, last lines.

    python -m benchmarks.chaos --faults 1000 --seed 1 --folder chaos       # resumes where it was stopped
    python -m benchmarks.chaos --folder chaos --table                      # the table of docs/faults.md

A round is a run of twelve datasets with a tiny model: started, struck, started again, until no fault is left and the
same command, undisturbed, comes to its end. What must hold is checked all the time:

- each poll of the tables finds them whole, no dataset twice, each row equal to that of an undisturbed run;
- the command ends, soon, with a code that says what happened, and its last line is raylora's;
- no process of it is left, and after an orderly end the tables hold every finished row;
- in the end each dataset has one row, equal to the undisturbed one to the last digit, and nothing is left behind.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos_faults import FAULTS, Fault, MissedError, faults_at
from benchmarks.chaos_places import TABLES, Place, Places, parse_table
from tests.helpers.fault_runs import DATASETS, still, write_chunk

PLACES = {"disk": 0.6, "store": 0.25, "cluster": 0.15}
"""Where rounds happen, and how many of them."""
MAX_ATTEMPTS = 6
END_SECONDS = 120.0
"""In this time a command must have ended after the fault that is to end it."""
RUN_SECONDS = 400.0
EARLY = 0.2
"""How many of the faults strike in the first seconds of a command."""
STILL_RUNS = 1000
"""In place of an exit code."""
ERRORS_OF_FAULTS = {"worker_died", "timeout", "missing_file", "node_lost"}
"""Kinds of error rows that a fault may give until ``--retry-failed``."""


@dataclass
class Round:
    """What happened to one output.

    Attributes:
        faults: name, what was struck, the code that the command ended with.
        violations: each a line; none: all held.
    """

    seed: int
    number: int
    place: str
    faults: list[dict[str, Any]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    num_commands: int = 0
    num_polls: int = 0
    num_rows: int = 0
    seconds: float = 0.0


class Watcher(threading.Thread):
    """Reads the tables all the time, and notes what is wrong with them."""

    def __init__(self, place: Place, reference: dict[str, dict[str, Any]]) -> None:
        super().__init__(daemon=True)
        self._place, self._reference = place, reference
        self._over = threading.Event()
        self._last: dict[str, bytes] = {}
        self.violations: list[str] = []
        self.num_polls = 0

    def run(self) -> None:
        while not self._over.wait(0.1):
            for name in TABLES:
                self.look(name)

    def look(self, name: str) -> None:
        data = self._place.read(name)
        self.num_polls += data is not None
        if data is None or data == self._last.get(name):
            return
        self._last[name] = data
        try:
            table = parse_table(name, data)
        except Exception as error:  # noqa: BLE001 - whatever pandas and pyarrow say of a torn file
            self.violations.append(f"unreadable: {name}: {type(error).__name__}: {str(error)[:100]}")
            return
        self.violations += check_table(name, table, self._reference)

    def stop(self) -> None:
        self._over.set()
        self.join()


def rows_of(table: Any) -> dict[str, dict[str, Any]]:
    return {row["dataset"]: row for row in table.astype(object).where(table.notna(), None).to_dict("records")}


def check_table(name: str, table: Any, reference: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with a table at any moment. Values are compared in Parquet, which keeps them to the last digit."""
    found = []
    doubled = [n for n, k in collections.Counter(table["dataset"]).items() if k > 1]
    found += [f"doubled: {name}: {n}" for n in doubled]
    if name.endswith(".csv"):
        return found
    for dataset, row in rows_of(table).items():
        if row["status"] == "error":
            if row["error_kind"] not in ERRORS_OF_FAULTS:
                found.append(f"error row: {dataset}: {row['error_kind']}: {str(row['error'])[:200]}")
        elif dataset not in reference or still(row) != still(reference[dataset]):
            expected = reference.get(dataset, {})
            different = {k: (v, expected.get(k)) for k, v in still(row).items() if v != expected.get(k)}
            found.append(f"changed: {name}: {dataset}: {str(different)[:300]}")
    return found


class Campaign:
    """Rounds with one seed, in one folder, which keeps those that are done."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._file = folder / "rounds.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def rounds(self) -> list[Round]:
        if not self._file.is_file():
            return []
        return [Round(**json.loads(line)) for line in self._file.read_text(encoding="utf-8").splitlines()]

    def run(self, num_faults: int, places: list[str]) -> None:
        """More rounds, until ``num_faults`` faults have struck in all of them together."""
        if sum(len(r.faults) for r in self.rounds()) >= num_faults:
            return
        with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
            root = Path(temporary)
            data, model = write_chunk(root / "data"), save_tiny(root / "model")
            with Places(root, data, model) as made:
                reference = self._undisturbed(made)
                for number in itertools.count(len(self.rounds())):
                    done = sum(len(r.faults) for r in self.rounds())
                    if done >= num_faults:
                        break
                    rng = random.Random(f"{self._seed}/{number}")
                    name = rng.choices(places, [PLACES[p] for p in places])[0]
                    with made.make(name) as place:
                        record = RoundRunner(place, reference, rng, Round(self._seed, number, name)).run()
                    with self._file.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(vars(record)) + "\n")
                    show(record, done)

    def _undisturbed(self, made: Places) -> dict[str, dict[str, Any]]:
        with made.make("disk") as place:
            process = place.start()
            shown, _ = process.communicate(timeout=RUN_SECONDS)
            if process.returncode:
                raise SystemExit(f"a run that nothing disturbed failed:\n{shown}")
            return rows_of(parse_table("results.parquet", place.read("results.parquet") or b""))


class RoundRunner:
    """One output from its first command to its last row."""

    def __init__(self, place: Place, reference: dict[str, dict[str, Any]], rng: random.Random, record: Round) -> None:
        self._place, self._reference, self._rng, self._record = place, reference, rng, record
        self._num_done = 0
        self._was_damaged = False

    def run(self) -> Round:
        began = time.monotonic()
        watcher = Watcher(self._place, self._reference)
        watcher.start()
        try:
            for _ in range(self._rng.randint(2, 5)):
                self._damage()
                if self._disturbed() == 0:
                    break
                self._place.quiet()
            self._damage()
            self._place.quiet()
            self._to_the_end()
        finally:
            watcher.stop()
        self._record.num_polls = watcher.num_polls
        self._record.violations += watcher.violations
        self._record.seconds = time.monotonic() - began
        return self._record

    def _damage(self) -> None:
        """Now and then, files are damaged while no command runs."""
        kinds = faults_at(self._place.name, is_between=True)
        if kinds and self._num_done:
            for fault in self._rng.choices(kinds, k=self._rng.randint(0, 3)):
                self._strike(fault, None)

    def _disturbed(self) -> int:
        """One command with some faults in it. Returns the code that it ended with."""
        kinds = faults_at(self._place.name, is_between=False)
        chosen = self._rng.sample([f for f in kinds if not f.is_last], k=self._rng.randint(1, 4))
        if lasts := [f for f in kinds if f.is_last]:
            chosen += self._rng.sample(lasts, k=1)
        with self._started() as (process, lines):
            struck: list[Fault] = []
            for fault in chosen:
                self._wait(process)
                if process.poll() is not None:
                    break
                if self._strike(fault, process):
                    struck.append(fault)
            is_to_end = any(f.is_last for f in struck)
            code = self._end_of(process, END_SECONDS if is_to_end else RUN_SECONDS, struck)
        for entry in self._record.faults[len(self._record.faults) - len(struck) :]:
            entry["exit"] = code
        self._check_end(code, lines, struck)
        return code

    def _to_the_end(self) -> None:
        for attempt in range(MAX_ATTEMPTS):
            with self._started(*(["--retry-failed"] if attempt else [])) as (process, lines):
                code = self._end_of(process, RUN_SECONDS, [])
            self._check_end(code, lines, [])
            if code == 0:
                break
        else:
            self._note(f"no end: after {MAX_ATTEMPTS} undisturbed commands: exit {code}: {last_line(lines)}")
        self._check_rows()

    @contextlib.contextmanager
    def _started(self, *more: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
        """The command, and its lines as they come."""
        process = self._place.start(*more)
        self._record.num_commands += 1
        lines: list[str] = []
        assert process.stdout
        reader = threading.Thread(target=lambda: lines.extend(process.stdout or []), daemon=True)
        reader.start()
        try:
            yield process, lines
        finally:
            process.kill()
            process.wait()
            reader.join(10)

    def _wait(self, process: subprocess.Popen[str]) -> None:
        """Until a random moment: now and then while Ray starts, else while workers are at work."""
        if self._rng.random() < EARLY:
            end, target = time.monotonic() + self._rng.uniform(0.2, 8), len(DATASETS) + 1
        else:
            end, target = time.monotonic() + 90, self._place.num_done() + self._rng.randint(1, 2)
        while process.poll() is None and time.monotonic() < end and self._place.num_done() < target:
            time.sleep(0.1)
        time.sleep(self._rng.uniform(0, 1))

    def _strike(self, fault: Fault, process: subprocess.Popen[str] | None) -> bool:
        try:
            what = fault.strike(self._place, process, self._rng)  # type: ignore[arg-type]
        except MissedError:
            return False
        self._was_damaged |= fault.is_between
        self._record.faults.append({"name": fault.name, "what": what, "exit": None})
        return True

    def _end_of(self, process: subprocess.Popen[str], seconds: float, struck: list[Fault]) -> int:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._note(f"no end: {seconds:.0f} s after {[f.name for f in struck]}")
            return STILL_RUNS

    def _check_end(self, code: int, lines: list[str], struck: list[Fault]) -> None:
        self._place.quiet()
        after = " after " + ", ".join(f.name for f in struck)
        shown = "".join(lines)
        allowed = {0, *(c for f in struck for c in f.exits)}
        if self._has_error_rows():
            allowed.add(1)
        if code not in allowed:
            self._note(f"exit {code}{after}: {last_line(lines)}")
        if "Traceback" in shown:
            self._note(f"traceback{after}: {last_line(lines)}")
        if code in {1, 130, 143} and not is_ours(last_line(lines)):
            self._note(f"last line{after}: exit {code}: {last_line(lines)}")
        self._check_left(after)
        num_done = self._place.num_done()
        if num_done < self._num_done and not self._was_damaged:
            self._note(f"lost{after}: {self._num_done} rows were stored, {num_done} are")
        self._num_done = num_done
        if code in {0, 1, 130, 143} and not {"disk full", "disk read-only"} & {f.name for f in struck}:
            data = self._place.read("results.parquet")
            num_rows = len(parse_table("results.parquet", data)) if data else 0
            if num_rows < num_done:
                self._note(f"lost{after}: {num_rows} rows in the table, {num_done} are stored; exit {code}")

    def _check_left(self, after: str) -> None:
        deadline = time.monotonic() + 60
        while (left := self._place.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        if left:
            self._note(f"left behind{after}: processes {[p.name() for p in left]}")
            for process in left:
                process.kill()

    def _has_error_rows(self) -> bool:
        data = self._place.read("results.parquet")
        return data is not None and bool((parse_table("results.parquet", data)["status"] == "error").any())

    def _check_rows(self) -> None:
        """In the end: one row a dataset, equal to the undisturbed one, in both tables."""
        for name in TABLES:
            data = self._place.read(name)
            datasets = list(parse_table(name, data)["dataset"]) if data else []
            for lost in sorted(set(DATASETS) - set(datasets)):
                self._note(f"lost: {name}: {lost}")
            self._record.num_rows = len(datasets)
        if data:
            table = parse_table("results.parquet", data)
            self._record.violations += check_table("results.parquet", table, self._reference)
            failed = table[table["status"] != "ok"]
            self._record.violations += [f"failed: {row.dataset}: {row.error}" for row in failed.itertuples()]
        self._record.violations += [f"left behind: {name}" for name in self._place.left_behind()]

    def _note(self, violation: str) -> None:
        self._record.violations.append(violation[:600])


def last_line(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]


def is_ours(line: str) -> bool:
    """Whether it is a line that raylora ends with."""
    return any(text in line for text in ("resumes from here", "raylora: ", " succeeded", "of each", "Files:"))


def save_tiny(folder: Path) -> Path:
    from tests.helpers.tiny import save_model

    return save_model(folder)


def show(record: Round, num_before: int) -> None:
    names = ", ".join(f["name"] for f in record.faults)
    where = f"round {record.number} ({record.place}, {record.seconds:.0f} s)"
    print(f"{num_before + len(record.faults)} faults; {where}: {names}")
    for violation in record.violations:
        print(f"    {violation}")
    sys.stdout.flush()


def counts(rounds: list[Round]) -> str:
    """The counts, as a table in Markdown."""
    struck = collections.Counter(f["name"] for r in rounds for f in r.faults)
    exits: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for fault in (f for r in rounds for f in r.faults if f["exit"] is not None):
        exits[fault["name"]][fault["exit"]] += 1
    bad = [v for r in rounds for v in r.violations]

    def num(*starts: str) -> int:
        return sum(v.startswith(starts) for v in bad)

    lines = ["| fault | struck | the command ended with |", "| --- | --- | --- |"]
    for fault in FAULTS:
        if struck[fault.name]:
            ends = ", ".join(f"{code}: {n}" for code, n in sorted(exits[fault.name].items()))
            lines.append(f"| {fault.name} | {struck[fault.name]} | {ends} |")
    lines += [
        f"| together | {sum(struck.values())} | |",
        "",
        f"{len(rounds)} rounds, {sum(r.num_commands for r in rounds)} commands, "
        f"{sum(r.num_polls for r in rounds)} reads of a table, {sum(r.num_rows for r in rounds)} rows in the end: "
        f"{num('lost')} lost, {num('doubled')} doubled, {num('changed', 'failed', 'error row')} changed, "
        f"{num('unreadable')} reads of a torn table, {num('exit', 'traceback', 'last line', 'no end')} wrong ends, "
        f"{num('left behind')} times something left behind.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--faults", type=int, default=30, help="that are to strike, in all (default: 30)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("chaos"), help="of the rounds that are done")
    parser.add_argument("--places", nargs="+", choices=[*PLACES], default=[*PLACES])
    parser.add_argument("--table", action="store_true", help="print the counts of what is done, and strike nothing")
    options = parser.parse_args(argv)
    campaign = Campaign(options.folder, options.seed)
    if not options.table:
        campaign.run(options.faults, options.places)
    rounds = campaign.rounds()
    print(counts(rounds))
    return int(any(r.violations for r in rounds))


if __name__ == "__main__":
    raise SystemExit(main())
