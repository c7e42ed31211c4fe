"""Encoding and training: what is supervised, that a LoRA learns, and what happens when memory runs out."""

from __future__ import annotations

import math

import pytest
import torch

from raylora.config import Method
from raylora.data.encoding import IGNORE_INDEX, encode_example, labels_of
from raylora.data.minibatch import pad_left
from raylora.errors import TrainingDivergedError, UserError
from raylora.mmlu.prompts import encode_questions
from raylora.mmlu.scoring import evaluate
from raylora.mmlu.statistics import compare
from raylora.model.adapters import LoadedModel
from raylora.model.forward import token_losses
from raylora.model.memory import batches_by_budget
from raylora.records import Example, Message, Question
from raylora.training.loop import learning_rate_factor, train_adapter
from raylora.training.losses import example_losses
from tests.helpers.tiny import make_model

METHOD = Method(lora_r=8, lora_dropout=0, batch_size=4, gradient_accumulation=2, learning_rate=1e-2, max_grad_norm=1.0)


def make_examples(num: int = 12) -> list[Example]:
    return [
        Example((Message("system", "Be brief."), Message("user", f"What of {i}? " + "so " * i)), f"It is {i * i}.", "q")
        for i in range(num)
    ]


@pytest.fixture
def loaded(tokenizer):
    return LoadedModel(make_model().requires_grad_(False), tokenizer, "tiny", "none")


@pytest.fixture
def encoded(tokenizer):
    return [encode_example(tokenizer, e, 256) for e in make_examples()]


# Encoding


def text_of(tokenizer, encoded, mask):
    return tokenizer.decode([t for t, m in zip(encoded.input_ids, mask, strict=True) if m])


@pytest.mark.parametrize("answer", ["Paris", "两个词", "  spaced  ", "a\nb", "🎉 é", "What of 3?"])
def test_supervised_tokens_are_exactly_the_answer_and_its_end(tokenizer, answer):
    example = Example((Message("user", "What of 3?"),), answer, "What of 3?")
    encoded = encode_example(tokenizer, example, 256)
    assert text_of(tokenizer, encoded, encoded.is_answer_text) == answer
    assert text_of(tokenizer, encoded, encoded.is_answer) == answer + "<|im_end|>"
    assert text_of(tokenizer, encoded, encoded.is_question) == "What of 3?"
    labels = labels_of(encoded, "answer")
    assert [t for t in labels if t != IGNORE_INDEX] == [
        t for t, m in zip(encoded.input_ids, encoded.is_answer, strict=True) if m
    ]
    assert sum(t == IGNORE_INDEX for t in labels_of(encoded, "all")) == 1


def test_without_a_template_a_plain_form_is_used(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    encoded = encode_example(tokenizer, make_examples(3)[2], 256)
    assert text_of(tokenizer, encoded, encoded.is_answer) == "It is 4.<|im_end|>"
    assert "User: What of 2?" in tokenizer.decode(encoded.input_ids)


def test_truncation_keeps_the_answer(tokenizer):
    long_question = Example((Message("user", "word " * 500),), "yes", "q")
    encoded = encode_example(tokenizer, long_question, 64)
    assert len(encoded) == 64
    assert text_of(tokenizer, encoded, encoded.is_answer_text) == "yes"
    long_answer = Example((Message("user", "what?"),), "word " * 500, "q")
    encoded = encode_example(tokenizer, long_answer, 64)
    assert len(encoded) == 64
    assert not encoded.is_answer[0]


def test_batches_keep_to_the_budget_longest_first():
    lengths = [3, 9, 1, 4, 4, 20]
    batches = list(batches_by_budget(range(6), lambda i: lengths[i], 12))
    assert sorted(i for b in batches for i in b) == list(range(6))
    assert batches[0] == [5]
    assert all(len(b) * max(lengths[i] for i in b) <= 12 for b in batches[1:])


def test_losses_of_a_padded_batch_are_those_of_each_row_alone(loaded, encoded):
    rows, labels = [e.input_ids for e in encoded[:5]], [labels_of(e, "all") for e in encoded[:5]]
    with torch.inference_mode():
        losses = token_losses(loaded, pad_left(rows, 0, "cpu", labels)).split([len(row) - 1 for row in rows])
        for row, ids in enumerate(rows):
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, :-1]
            alone = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
            assert float(losses[row].sum()) == pytest.approx(float(alone), rel=1e-5)


# Training


def train(loaded, encoded, method=METHOD, seed=0, **options):
    parameters = loaded.attach(method, seed)
    return train_adapter(loaded, parameters, encoded, method, seed, **options), parameters


def test_a_lora_learns_facts_that_its_base_does_not_know(tokenizer):
    """A tiny model trained on facts answers multiple-choice questions about them clearly better than its base."""
    options = ("red", "blue", "green", "white")
    # Each fact is a colour of a letter, said over and over: what random attention can tell apart.
    questions = [
        Question("anatomy", f"{chr(97 + i)} " * 40, options, (i * 7 + i // 3) % 4, f"anatomy/{i}") for i in range(12)
    ]
    prompts = encode_questions(tokenizer, questions, {}, "chat", 512)
    asked = [tokenizer.decode(p.context_ids).split("user\n")[1].split("<|im_end|>")[0] for p in prompts]
    examples = [
        Example((Message("user", text),), "ABCD"[q.answer], text) for text, q in zip(asked, questions, strict=True)
    ]
    model = make_model().requires_grad_(False)
    model.get_input_embeddings().weight *= 10  # random weights are small: without this the head can prefer no token
    loaded = LoadedModel(model, tokenizer, "tiny", "none")
    base = evaluate(loaded.model, tokenizer, prompts)
    method = METHOD.model_copy(
        update={"lora_r": 32, "lora_alpha": 64, "num_epochs": 150, "gradient_accumulation": 1, "learning_rate": 4e-3}
    )
    result, _ = train(loaded, [encode_example(tokenizer, e, 512) for e in examples], method)
    adapted = evaluate(loaded.model, tokenizer, prompts)
    assert result.metrics.train_final_loss < result.metrics.train_initial_loss / 3
    comparison = compare(adapted, base)
    assert adapted.overall_accuracy > 0.8
    assert comparison["ci_low"] > 0
    assert comparison["mcnemar_p_value"] < 0.05


def test_the_same_seed_gives_the_same_adapter_with_dropout(loaded, encoded):
    method = METHOD.model_copy(update={"lora_dropout": 0.1})
    runs = []
    for seed in (1, 1, 2):
        torch.rand(3)  # whatever happened before in the process
        result, parameters = train(loaded, encoded, method, seed, num_steps=3)
        runs.append(([s.loss for s in result.steps], [p.detach().clone() for p in parameters]))
        loaded.detach()
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    assert runs[0][0] != runs[2][0]


def test_running_out_of_memory_halves_the_minibatch_and_changes_no_result(loaded, encoded):
    method = METHOD.model_copy(update={"lora_dropout": 0.1})
    expected, parameters = train(loaded, encoded, method, num_steps=3)
    adapter = [p.detach().clone() for p in parameters]
    loaded.detach()

    def refuse_large_batches(module, args, kwargs):
        if kwargs["input_ids"].numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = loaded.model.register_forward_pre_hook(refuse_large_batches, with_kwargs=True)
    try:
        limit = max(map(len, encoded))
        result, parameters = train(loaded, encoded, method, num_steps=3)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(adapter, parameters, strict=True))
        loaded.detach()
        assert result.metrics.micro_batch_size < expected.metrics.micro_batch_size
        assert result.metrics.num_oom_backoffs >= 3
        assert [s.loss for s in result.steps] == pytest.approx([s.loss for s in expected.steps], abs=1e-5)
        assert [e.num_supervised for e in example_losses(loaded, encoded, "answer", 4096)] == [
            sum(e.is_answer) for e in encoded
        ]
        limit = 0
        with pytest.raises(torch.OutOfMemoryError):
            train(loaded, encoded, num_steps=1)
    finally:
        hook.remove()
    assert not loaded.model.is_gradient_checkpointing


def test_a_loss_that_is_no_number_is_one_line(loaded, encoded):
    method = METHOD.model_copy(update={"learning_rate": 9.0, "max_grad_norm": 1e30, "warmup_ratio": 0})
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight *= 1e38
    with pytest.raises(TrainingDivergedError, match="lower --learning-rate"):
        train(loaded, encoded, method)


def test_no_supervised_token_is_one_line(loaded, tokenizer):
    empty = encode_example(tokenizer, make_examples(1)[0], 256)
    unsupervised = type(empty)(empty.input_ids, *[[False] * len(empty)] * 3)
    with pytest.raises(UserError, match="no supervised token"):
        train(loaded, [unsupervised])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers(schedule):
    from transformers import get_scheduler

    method = METHOD.model_copy(update={"lr_scheduler": schedule, "warmup_ratio": 0.1})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, math.ceil(25 * 0.1), 25)
    for step in range(25):
        assert learning_rate_factor(step, 25, method) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
