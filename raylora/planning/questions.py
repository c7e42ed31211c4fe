"""What MMLU has the model do: tokens, batches, shared prefixes, and on a GPU their time and memory."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raylora.config.options import Scoring
from raylora.data.rendered import common_prefix_length
from raylora.mmlu.prompts import cloze_prompt, harness_prompt
from raylora.mmlu.question_set import QuestionSet
from raylora.mmlu.scoring import MIN_TOKENS_SPARED
from raylora.model.graphs import fixed_size
from raylora.model.memory import CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET, tokens_that_fit
from raylora.planning.gpu_passes import is_graphed, run_seconds
from raylora.planning.hardware import Hardware
from raylora.planning.shape import Shape
from raylora.records import Question

SAMPLED_QUESTIONS = 64
"""About how many questions are tokenized to estimate the tokens of all."""


@dataclass(frozen=True)
class QuestionTokens:
    """Tokens of one evaluation."""

    rows: float = 0.0
    """Of all questions, without the prefixes that several share."""
    prefixes: tuple[int, ...] = ()
    """Of each shared prefix, which is run once."""
    in_batch: int = GPU_TOKEN_BUDGET
    """Most tokens in a batch, prefixes left out."""

    @property
    def total(self) -> float:
        return self.rows + sum(self.prefixes)

    def beside(self, other: QuestionTokens) -> QuestionTokens:
        """Both evaluations, one after the other."""
        return QuestionTokens(self.rows + other.rows, self.prefixes + other.prefixes, other.in_batch)


def count_question_tokens(
    tokenizer: Any,
    asked: QuestionSet,
    in_batch: int = GPU_TOKEN_BUDGET,
    may_share: bool = True,
    scoring: Scoring = "letters",
) -> QuestionTokens:
    """Tokens of all prompts, estimated from a sample of them, and from the first and the last one of each subject.

    Args:
        in_batch: most tokens in a batch: a prefix must spare half of them.
        scoring: what the prompts are of.
        may_share: whether what a subject's prompts begin with is run once at all.
    """

    def tokenize(texts: list[str]) -> list[list[int]]:
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"])

    def encode(questions: Sequence[Question]) -> list[list[int]]:
        prompt = cloze_prompt if scoring == "cloze" else harness_prompt
        return tokenize([prompt(q, asked.shots.get(q.subject, [])) for q in questions])

    by_subject: dict[str, list[Question]] = defaultdict(list)
    for question in asked.questions:
        by_subject[question.subject].append(question)
    prefixes: dict[str, int] = {}
    for subject, questions in by_subject.items() if may_share else ():
        length = common_prefix_length(*encode([questions[0], questions[-1]]))
        if length * (len(questions) - 1) >= max(in_batch / 2, MIN_TOKENS_SPARED):
            prefixes[subject] = length
    sample = asked.questions[:: max(1, len(asked.questions) // SAMPLED_QUESTIONS)]
    lengths = [len(ids) - prefixes.get(q.subject, 0) for q, ids in zip(sample, encode(sample), strict=True)]
    if scoring == "cloze":  # the choices run behind the prompt, all but their last tokens
        texts = tokenize([f" {choice}" for q in sample for choice in q.choices])
        lengths.append(sum(len(ids) - 1 for ids in texts))
    return QuestionTokens(sum(lengths) / len(sample) * len(asked.questions), tuple(prefixes.values()), in_batch)


def forward_bytes(shape: Shape, num_tokens: int, machine: Hardware) -> int:
    """Bytes of the activations of a forward pass: the MLP's three widest tensors, and four of hidden states.

    Scoring an 8B model in bfloat16 took 18.0 GB on an H200, 16.1 of them the weights.
    """
    widest = shape.largest_matrix // shape.hidden_size
    return num_tokens * machine.dtype_bytes * (3 * widest + 4 * shape.hidden_size)


def tokens_in_batch(shape: Shape, machine: Hardware, storage: str, free_bytes: int) -> int:
    """Tokens of a batch of questions, as ``find_token_budget`` of ``mmlu/scoring.py`` finds them on the machine itself.

    Args:
        storage: see ``pass_seconds``.
        free_bytes: of the GPU's memory, beside the base.
    """
    if not machine.on_gpu:
        return CPU_TOKEN_BUDGET
    # A captured pass keeps its memory, and one of another size is run beside it.
    fitting = tokens_that_fit(forward_bytes(shape, 1, machine), free_bytes, captured=is_graphed(machine, storage))
    return 1 << (fitting.bit_length() - 1)


def question_seconds(shape: Shape, machine: Hardware, storage: str, tokens: QuestionTokens) -> float:
    """Seconds of one evaluation on a GPU.

    The questions behind a prefix fill passes of their own: as many tokens are assumed behind each. The prefix is a
    pass of its own, which is not captured.
    """
    run = functools.partial(run_seconds, shape, machine, storage, tokens_a_pass=tokens.in_batch, backward=False)
    graphed, num_parts = is_graphed(machine, storage), max(1, len(tokens.prefixes))
    num_full, rest = divmod(tokens.rows / num_parts, tokens.in_batch)
    of_part = num_full * run(tokens.in_batch, graphed=graphed) + run(rest, graphed=graphed)
    return num_parts * of_part + sum(map(run, tokens.prefixes))


def question_bytes(shape: Shape, machine: Hardware, tokens: QuestionTokens) -> int:
    """Bytes of one evaluation on a GPU: the activations of a batch, and a prefix's keys and values in each layer."""
    if not tokens.rows:
        return 0
    kept = fixed_size(max(tokens.prefixes)) if tokens.prefixes else 0
    return forward_bytes(shape, tokens.in_batch, machine) + kept * shape.kept_numbers * machine.dtype_bytes
