"""Answers on disk, batch by batch: a killed evaluation is continued, and several processes share one evaluation.

A folder holds ``plan.json`` (the score's key and the token budget), an empty file ``claim-N`` for each batch that a
process has begun, and ``answers-NAME.jsonl`` for each process, a line a batch. The process that needs the score owns
the folder and takes batches from the first on; helpers take them from the last on. The next owner continues the folder
of one that died. A line begins with its digest: a damaged one is passed over, and its questions are asked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from raylora.storage.atomic import partial_of, write_text
from raylora.storage.damage import note_file, read_sealed
from raylora.storage.digests import seal

OWNER = "owner"
DIGEST_CHARS = 16


@dataclass(frozen=True)
class Answer:
    """A model's answer to one question."""

    logprobs: list[float]
    """Log-likelihoods of the choices, in nats."""
    prediction: int | None
    """The index of the choice; None where the generated text names none."""
    text: str = ""
    """What was generated, where answers are."""


class Journal:
    """One process's view of the folder; without a folder, answers are kept in memory only.

    Args:
        key: identity of the score. The owner throws a folder of another key away.
        helper: this process's name in the folder, if it is a helper; no two helpers may have the same.
    """

    def __init__(self, folder: Path | None, key: str, helper: str | None = None) -> None:
        self.folder, self.key, self.name = folder, key, helper or OWNER
        self.is_helper = helper is not None
        self.answers: dict[int, Answer] = {}  # by the question's index
        self.budget: int | None = None  # tokens in a batch; see ``open`` for both
        self.reduced: int | None = None
        plan = (read_sealed(folder / "plan.json") if folder else None) or {}
        budgets = [plan.get("budget"), plan.get("reduced")]
        if plan.get("key") == key and all(isinstance(number, int) for number in budgets):
            self.budget, self.reduced = budgets
        elif folder and not self.is_helper:
            shutil.rmtree(folder, ignore_errors=True)
        self.read_others()
        if folder and not self.is_helper:
            self._clean_up(folder)

    def _clean_up(self, folder: Path) -> None:
        """Remove what killed processes left: claims of batches nobody is at, and lines that were cut off.

        All answers so far go into the owner's file; the helpers' files are deleted.
        """
        for claim in folder.glob("claim-*"):
            claim.unlink()
        if self.answers:
            write_text(folder / f"answers-{OWNER}.jsonl", self._line(self.answers))
        for path in folder.glob("answers-*.jsonl"):
            if path.stem != f"answers-{OWNER}" or not self.answers:
                path.unlink()

    @property
    def is_open(self) -> bool:
        """Whether the owner has fixed the batches, so that others can help."""
        return self.budget is not None

    def open(self, budget: int, reduced: int) -> None:
        """Fix how questions are cut into batches; the owner writes it down for its helpers and its successor.

        All must cut alike: batch N is then the same for all, and so is a log-likelihood of LLM.int8, which depends on
        the other questions in its batch (by 0.45 nats in the median, benchmarks/NOTES.md).

        Args:
            budget: tokens in a batch.
            reduced: tokens in one forward pass; less than ``budget`` once memory has run out.
        """
        self.budget, self.reduced = budget, reduced
        if self.folder and not self.is_helper:
            write_text(self.folder / "plan.json", seal({"key": self.key, "budget": budget, "reduced": reduced}))

    def claim(self, number: int) -> bool:
        """Claim a batch; False where another process has begun it, or the score is finished."""
        if not self.folder:
            return True
        try:
            (self.folder / f"claim-{number}").open("x").close()  # "x" fails if it exists: one process succeeds
        except OSError:  # it exists; or the folder is gone, as the score is finished
            return False
        return True

    def add(self, answers: dict[int, Answer]) -> None:
        """Keep answers, by question index, in memory and in this process's file."""
        self.answers |= answers
        if self.folder:
            # The owner may have finished meanwhile, and removed the folder.
            with contextlib.suppress(FileNotFoundError) if self.is_helper else contextlib.nullcontext():
                self._append(answers)

    def _append(self, answers: dict[int, Answer]) -> None:
        assert self.folder
        with (self.folder / f"answers-{self.name}.jsonl").open("a+b") as file:
            if file.tell():  # a process of this name may have died in the middle of a line
                file.seek(-1, 2)
                file.write(b"" if file.read() == b"\n" else b"\n")
            file.write(self._line(answers).encode("utf-8"))

    @staticmethod
    def _line(answers: dict[int, Answer]) -> str:
        text = json.dumps({i: [a.logprobs, a.prediction, a.text] for i, a in answers.items()})
        return f"{_digest(text.encode('utf-8'))} {text}\n"

    def read_others(self) -> None:
        """Read the answers of all processes so far, but for lines that are damaged, or not written to their end yet."""
        if not self.folder or not self.is_open:
            return
        for path in self.folder.glob("answers-*.jsonl"):
            for answers in _read_lines(path):
                self.answers |= answers

    def knows(self, indices: Sequence[int]) -> bool:
        """Whether all these questions, given by index, are answered."""
        return all(i in self.answers for i in indices)

    def remove(self) -> None:
        """Delete the folder, as the score is stored."""
        if self.folder and self.folder.is_dir():
            # Renamed first: a helper that still writes finds no folder, and cannot fill one that is being deleted.
            renamed = self.folder.rename(partial_of(self.folder))
            shutil.rmtree(renamed, ignore_errors=True)


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:DIGEST_CHARS]


def _read_lines(path: Path) -> Iterator[dict[int, Answer]]:
    """The answers in each whole line of a file."""
    for line in path.read_bytes().split(b"\n")[:-1]:  # the last one has no end yet; most often it is empty
        # Lines of older versions have no digest: they begin with the JSON.
        given, _, text = line.partition(b" ") if line[:1] != b"{" else (b"", b"", line)
        try:
            if given and given.decode("ascii") != _digest(text):
                raise ValueError("its digest does not fit")
            yield {int(i): Answer(*_checked(*values)) for i, values in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError, RecursionError):
            note_file(path, then="the questions of its damaged lines are asked again")


def _checked(logprobs: list[float], prediction: int | None, text: str = "") -> tuple[list[float], int | None, str]:
    if not (isinstance(logprobs, list) and isinstance(prediction, int | None) and isinstance(text, str)):
        raise TypeError("no answer")
    return [float(value) for value in logprobs], prediction, text
