"""Answers as they come, on disk, shared by every process that asks one model the same questions.

A folder holds a ``plan.json`` (key and token budget), a ``claim-N`` for each batch that somebody has begun, and an
``answers-NAME.jsonl`` for each process, a line a batch. The process whose score it is owns the folder, and walks from
the first batch; helpers walk from the last one. An owner that died leaves a folder that the next one goes on with.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raylora.storage.atomic import partial_of, read_json, write_text

OWNER = "owner"


@dataclass(frozen=True)
class Answer:
    """Four log-likelihoods, the prediction (0 to 3, None if unparsed), and the text that was written."""

    logprobs: list[float]
    prediction: int | None
    text: str = ""


class Journal:
    """One process's sight of the folder; without a folder, of its own memory only.

    Args:
        key: identity of the score. What lies in the folder under another key is thrown away by its owner.
        helper: this process's name in the folder, where it does not own it.
    """

    def __init__(self, folder: Path | None, key: str, helper: str | None = None) -> None:
        self.folder, self.key, self.name = folder, key, helper or OWNER
        self.is_helper = helper is not None
        self.answers: dict[int, Answer] = {}
        self.budget: int | None = None
        self.reduced: int | None = None
        plan = read_json(folder / "plan.json") if folder else None
        if plan and plan.get("key") == key:
            self.budget, self.reduced = plan["budget"], plan["reduced"]
        elif folder and not self.is_helper:
            shutil.rmtree(folder, ignore_errors=True)
        self.read_others()
        if folder and not self.is_helper:
            self._tidy(folder)

    def _tidy(self, folder: Path) -> None:
        """What earlier processes left: claims of the dead, and lines torn as they died."""
        for claim in folder.glob("claim-*"):
            claim.unlink()
        if self.answers:
            write_text(folder / f"answers-{OWNER}.jsonl", self._line(self.answers))
        for path in folder.glob("answers-*.jsonl"):
            if path.stem != f"answers-{OWNER}" or not self.answers:
                path.unlink()

    @property
    def is_open(self) -> bool:
        """Whether there is a plan to help with."""
        return self.budget is not None

    def open(self, budget: int, reduced: int) -> None:
        """Say how batches are cut, so that all cut them alike: what shares a batch moves an 8-bit model's numbers.

        Args:
            budget: padded tokens in a batch.
            reduced: what of it memory allows at once; the same until it ran out.
        """
        self.budget, self.reduced = budget, reduced
        if self.folder and not self.is_helper:
            plan = {"key": self.key, "budget": budget, "reduced": reduced}
            write_text(self.folder / "plan.json", json.dumps(plan))

    def claim(self, number: int) -> bool:
        """Whether the batch is this process's to ask: nobody else has begun it."""
        if not self.folder:
            return True
        try:
            (self.folder / f"claim-{number}").open("x").close()
        except OSError:  # it is there; or the folder is gone, as the score is finished
            return False
        return True

    def add(self, answers: dict[int, Answer]) -> None:
        self.answers |= answers
        if self.folder:
            # The owner may have finished, and taken the folder away.
            with contextlib.suppress(FileNotFoundError) if self.is_helper else contextlib.nullcontext():
                self._append(answers)

    def _append(self, answers: dict[int, Answer]) -> None:
        assert self.folder
        with (self.folder / f"answers-{self.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(self._line(answers))

    @staticmethod
    def _line(answers: dict[int, Answer]) -> str:
        return json.dumps({i: [a.logprobs, a.prediction, a.text] for i, a in answers.items()}) + "\n"

    def read_others(self) -> None:
        """Take in what others have answered so far, up to a line that is not whole yet."""
        if not self.folder or not self.is_open:
            return
        for path in self.folder.glob("answers-*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.answers |= {int(i): Answer(*a) for i, a in json.loads(line).items()}
                except (ValueError, KeyError, TypeError, AttributeError):
                    break

    def knows(self, indices: Sequence[int]) -> bool:
        return all(i in self.answers for i in indices)

    def remove(self) -> None:
        """The score is stored. Out of the helpers' way first: what they write goes nowhere."""
        if self.folder and self.folder.is_dir():
            aside = self.folder.rename(partial_of(self.folder))
            shutil.rmtree(aside, ignore_errors=True)
