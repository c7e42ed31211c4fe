"""Passes beside those that were timed on an H200: milliseconds, eager and as CUDA graphs."""

from __future__ import annotations

import dataclasses

import pytest

from raylora.planning.gpu_passes import is_graphed, pass_seconds, run_seconds
from raylora.planning.shape import LLM_INT8, Shape
from tests.helpers.shapes import h200, shape_of_8b


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Shape:
    return shape_of_8b(tmp_path_factory.mktemp("llama-3-8b"))


@pytest.mark.parametrize(
    ("kernels", "num_tokens", "graphed", "milliseconds"),
    [
        ("torch", 2048, False, 398), ("torch", 8166, False, 899), ("torch", 2048, True, 227),  # the GPU was busy
        ("triton", 2048, False, 283), ("triton", 8166, False, 629),
        ("triton", 2048, True, 163), ("triton", 8166, True, 619),
        ("liger", 2048, False, 314), ("liger", 8166, False, 521),
        ("liger", 2048, True, 133), ("liger", 8166, True, 515),
    ],
)  # fmt: skip
def test_a_pass_takes_what_was_measured(shape, kernels, num_tokens, graphed, milliseconds):
    seconds = pass_seconds(shape, h200(kernels), "none", num_tokens, backward=True, dropout=True, graphed=graphed)
    assert 1000 * seconds == pytest.approx(milliseconds, rel=0.03)


def test_a_batch_of_questions_takes_what_was_measured(shape):
    assert pass_seconds(shape, h200("liger"), "none", 128 * 128, backward=False) == pytest.approx(0.399, rel=0.1)


@pytest.mark.parametrize(
    ("halved", "below", "least"),
    [("rate", 2.0, 1.5), ("bandwidth", 1.6, 1.2)],
)
def test_another_card_is_slower_by_what_it_has_less(shape, halved, below, least):
    machine = h200("liger")
    slower = dataclasses.replace(machine, **{halved: getattr(machine, halved) / 2})
    here, there = (pass_seconds(shape, m, "8bit", 2048, backward=True, graphed=True) for m in (machine, slower))
    assert least < there / here < below


def test_storage_costs_what_it_moves(shape):
    seconds = {
        storage: pass_seconds(shape, h200("liger"), storage, 2048, backward=True, graphed=True)
        for storage in ("none", "8bit", "4bit", "fp8", LLM_INT8)
    }
    assert seconds["fp8"] < seconds["none"] < seconds["4bit"] < seconds["8bit"] < seconds[LLM_INT8]
    assert seconds["8bit"] - seconds["none"] == pytest.approx(0.009, abs=0.003), "8 GB read and 16 written, twice"


def test_llm_int8_is_no_graph_and_neither_are_torchs_own_operations():
    assert is_graphed(h200("triton"), "8bit")
    assert not is_graphed(h200("liger"), LLM_INT8)
    assert not is_graphed(h200("torch"), "8bit")


def test_work_is_cut_into_passes_and_graphs_are_filled_up(shape):
    def seconds(num_tokens: float, **options: bool) -> float:
        return run_seconds(shape, h200("liger"), "none", num_tokens, 2048, backward=True, **options)

    assert seconds(0) == 0
    assert seconds(1885, graphed=True) == seconds(2048, graphed=True)
    assert seconds(1792, graphed=True) < seconds(2048, graphed=True)
    assert seconds(2050) == seconds(4096) == 2 * seconds(2048), "launches, not tokens, bound an eager pass"
    assert seconds(2048, again=True) == 1.5 * seconds(2048), "the forward pass twice"
