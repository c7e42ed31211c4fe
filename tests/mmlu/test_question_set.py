"""The questions of a run: the demo's, and those on an object store."""

from __future__ import annotations

from collections import Counter

import pytest

from raylora.config.run import EvaluationConfig
from raylora.config.sources import load_settings
from raylora.mmlu.question_set import DEMO_QUESTIONS, load_question_set
from raylora.mmlu.questions import SUBJECT_GROUPS, load_questions
from tests.helpers.objects import BUCKET


@pytest.mark.parametrize("form", ["json", "parquet", "folder"])
def test_questions_are_read_from_s3(objects, form, tmp_path):
    import json

    import pandas as pd

    from raylora.mmlu.question_set import DEMO_QUESTIONS

    raw = json.loads(DEMO_QUESTIONS.read_text())[:8]
    name = {"json": "q.json", "parquet": "q.parquet", "folder": "q/test/part.parquet"}[form]
    data = json.dumps(raw).encode() if form == "json" else pd.DataFrame(raw).to_parquet()
    objects.put(f"mmlu/{name}", data)
    config = load_settings(EvaluationConfig, None, "test", mmlu=f"s3://{BUCKET}/mmlu/{name.split('/')[0]}")
    assert [q.question for q in load_question_set(config).questions] == [q["question"] for q in raw]


def test_packaged_questions_are_whole():
    folder = DEMO_QUESTIONS.parent
    questions = load_questions(folder / "questions.json")
    counts = Counter(q.subject for q in questions)
    assert set(counts) - set(SUBJECT_GROUPS) == {"geography_of_orvenia", "life_in_orvenia"}
    assert min(counts.values()) >= 4
    dev = load_questions(folder / "dev_questions.json")
    assert Counter(q.subject for q in dev) == dict.fromkeys(counts, 5)
    assert not {q.question for q in dev} & {q.question for q in questions}


def test_right_letters_of_packaged_questions_are_even_on_the_country_and_elsewhere():
    """Else balanced accuracy, the mean over right letters, would not be what the demo's accuracy is."""
    letters = Counter(("orvenia" in q.subject, q.answer) for q in load_questions(DEMO_QUESTIONS))
    assert letters == {(is_country, k): 8 if is_country else 10 for is_country in (True, False) for k in range(4)}
