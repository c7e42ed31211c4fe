"""Prompts as token ids: lm-evaluation-harness 0.4.13's few-shot prompt, or the model's own chat template.

text    The following are ... Answer:| A
ids     c0 c1 c2 ...              cn | a
                                  ^ the logits at this position are those of the letters
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from raylora.config.options import Scoring
from raylora.data.chat import render_chat
from raylora.data.rendered import common_prefix_length
from raylora.data.rendering import special_tokens_of
from raylora.errors import UserError
from raylora.mmlu.letters import closing_mark, marks_thought, open_thought
from raylora.mmlu.questions import LETTERS, NO_SUBJECT
from raylora.records import Message, Question
from raylora.storage.digests import open_parquet, write_parquet

PromptStyle = Literal["harness", "chat"]
ENCODED_AT_ONCE = 256
"""Questions tokenized in one call."""
Thinking = Literal["", "off", "closed", "on"]
"""What becomes of a model's thinking before it answers. off: its chat template is told not to begin it, or begins none.
closed: the template begins a thinking part, and the prompt ends it at once. on: it has room to think, and to answer
behind that. Empty: the prompt is no chat, or the template knows of no thinking."""
THINKING_TOKENS = 1024
"""Room for thoughts and the answer behind them, in tokens."""
CHAT_INSTRUCTION = "Answer with the letter of the right option only"


@dataclass(frozen=True)
class EncodedQuestion:
    """A question's prompt and its continuations, as token ids."""

    question: Question
    context_ids: list[int]
    continuations: list[list[int]]
    """One for each choice: " A" and so on, or its text, behind the same context."""
    num_truncated: int
    """Tokens cut from the front of a prompt that is longer than the model's context window."""

    @property
    def single_token(self) -> bool:
        """Whether the logits at the prompt's last position score all choices: each is one token, and they differ."""
        differ = len({tuple(c) for c in self.continuations}) == len(self.continuations)
        return differ and all(len(c) == 1 for c in self.continuations)

    @property
    def num_choice_tokens(self) -> int:
        """Tokens of the choices that run behind the prompt: all but the last of each, which is only predicted."""
        return sum(len(continuation) - 1 for continuation in self.continuations)

    def __len__(self) -> int:
        return len(self.context_ids)


def build_shots(dev: Iterable[Question], subjects: Iterable[str], num_fewshot: int) -> dict[str, list[Question]]:
    """The few-shot examples of each subject: its first ``num_fewshot`` solved questions, in their order.

    Args:
        dev: solved questions of any subjects.

    Raises:
        UserError: a subject has fewer.
    """
    by_subject: dict[str, list[Question]] = {subject: [] for subject in subjects}
    for question in dev:
        if question.subject in by_subject:
            by_subject[question.subject].append(question)
    too_few = [f"{subject} has {len(q)}" for subject, q in by_subject.items() if len(q) < num_fewshot]
    if too_few:
        more = f" and {len(too_few) - 5} more subjects" if len(too_few) > 5 else ""
        raise UserError(f"--num-fewshot {num_fewshot}: too few dev questions: {', '.join(too_few[:5])}{more}")
    return {subject: group[:num_fewshot] for subject, group in by_subject.items()}


def encode_questions(
    tokenizer: Any,
    questions: Sequence[Question],
    shots: dict[str, list[Question]],
    prompt_style: PromptStyle,
    max_length: int,
    thinking: Thinking = "",
    scoring: Scoring = "letters",
) -> list[EncodedQuestion]:
    """Encode the prompt of each question, in the order of ``questions``.

    Args:
        shots: the few-shot examples of each subject; a subject without an entry is asked 0-shot.
        max_length: the model's context window in tokens; a longer prompt is cut at its front.
        thinking: from ``thinking_of``.
        scoring: of ``cloze`` prompts do not show the choices, and their texts are the continuations.

    Raises:
        UserError: the style is ``chat``, and the tokenizer has no chat template.
    """
    if prompt_style == "chat" and not tokenizer.chat_template:
        raise UserError("--prompt-style chat: the tokenizer has no chat template; use --prompt-style harness")
    if thinking == "on":
        max_length = max(max_length - THINKING_TOKENS, max_length // 2)
    encoded: list[EncodedQuestion] = []
    for start in range(0, len(questions), ENCODED_AT_ONCE):
        batch = questions[start : start + ENCODED_AT_ONCE]
        asked = [_as_asked(tokenizer, [q, *shots.get(q.subject, [])]) for q in batch]
        answers = [list(q.choices) if scoring == "cloze" else list(LETTERS[: len(q.choices)]) for (q, *_), _ in asked]
        if prompt_style == "chat":
            contexts = [chat_prompt(tokenizer, q, shown, thinking, scoring) for (q, *shown), _ in asked]
            with_bos = not _begins_with_bos(tokenizer, contexts[0])  # not twice
        else:
            prompt = cloze_prompt if scoring == "cloze" else harness_prompt
            contexts = [prompt(q, shown) for (q, *shown), _ in asked]
            with_bos = True
            answers = [[f" {answer}" for answer in of_question] for of_question in answers]
        pairs = _tokenize_pairs(tokenizer, contexts, answers, with_bos, [written for _, written in asked])
        encoded += [_split(q, *pair, max_length) for q, pair in zip(batch, pairs, strict=True)]
    return encoded


def _as_asked(tokenizer: Any, group: Sequence[Question]) -> tuple[list[Question], bool]:
    """A question and its shots, and whether special tokens are written in any: aliases stand for them there."""
    special = special_tokens_of(tokenizer)
    if not any(special.is_in(q.subject, q.question, *q.choices) for q in group):
        return list(group), False
    return [
        replace(
            q,
            subject=special.hidden(q.subject),
            question=special.hidden(q.question),
            choices=tuple(map(special.hidden, q.choices)),
        )
        for q in group
    ], True


def harness_prompt(question: Question, shots: Sequence[Question]) -> str:
    """The subject's description, the solved questions, and the question up to ``Answer:``."""
    text = f"The following are multiple choice questions (with answers){_about(question)}.\n\n"
    for shot in shots:
        text += f"{_block(shot)} {LETTERS[shot.answer]}\n\n"
    return text + _block(question)


def cloze_prompt(question: Question, shots: Sequence[Question]) -> str:
    """The prompt of lm-evaluation-harness' ``mmlu_continuation``, up to ``Answer:``: the choices are not shown."""
    text = f"The following are questions (with answers){_about(question)}.\n\n"
    for shot in shots:
        text += f"Question: {shot.question.strip()}\nAnswer: {shot.choices[shot.answer]}\n\n"
    return f"{text}Question: {question.question.strip()}\nAnswer:"


def _about(question: Question) -> str:
    return "" if question.subject == NO_SUBJECT else f" about {question.subject.replace('_', ' ')}"


def _block(question: Question) -> str:
    options = "".join(f"\n{letter}. {c}" for letter, c in zip(LETTERS, question.choices, strict=False))
    return f"{question.question.strip()}{options}\nAnswer:"


def thinking_of(tokenizer: Any, prompt_style: PromptStyle, scoring: Scoring) -> Thinking:
    """How a model's thinking is dealt with. A chat template that can be told so does not begin any.

    Where it begins a thinking part all the same, no letter can come next: log-likelihoods are asked for behind the end
    of an empty thinking part, and a written answer gets room for the thoughts before it.
    """
    if prompt_style != "chat" or not tokenizer.chat_template:
        return ""
    question = Question("", "?", ("1", "2", "3", "4"), 0, "")
    prompt = chat_prompt(tokenizer, question, [])
    if open_thought(prompt):
        return "on" if scoring == "generate" else "closed"
    template = str(tokenizer.chat_template)
    behind_question = prompt.rpartition(CHAT_INSTRUCTION)[2]
    if "enable_thinking" in template or marks_thought(behind_question):
        return "off"
    # The template only knows how thoughts look in earlier turns: the model may begin them itself.
    return "on" if scoring == "generate" and marks_thought(template) else ""


def chat_prompt(
    tokenizer: Any,
    question: Question,
    shots: Sequence[Question],
    thinking: Thinking = "",
    scoring: Scoring = "letters",
) -> str:
    """The conversation up to the assistant's answer: a turn pair for each solved question, then the question's turn."""

    def ask(asked: Question) -> Message:
        return Message("user", asked.question.strip() if scoring == "cloze" else _chat_question(asked))

    messages = []
    for shot in shots:
        answer = shot.choices[shot.answer] if scoring == "cloze" else LETTERS[shot.answer]
        messages += [ask(shot), Message("assistant", answer)]
    messages.append(ask(question))
    knows_thinking = "enable_thinking" in str(tokenizer.chat_template)
    variables: dict[str, Any] = {"enable_thinking": False} if knows_thinking else {}
    prompt = render_chat(tokenizer, messages, add_generation_prompt=True, **variables)
    if thinking == "closed" and (opening := open_thought(prompt)):
        prompt = f"{prompt.rstrip()}\n\n{closing_mark(opening)}\n\n"  # as Qwen3's template writes it
    return prompt


def _chat_question(question: Question) -> str:
    options = "\n".join(f"{letter}. {c}" for letter, c in zip(LETTERS, question.choices, strict=False))
    num = len(question.choices)
    letters = f"{', '.join(LETTERS[: num - 1])} or {LETTERS[num - 1]}"
    return f"{question.question.strip()}\n{options}\n\n{CHAT_INSTRUCTION}: {letters}."


def _tokenize_pairs(
    tokenizer: Any,
    contexts: Sequence[str],
    continuations: Sequence[Sequence[str]],
    add_special_tokens: bool,
    has_special_text: Sequence[bool],
) -> list[tuple[int, list[list[int]]]]:
    """For each context the number of tokens it has alone, and the ids of it with each of its continuations behind it.

    As in lm-evaluation-harness, both are tokenized as one string, which is cut at the number of tokens that the context
    has alone. White space at the context's end goes to the continuation, since tokenizers join it with the next word.

    Args:
        has_special_text: of each context, whether aliases stand in it for special tokens.
    """
    alone = [context.rstrip() for context in contexts]
    whole = [context + c for context, own in zip(contexts, continuations, strict=True) for c in own]
    of_whole = [written for written, own in zip(has_special_text, continuations, strict=True) for _ in own]
    ids = _token_ids(tokenizer, alone + whole, add_special_tokens, [*has_special_text, *of_whole])
    ids_of_whole = iter(ids[len(alone) :])
    return [
        (len(of_context), list(itertools.islice(ids_of_whole, len(own))))
        for of_context, own in zip(ids, continuations, strict=False)
    ]


def _token_ids(
    tokenizer: Any, texts: list[str], add_special_tokens: bool, has_special_text: Sequence[bool]
) -> list[list[int]]:
    """The ids of ``tokenizer(texts)``, computed by all cores where the tokenizer is a fast one.

    Besides the ids, the call makes offsets, masks and dictionaries of each text, one text after another, which takes
    longer than 16 cores take for the ids. So the texts go to the backend itself, unless the class has its own call.
    """
    if any(has_special_text):
        special = special_tokens_of(tokenizer)
        written = [special.swapped(text) for text, has in zip(texts, has_special_text, strict=True) if has]
        others = [text for text, has in zip(texts, has_special_text, strict=True) if not has]
        of_written = iter(special.tokenize(written, add_special_tokens)[0])
        of_others = iter(_token_ids(tokenizer, others, add_special_tokens, [False] * len(others)) if others else [])
        return [next(of_written if has else of_others) for has in has_special_text]
    with _on_all_cores():
        if not _only_calls_backend(tokenizer):
            return list(tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"])
        tokenizer(texts[0], add_special_tokens=add_special_tokens)  # sets the backend up: no truncation, no padding
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encodings]


def _only_calls_backend(tokenizer: Any) -> bool:
    """Whether a call of the tokenizer does nothing to a text but hand it to the ``tokenizers`` library."""
    from transformers import PreTrainedTokenizerFast

    own, inherited = type(tokenizer), PreTrainedTokenizerFast
    return isinstance(tokenizer, inherited) and all(
        hasattr(inherited, name) and getattr(own, name) is getattr(inherited, name)
        for name in ("__call__", "_encode_plus")  # the second is private: without it the tokenizer's call is used
    )


@contextlib.contextmanager
def _on_all_cores() -> Iterator[None]:
    """Inside, fast tokenizers have a thread for each core. Not outside: in a forked process they would wait forever."""
    before = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before


def _begins_with_bos(tokenizer: Any, context: str) -> bool:
    """Whether the chat template has written the beginning-of-sequence token (in tokenizers without one, EOS) itself."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return first is not None and context.startswith(tokenizer.decode(first))


def _split(question: Question, length: int, ids_of_choices: list[list[int]], max_length: int) -> EncodedQuestion:
    """The question with one context for all choices, cut at its front to fit the window.

    Args:
        length: tokens of the context alone.
        ids_of_choices: of the context with each choice behind it.

    Contexts of the choices differ where a tokenizer joins a context's last characters with the letter: from the first
    such token on, ids belong to the continuations.
    """
    context = ids_of_choices[0][:length]
    if any(ids[:length] != context for ids in ids_of_choices):  # token by token only then
        context = context[: min(common_prefix_length(context, ids) for ids in ids_of_choices)]
    continuations = [ids[len(context) :] for ids in ids_of_choices]
    # + 1: a continuation's last token is scored, but not fed in, so it takes no place in the window.
    max_context = max_length + 1 - max(len(c) for c in continuations)
    num_cut = max(0, len(context) - max_context)
    return EncodedQuestion(question, context[num_cut:], continuations, num_cut)


def save_encoded(encoded: Sequence[EncodedQuestion], path: Path) -> None:
    """Write the token ids as a Parquet file, for other processes that ask the same questions."""
    columns = {
        "context_ids": [e.context_ids for e in encoded],
        "continuations": [e.continuations for e in encoded],
        "num_truncated": [e.num_truncated for e in encoded],
    }
    write_parquet(pa.table(columns), path)


def load_encoded(path: Path, questions: Sequence[Question]) -> list[EncodedQuestion]:
    """Read what ``save_encoded`` wrote.

    Args:
        questions: those that were encoded, in the same order.

    Raises:
        OSError, ValueError, KeyError: the file is damaged, or is of another number of questions.
    """
    columns = pq.read_table(open_parquet(path)).to_pydict()
    rows = zip(questions, columns["context_ids"], columns["continuations"], columns["num_truncated"], strict=True)
    return [EncodedQuestion(*row) for row in rows]
