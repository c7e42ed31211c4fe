"""Estimates of MMLU beside what an evaluation runs and keeps, and beside what an H200 took."""

from __future__ import annotations

import pytest
import torch

from raylora.config.run import load_config
from raylora.mmlu.prompts import encode_questions
from raylora.mmlu.question_set import QuestionSet
from raylora.model.graphs import fixed_size
from raylora.planning import questions
from raylora.planning.hardware import Hardware
from raylora.planning.questions import QuestionTokens, count_question_tokens, tokens_in_batch
from raylora.planning.shape import LLM_INT8, Shape, shape_of
from tests.helpers.questions import ask, encode, questions_of_two_subjects
from tests.helpers.shapes import h200, shape_of_8b
from tests.helpers.tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Shape:
    return shape_of_8b(tmp_path_factory.mktemp("llama-3-8b"))


@pytest.mark.parametrize("in_batch", [512, 4096])
@pytest.mark.parametrize("num_shots", [0, 3])
def test_tokens_are_those_that_an_evaluation_runs(in_batch, num_shots):
    """A prefix that spares less than half a batch is not shared: its tokens are run with each question."""
    asked = questions_of_two_subjects()
    shots = {s: [q for q in asked if q.subject == s][:num_shots] for s in ("anatomy", "virology")}
    info = ask(make_model(), make_tokenizer(), encode(make_tokenizer(), asked, shots), token_budget=in_batch).info
    found = count_question_tokens(make_tokenizer(), QuestionSet(asked, shots, []), in_batch)
    assert found.total == pytest.approx(info["num_tokens"] - info["num_tokens_spared"], rel=0.05)
    assert len(found.prefixes) == (2 if num_shots and in_batch == 512 else 0)
    assert (info["num_shared_prefixes"] > 0) == bool(found.prefixes)


@pytest.mark.parametrize("num_shots", [0, 3])
def test_tokens_of_cloze_are_those_of_prompts_and_choices(num_shots):
    asked, tokenizer = questions_of_two_subjects(), make_tokenizer()
    shots = {s: [q for q in asked if q.subject == s][:num_shots] for s in ("anatomy", "virology")}
    encoded = encode_questions(tokenizer, asked, shots, "harness", 2048, scoring="cloze")
    info = ask(make_model(), tokenizer, encoded, "cloze", 512).info
    found = count_question_tokens(tokenizer, QuestionSet(asked, shots, []), 512, scoring="cloze")
    assert found.total == pytest.approx(info["num_tokens"] - info["num_tokens_spared"], rel=0.05)


def test_where_nothing_is_shared_each_question_is_whole():
    asked = questions_of_two_subjects()
    shots = {"anatomy": asked[:3]}
    shared, whole = (
        count_question_tokens(make_tokenizer(), QuestionSet(asked, shots, []), 512, may_share=s) for s in (True, False)
    )
    (prefix,) = shared.prefixes
    assert whole.prefixes == ()
    assert whole.total == pytest.approx(shared.total + 5 * prefix), "six questions"


def test_keys_and_values_take_what_a_models_cache_takes(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        layers = model(torch.arange(7)[None], use_cache=True).past_key_values.layers
    kept = sum(tensor.numel() for layer in layers for tensor in (layer.keys, layer.values))
    assert 7 * shape_of(str(tmp_path), load_config(model="x").target_modules).kept_numbers == kept


def test_an_evaluation_behind_prefixes_keeps_their_keys(shape):
    without, behind = (
        questions.question_bytes(shape, h200("liger"), QuestionTokens(1e6, prefixes)) for prefixes in ((), (600, 1500))
    )
    assert behind - without == fixed_size(1500) * 2 * 8 * 128 * 32 * 2, "of the longest, 2 bytes each"
    assert questions.question_bytes(shape, h200("liger"), QuestionTokens()) == 0


@pytest.mark.parametrize(
    ("kernels", "storage", "gigabytes", "tokens"),
    [
        ("liger", "none", 100, 16384),
        ("torch", "none", 1.0, 4096), ("liger", "none", 1.0, 2048), ("liger", LLM_INT8, 1.0, 4096),
        ("liger", "none", 0, 256),
    ],
)  # fmt: skip
def test_captured_passes_leave_half_of_the_memory(shape, kernels, storage, gigabytes, tokens):
    """119 KB a token of an 8B model: of 0.8 GB 6,700 tokens, of half of it 3,300; then the power of two below."""
    assert tokens_in_batch(shape, h200(kernels), storage, int(gigabytes * 1e9)) == tokens


def test_on_a_cpu_a_batch_has_its_512(shape):
    assert tokens_in_batch(shape, Hardware("cpu", 4, 24 * 10**9, 1e11), "none", 10**10) == 512


def test_a_prefix_costs_a_pass_and_each_subject_fills_its_own(shape):
    def seconds(rows: float, *prefixes: int) -> float:
        return questions.question_seconds(shape, h200("liger"), "none", QuestionTokens(rows, prefixes))

    assert seconds(0) == 0
    assert seconds(16384 + 500) == seconds(16384) + seconds(500)
    assert seconds(2 * 9000, 600, 600) == pytest.approx(2 * seconds(9000, 600))
    assert seconds(9000, 600) == seconds(9000) + 32 * 9.5e-3 / 2, "Python's launches bound a pass of 600 tokens"
    assert seconds(57 * 30_000, *[600] * 57) < 6 * 14042 * 125 / 36_000, "not as if each question had its shots"


def test_further_sets_add_their_tokens():
    one, other = QuestionTokens(100.0, (30,), 512), QuestionTokens(50.0, (20, 10), 512)
    both = one.beside(other)
    assert both.total == one.total + other.total
    assert both.prefixes == (30, 20, 10)
