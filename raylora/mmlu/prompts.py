"""Questions as token ids, as lm-evaluation-harness 0.4.13 draws them, or in the model's own chat template.

words   The following are ... Answer:| A
ids     c0 c1 c2 ...              cn | a
                                  ^ the logits here say how likely each letter is
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from raylora.data.encoding import render_chat
from raylora.errors import UserError
from raylora.mmlu.questions import LETTERS
from raylora.records import Message, Question

PromptStyle = Literal["harness", "chat"]
ENCODED_AT_ONCE = 256
"""Questions tokenized together."""
CHAT_INSTRUCTION = "Answer with the letter of the right option only: A, B, C or D."


@dataclass(frozen=True)
class EncodedQuestion:
    """A question's prompt and its four continuations as token ids."""

    question: Question
    context_ids: list[int]
    continuations: list[list[int]]
    num_truncated: int
    """Tokens that were cut from the prompt's front, because it was longer than the model's window."""

    @property
    def single_token(self) -> bool:
        """Whether one look at the last position tells all four choices apart."""
        return len({tuple(c) for c in self.continuations}) == 4 and all(len(c) == 1 for c in self.continuations)

    def __len__(self) -> int:
        return len(self.context_ids)


def build_shots(dev: Iterable[Question], subjects: Iterable[str], num_fewshot: int) -> dict[str, list[Question]]:
    """The first ``num_fewshot`` solved questions of each subject, in their order.

    Raises:
        UserError: a subject has fewer.
    """
    by_subject: dict[str, list[Question]] = {subject: [] for subject in subjects}
    for question in dev:
        if question.subject in by_subject:
            by_subject[question.subject].append(question)
    short = [f"{subject} has {len(q)}" for subject, q in by_subject.items() if len(q) < num_fewshot]
    if short:
        more = f" and {len(short) - 5} more subjects" if len(short) > 5 else ""
        raise UserError(f"--num-fewshot {num_fewshot}: too few dev questions: {', '.join(short[:5])}{more}")
    return {subject: group[:num_fewshot] for subject, group in by_subject.items()}


def encode_questions(
    tokenizer: Any,
    questions: Sequence[Question],
    shots: dict[str, list[Question]],
    prompt_style: PromptStyle,
    max_length: int,
) -> list[EncodedQuestion]:
    """Prompts in the order of ``questions``; one that is too long for ``max_length`` tokens loses its front.

    Raises:
        UserError: ``chat`` and the tokenizer has no chat template.
    """
    if prompt_style == "chat" and not tokenizer.chat_template:
        raise UserError("--prompt-style chat: the tokenizer has no chat template; use --prompt-style harness")
    encoded: list[EncodedQuestion] = []
    for start in range(0, len(questions), ENCODED_AT_ONCE):
        chunk = questions[start : start + ENCODED_AT_ONCE]
        if prompt_style == "chat":
            contexts = [chat_prompt(tokenizer, q, shots.get(q.subject, [])) for q in chunk]
            parts = _split(
                tokenizer, contexts, LETTERS, add_special_tokens=not _begins_with_bos(tokenizer, contexts[0])
            )
        else:
            contexts = [harness_prompt(q, shots.get(q.subject, [])) for q in chunk]
            parts = _split(tokenizer, contexts, [f" {letter}" for letter in LETTERS], add_special_tokens=True)
        encoded += [_truncate(q, p, max_length) for q, p in zip(chunk, parts, strict=True)]
    return encoded


def harness_prompt(question: Question, shots: Sequence[Question]) -> str:
    """The description, the solved questions, and the question up to ``Answer:``."""
    subject = question.subject.replace("_", " ")
    text = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    for shot in shots:
        text += f"{_block(shot)} {LETTERS[shot.answer]}\n\n"
    return text + _block(question)


def _block(question: Question) -> str:
    options = "".join(f"\n{letter}. {c}" for letter, c in zip(LETTERS, question.choices, strict=True))
    return f"{question.question.strip()}{options}\nAnswer:"


def chat_prompt(tokenizer: Any, question: Question, shots: Sequence[Question]) -> str:
    """The question as a user's turn, the solved ones as turns before it, up to where the assistant answers."""
    messages = []
    for shot in shots:
        messages += [Message("user", _chat_question(shot)), Message("assistant", LETTERS[shot.answer])]
    messages.append(Message("user", _chat_question(question)))
    return render_chat(tokenizer, messages, add_generation_prompt=True)


def _chat_question(question: Question) -> str:
    options = "\n".join(f"{letter}. {c}" for letter, c in zip(LETTERS, question.choices, strict=True))
    return f"{question.question.strip()}\n{options}\n\n{CHAT_INSTRUCTION}"


def _split(
    tokenizer: Any, contexts: Sequence[str], continuations: Sequence[str], add_special_tokens: bool
) -> list[list[tuple[list[int], list[int]]]]:
    """For each context its ids with each continuation, as those of one string cut at the length of the context's own.

    White space at the context's end goes to the continuation, since tokenizers join it with what follows.
    """
    stripped = [context.rstrip() for context in contexts]
    wholes = [context + continuation for context in contexts for continuation in continuations]
    lengths = [len(ids) for ids in tokenizer(stripped, add_special_tokens=add_special_tokens)["input_ids"]]
    ids = tokenizer(wholes, add_special_tokens=add_special_tokens)["input_ids"]
    n = len(continuations)
    return [
        [(whole[:length], whole[length:]) for whole in ids[i * n : (i + 1) * n]] for i, length in enumerate(lengths)
    ]


def _begins_with_bos(tokenizer: Any, context: str) -> bool:
    """Whether a chat template has put the token that begins a text there already."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return first is not None and context.startswith(tokenizer.decode(first))


def _truncate(question: Question, parts: list[tuple[list[int], list[int]]], max_length: int) -> EncodedQuestion:
    """Every choice has the same context, except where a tokenizer joins over the border: then it is one to each."""
    context = parts[0][0]
    shared = min((_common(context, ids) for ids, _ in parts), default=0)
    continuations = [ids[shared:] + continuation for ids, continuation in parts]
    context = context[:shared]
    # The last token of a continuation is scored, never fed in: it does not count for the window.
    room = max_length + 1 - max(len(c) for c in continuations)
    cut = max(0, len(context) - room)
    return EncodedQuestion(question, context[cut:], continuations, cut)


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def save_encoded(encoded: Sequence[EncodedQuestion], path: Path) -> None:
    """The token ids as a Parquet file, for other processes that ask the same questions."""
    columns = {
        "context_ids": [e.context_ids for e in encoded],
        "continuations": [e.continuations for e in encoded],
        "num_truncated": [e.num_truncated for e in encoded],
    }
    pq.write_table(pa.table(columns), path)


def load_encoded(path: Path, questions: Sequence[Question]) -> list[EncodedQuestion]:
    """What ``save_encoded`` wrote of the same questions in the same order."""
    columns = pq.read_table(path).to_pydict()
    rows = zip(questions, columns["context_ids"], columns["continuations"], columns["num_truncated"], strict=True)
    return [EncodedQuestion(*row) for row in rows]
