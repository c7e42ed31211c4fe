"""MMLU: questions, prompts, scores, statistics. Agrees with lm-evaluation-harness 0.4.13 question by question."""

from raylora.mmlu.answers import parse_answer
from raylora.mmlu.examine import (
    Examiner,
    QuestionSet,
    check_prompt_style,
    load_question_set,
    model_key,
    questions_key,
    score_key,
)
from raylora.mmlu.prompts import EncodedQuestion, build_shots, encode_questions, load_encoded, save_encoded
from raylora.mmlu.questions import (
    SHORT_GROUPS,
    SUBJECT_GROUPS,
    load_dev_questions,
    load_questions,
    questions_hash,
    select_questions,
)
from raylora.mmlu.scoring import evaluate, load_score, save_score
from raylora.mmlu.statistics import compare, compare_subjects, summarize

__all__ = [
    "SHORT_GROUPS",
    "SUBJECT_GROUPS",
    "EncodedQuestion",
    "Examiner",
    "QuestionSet",
    "build_shots",
    "check_prompt_style",
    "compare",
    "compare_subjects",
    "encode_questions",
    "evaluate",
    "load_dev_questions",
    "load_encoded",
    "load_question_set",
    "load_questions",
    "load_score",
    "model_key",
    "parse_answer",
    "questions_hash",
    "questions_key",
    "save_encoded",
    "save_score",
    "score_key",
    "select_questions",
    "summarize",
]
