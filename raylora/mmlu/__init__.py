"""MMLU: questions, prompts, scores, statistics. Agrees with lm-evaluation-harness 0.4.13 question by question."""

from raylora.mmlu.prompts import EncodedQuestion, build_shots, encode_questions
from raylora.mmlu.questions import SUBJECT_GROUPS, find_dev_file, load_questions, questions_hash, select_questions
from raylora.mmlu.scoring import evaluate, load_score, parse_answer, save_score
from raylora.mmlu.statistics import compare, summarize

__all__ = [
    "SUBJECT_GROUPS",
    "EncodedQuestion",
    "build_shots",
    "compare",
    "encode_questions",
    "evaluate",
    "find_dev_file",
    "load_questions",
    "load_score",
    "parse_answer",
    "questions_hash",
    "save_score",
    "select_questions",
    "summarize",
]
