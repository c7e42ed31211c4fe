"""The forms in which sets of multiple-choice questions are published, each known by the fields of its records.

A form here is that of the original files and that of the Parquet files on the Hugging Face hub, which differ in how
choices are nested. ``docs/mmlu.md`` says where each set comes from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from raylora.errors import UserError
from raylora.mmlu.question_files import Fields


class RawQuestion(NamedTuple):
    """A question as its file has it. Nothing is checked yet: fields may be missing (None) and of any type."""

    text: Any
    choices: Any
    answer: Any
    """A label, or the text, of the right choice; None where the file keeps the answer to itself."""
    labels: Sequence[Any] | None = None
    """What the file calls its choices; None: letters from A, or numbers from 0."""
    subject: Any = None
    own_id: str = ""


class Form(NamedTuple):
    name: str
    fields: tuple[str, ...]
    """A record with all of these is of this form; ``question.stem`` is a field within a field."""
    read: Callable[[Fields], RawQuestion]


def read_form(place: str, fields: Fields) -> RawQuestion:
    """The question in a record of any known form.

    Raises:
        UserError: the record's fields are those of no form.
    """
    for form in FORMS:
        if all(_has(fields, name) for name in form.fields):
            question = form.read(fields)
            answer = None if _is_withheld(question.answer) else question.answer
            return question._replace(answer=answer, own_id=_own_id(fields), subject=_subject(fields))
    found = ", ".join(map(repr, list(fields)[:12])) or "none"
    raise UserError(f"{place}: a question of no known form; its fields: {found}; expected question, choices, answer")


def _has(fields: Any, name: str) -> bool:
    first, _, rest = name.partition(".")
    if isinstance(fields, list):
        fields = fields[0] if fields else None
    return isinstance(fields, dict) and first in fields and (not rest or _has(fields[first], rest))


def _is_withheld(answer: Any) -> bool:
    """Whether a record has no answer: test splits have an empty one, or the label -1."""
    return (
        answer is None
        or (isinstance(answer, str) and answer.strip() in {"", "-1"})
        or (isinstance(answer, int | float) and (answer == -1 or answer != answer))
    )


def _own_id(fields: Fields) -> str:
    names = ("question_id", "id", "ind", "idx", "qID", "example_id")
    return next((str(fields[n]) for n in names if isinstance(fields.get(n), str | int)), "")


def _subject(fields: Fields) -> Any:
    """None where a record has none, or a blank one."""
    subject = fields.get("subject", fields.get("category"))
    return None if isinstance(subject, str) and not subject.strip() else subject


# The forms


def _generic(fields: Fields) -> RawQuestion:
    """MMLU's own, and RACE's: a list of choices; a passage, if there is one, stands before the question."""
    choices, labels = fields.get("choices", fields.get("options")), None
    if isinstance(choices, dict):  # {"A": ..., "B": ...}
        labels, choices = list(choices), list(choices.values())
    return RawQuestion(_behind_passage(fields, fields.get("question")), choices, fields.get("answer"), labels)


def _mmlu_pro(fields: Fields) -> RawQuestion:
    """Older files have ten options each, filled up with ``N/A``."""
    options, index = fields["options"], fields["answer_index"]
    if isinstance(options, list) and type(index) is int and 0 <= index < len(options):
        kept = [i for i, option in enumerate(options) if option != "N/A" or i == index]
        options, index = [options[i] for i in kept], kept.index(index)
    return RawQuestion(fields["question"], options, index)


def _labelled(text: Any, choices: Any, answer: Any) -> RawQuestion:
    """ARC, CommonsenseQA, OpenBookQA: choices have labels, A to E or 1 to 5."""
    if isinstance(choices, list):  # the original files: a list of objects; on the hub: an object of lists
        choices = {name: [c.get(name) if isinstance(c, dict) else None for c in choices] for name in ("text", "label")}
    if not isinstance(choices, dict) or not isinstance(choices.get("label"), list):
        return RawQuestion(text, None, answer)
    return RawQuestion(text, choices.get("text"), answer, choices["label"])


def _nested(fields: Fields) -> RawQuestion:
    return _labelled(fields["question"]["stem"], fields["question"]["choices"], fields.get("answerKey"))


def _hellaswag(fields: Fields) -> RawQuestion:
    """The context is ``ctx_a``, and ``ctx_b`` where a sentence has begun; both are cleaned as the harness does it.

    lm-evaluation-harness 0.4.13, ``lm_eval/tasks/hellaswag/utils.py``.
    """
    label, first, second, endings = (fields[name] for name in ("activity_label", "ctx_a", "ctx_b", "endings"))
    if not all(isinstance(text, str) for text in (label, first, second)) or not isinstance(endings, list):
        return RawQuestion(None, endings, fields.get("label"))
    text = _without_wikihow(f"{label}: {first} {second.capitalize()}")
    cleaned = [_without_wikihow(ending) if isinstance(ending, str) else ending for ending in endings]
    return RawQuestion(text, cleaned, fields.get("label"))


def _without_wikihow(text: str) -> str:
    """Text without WikiHow's marks: ``[title]`` ends a sentence, ``[step]`` and others go."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _boolq(fields: Fields) -> RawQuestion:
    text, answer = fields["question"], fields.get("answer", fields.get("label"))
    if isinstance(text, str) and text.strip():
        text = f"{text.strip().removesuffix('?')}?"
    answer = int(answer) if isinstance(answer, bool) else answer
    return RawQuestion(_behind_passage(fields, text), ["no", "yes"], answer)


def _behind_passage(fields: Fields, text: Any) -> Any:
    passage = next((fields[name] for name in ("passage", "article", "context") if fields.get(name)), None)
    return f"{passage}\n{text}" if isinstance(passage, str) and isinstance(text, str) and text.strip() else text


FORMS = (
    Form("MMLU-Pro", ("question", "options", "answer_index"), _mmlu_pro),
    Form("ARC, CommonsenseQA, OpenBookQA: original files", ("question.stem", "question.choices"), _nested),
    Form(
        "ARC, CommonsenseQA: hub",
        ("question", "choices.text", "choices.label"),
        lambda f: _labelled(f["question"], f["choices"], f.get("answerKey")),
    ),
    Form(
        "OpenBookQA: hub",
        ("question_stem", "choices.text", "choices.label"),
        lambda f: _labelled(f["question_stem"], f["choices"], f.get("answerKey")),
    ),
    Form("HellaSwag", ("activity_label", "ctx_a", "ctx_b", "endings"), _hellaswag),
    Form("MMLU", ("choices",), _generic),
    Form("RACE", ("question", "options"), _generic),
    Form("BoolQ", ("question", "passage"), _boolq),
    Form("PIQA", ("goal", "sol1", "sol2"), lambda f: RawQuestion(f["goal"], [f["sol1"], f["sol2"]], f.get("label"))),
    Form(
        "WinoGrande",
        ("sentence", "option1", "option2"),
        lambda f: RawQuestion(f["sentence"], [f["option1"], f["option2"]], f.get("answer"), ["1", "2"]),
    ),
)
"""The first that fits is taken."""
