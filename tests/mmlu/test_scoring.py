"""Scores are those of plain loops, whatever the batch, the memory and the way of asking."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from raylora.errors import UserError
from raylora.mmlu.probabilities import choice_probabilities
from raylora.mmlu.prompts import encode_questions
from raylora.mmlu.scoring import answer_together, evaluate, find_token_budget, load_score, save_score
from raylora.mmlu.statistics import compare, summarize
from raylora.model.memory import GPU_TOKEN_BUDGET
from tests.helpers.adapters import attach_random
from tests.helpers.questions import LOGPROBS, ask, encode, questions_of_many_sizes
from tests.helpers.tiny import load, make_loaded, make_model

# Scores


def plain_logprob(model, context, continuation):
    """The reference: one choice at a time, no padding, all logits."""
    ids = torch.tensor([context + continuation])
    with torch.inference_mode():
        logprobs = model(input_ids=ids).logits.float().log_softmax(-1)[0]
    return sum(float(logprobs[len(context) + i - 1, t]) for i, t in enumerate(continuation))


@pytest.mark.parametrize("style", ["harness", "chat"])
@pytest.mark.parametrize("token_budget", [1, 300, 100_000])
def test_log_likelihoods_are_those_of_a_plain_loop_whatever_the_batch(tiny_model, tokenizer, style, token_budget):
    encoded = encode(tokenizer, style=style)
    score = ask(tiny_model, tokenizer, encoded, token_budget=token_budget)
    columns = ["logprob_a", "logprob_b", "logprob_c", "logprob_d"]
    expected = [[plain_logprob(tiny_model, e.context_ids, c) for c in e.continuations] for e in encoded]
    np.testing.assert_allclose(score.questions[columns].to_numpy(), expected, atol=1e-4)
    assert list(score.questions["question_id"]) == [e.question.question_id for e in encoded]
    assert list(score.questions["prediction"]) == ["ABCD"[int(np.argmax(row))] for row in expected]


@pytest.mark.parametrize("scoring", ["letters", "cloze"])
@pytest.mark.parametrize(("packs", "budget"), [(True, 1), (True, 1000), (False, 300)])
def test_questions_may_have_two_to_ten_choices(tokenizer, scoring, packs, budget):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, pad_token_id=0)
    model = make_model() if packs else MambaForCausalLM(config).eval()
    questions = questions_of_many_sizes()
    encoded = encode_questions(tokenizer, questions, {}, "harness", 2048, scoring=scoring)
    score = ask(model, tokenizer, encoded, scoring, budget)
    found = score.questions[[f"logprob_{letter}" for letter in "abcdefghij"]].to_numpy()
    for e, row in zip(encoded, found, strict=True):
        num = len(e.question.choices)
        expected = [plain_logprob(model, e.context_ids, c) for c in e.continuations]
        np.testing.assert_allclose(row[:num], expected, atol=1e-4)
        assert np.isnan(row[num:]).all()
    summary = summarize(score)
    assert sum(summary[f"prediction_share_{letter}"] for letter in "abcdefghij") == pytest.approx(1)
    probabilities = choice_probabilities(score).to_numpy()
    np.testing.assert_allclose(np.nansum(probabilities, axis=1), 1)
    assert (np.isnan(probabilities) == np.isnan(found)).all()
    change = compare(score, score)
    assert change["difference"] == change["balanced_accuracy_change"] == change["correct_probability_change"] == 0


def test_a_set_of_two_choices_has_the_columns_of_four(tiny_model, tokenizer):
    questions = [q for q in questions_of_many_sizes() if len(q.choices) == 2]
    score = ask(tiny_model, tokenizer, encode(tokenizer, questions), "letters")
    assert score.questions[["logprob_c", "logprob_d"]].isna().all(axis=None)
    assert score.questions["logprob_c"].dtype == float
    summary = summarize(score)
    assert summary["prediction_share_a"] + summary["prediction_share_b"] == 1
    assert summary["prediction_share_d"] == 0
    assert "prediction_share_e" not in summary


def test_written_answers_name_one_of_the_questions_own_choices(tiny_model, tokenizer):
    encoded = encode(tokenizer, questions_of_many_sizes(), style="chat")
    score = ask(tiny_model, tokenizer, encoded, "generate")
    for predicted, e in zip(score.questions["prediction"], encoded, strict=True):
        assert predicted == "" or predicted in "ABCDEFGHIJ"[: len(e.question.choices)]
    assert score.questions["logprob_j"].isna().all()


def of_budgets(loaded, encoded) -> list[np.ndarray]:
    """Log-likelihoods (N, 4) of all questions, for batches of 128, 512 and 2048 tokens."""
    scores = [evaluate(loaded, encoded, token_budget=budget) for budget in (128, 512, 2048)]
    return [score.questions[LOGPROBS].to_numpy() for score in scores]


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantized_models_log_likelihoods_do_not_depend_on_the_batch(outlier_model_folder, tokenizer, quantization):
    small, middle, large = of_budgets(load(outlier_model_folder, quantization), encode(tokenizer))
    np.testing.assert_allclose(small, middle, atol=1e-5)
    np.testing.assert_allclose(large, middle, atol=1e-5)


def test_those_of_llm_int8_do(outlier_model_folder, tokenizer):
    small, middle, large = of_budgets(load(outlier_model_folder, "8bit", int8_activations=True), encode(tokenizer))
    assert np.abs(small - middle).max() > 1e-3
    assert np.abs(large - middle).max() > 1e-3


def test_several_adapters_and_the_base_are_asked_in_the_same_passes(tokenizer, encoded):
    """Behind shared prefixes; whatever memory holds."""
    loaded = make_loaded()
    attach_random(loaded, 1, "a", lora_r=4)
    attach_random(loaded, 2, "b", lora_r=8, target_modules=("q_proj", "up_proj"))
    expected = {}
    for name in ("a", "b"):
        loaded.activate(name)
        expected[name] = evaluate(loaded, encoded).questions[LOGPROBS].to_numpy()
    with loaded.base():
        expected[None] = evaluate(loaded, encoded).questions[LOGPROBS].to_numpy()
    for budget in (100, 1000, None):
        found, cut = answer_together(loaded, encoded, ["b", None, "a"], budget)
        assert cut == (budget or 512)
        for name, answers in found.items():
            logprobs = [answers[i].logprobs for i in range(len(encoded))]
            np.testing.assert_allclose(logprobs, expected[name], atol=2e-5)
    spread = np.abs(expected["a"] - expected[None]).max(), np.abs(expected["a"] - expected["b"]).max()
    assert min(spread) > 0.01
    whole = [replace(e, continuations=[[5, 6], [7], [5, 9, 11], [8]]) for e in encoded]
    with pytest.raises(UserError, match="one token"):
        answer_together(loaded, whole, ["a", "b"])


def test_choices_of_several_tokens_are_scored_whole(tiny_model, tokenizer):
    encoded = [replace(e, continuations=[[5, 6], [7], [5, 9, 11], [8]]) for e in encode(tokenizer)]
    score = ask(tiny_model, tokenizer, encoded)
    for e, row in zip(encoded, score.questions.itertuples(), strict=True):
        expected = [plain_logprob(tiny_model, e.context_ids, c) for c in e.continuations]
        assert [row.logprob_a, row.logprob_b, row.logprob_c, row.logprob_d] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("scoring", ["letters", "cloze", "generate"])
def test_running_out_of_memory_halves_the_batch_and_keeps_what_is_done(tiny_model, tokenizer, scoring):
    encoded = encode(tokenizer)
    limit = max(map(len, encoded))

    def refuse_large_batches(module, args, kwargs):
        if kwargs["input_ids"].numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    expected = ask(tiny_model, tokenizer, encoded, scoring, token_budget=4096)
    hook = tiny_model.register_forward_pre_hook(refuse_large_batches, with_kwargs=True)
    try:
        score = ask(tiny_model, tokenizer, encoded, scoring, token_budget=4096)
    finally:
        hook.remove()
    assert score.info["num_oom_backoffs"] >= 2
    assert list(score.questions["prediction"]) == list(expected.questions["prediction"])
    limit = 0
    hook = tiny_model.register_forward_pre_hook(refuse_large_batches, with_kwargs=True)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            ask(tiny_model, tokenizer, encoded, scoring)
    finally:
        hook.remove()


def test_generate_counts_what_it_cannot_read_as_wrong(tiny_model, tokenizer):
    score = ask(tiny_model, tokenizer, encode(tokenizer), "generate")
    unparsed = score.questions["prediction"] == ""
    assert score.info["num_unparsed"] == unparsed.sum()
    assert not score.questions.loc[unparsed, "correct"].any()
    assert set(score.questions.loc[~unparsed, "prediction"]) <= set("ABCD")


def test_generate_writes_what_the_model_writes_alone(tiny_model, tokenizer):
    encoded = encode(tokenizer)
    score = ask(tiny_model, tokenizer, encoded, "generate")
    for e, text in zip(encoded, score.questions["text"], strict=True):
        ids = list(e.context_ids)
        for _ in range(10):
            with torch.inference_mode():
                ids.append(int(tiny_model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[len(e.context_ids) :], skip_special_tokens=True)


def test_scores_come_back_as_they_were(tiny_model, tokenizer, tmp_path):
    score = ask(tiny_model, tokenizer, encode(tokenizer))
    save_score(score, tmp_path / "scores.parquet")
    again = load_score(tmp_path / "scores.parquet")
    pd.testing.assert_frame_equal(again.questions, score.questions)
    assert again.info == score.info
    recomputed = (pd.read_parquet(tmp_path / "scores.parquet").eval("prediction == answer")).mean()
    assert recomputed == score.overall_accuracy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_token_budget_of_a_gpu_fits_its_memory(tokenizer, encoded):
    model = make_model().to("cuda", torch.bfloat16)
    with torch.inference_mode():
        budget = find_token_budget(model, encoded, 0)
    assert 256 <= budget <= GPU_TOKEN_BUDGET
    assert budget & (budget - 1) == 0
    score = ask(model, tokenizer, encoded)
    assert score.info["token_budget"] == budget
