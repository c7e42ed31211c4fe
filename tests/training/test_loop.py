"""A LoRA learns, repeats itself with its seed, and what happens when memory or numbers run out."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylora.config.method import Method
from raylora.data.encoding import StoredEncoded, encode_each, encode_example
from raylora.errors import ErrorKind, TrainingDivergedError, UserError
from raylora.mmlu.prompts import encode_questions
from raylora.mmlu.scoring import evaluate
from raylora.mmlu.statistics import compare
from raylora.model.adapters import LoadedModel
from raylora.records import Example, Message, Question
from raylora.training.loop import learning_rate_factor, train_adapter
from raylora.training.losses import example_losses
from tests.helpers.formats import PAIRS
from tests.helpers.tiny import make_model
from tests.helpers.training import METHOD, make_examples


def test_training_from_disk_is_training_from_memory(loaded, on_disk):
    told = [Example((Message("user", q),), a, q) for q, a in PAIRS[:12]]
    method = Method(num_epochs=1, learning_rate=1e-3)
    curves = []
    for encoded in (
        [encode_example(loaded.tokenizer, e, 64) for e in told],
        StoredEncoded(encode_each(loaded.tokenizer, told, 64)),
    ):
        parameters = loaded.attach(method, 1)
        try:
            curves.append(train_adapter(loaded, parameters, encoded, method, 1).loss_curve())
        finally:
            loaded.detach()
    assert curves[0] == curves[1]


@pytest.fixture
def encoded(tokenizer):
    return [encode_example(tokenizer, e, 256) for e in make_examples()]


# Training


def train(loaded, encoded, method=METHOD, seed=0, **options):
    parameters = loaded.attach(method, seed)
    return train_adapter(loaded, parameters, encoded, method, seed, **options), parameters


@pytest.mark.slow
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
    base = evaluate(loaded, prompts)
    method = METHOD.model_copy(
        update={"lora_r": 32, "lora_alpha": 64, "num_epochs": 150, "gradient_accumulation": 1, "learning_rate": 4e-3}
    )
    result, _ = train(loaded, [encode_example(tokenizer, e, 512) for e in examples], method)
    adapted = evaluate(loaded, prompts)
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
    with pytest.raises(UserError, match="no supervised token") as raised:
        train(loaded, [unsupervised])
    assert raised.value.kind is ErrorKind.NO_SUPERVISED_TOKEN


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers_but_for_the_warm_up(schedule):
    """Which has no step at rate 0 here: step k of 3 has (k + 1) / 4 of the peak, where transformers has k / 3."""
    from transformers import get_scheduler

    method = METHOD.model_copy(update={"lr_scheduler": schedule, "warmup_ratio": 0.1})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, math.ceil(25 * 0.1), 25)
    for step in range(25):
        expected = (0.25, 0.5, 0.75)[step] if step < 3 else reference.get_last_lr()[0]
        assert learning_rate_factor(step, 25, method) == pytest.approx(expected)
        optimizer.step()
        reference.step()


@given(
    num_steps=st.integers(1, 2000),
    ratio=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    data=st.data(),
)
def test_every_step_has_a_rate_above_zero(num_steps, ratio, schedule, data):
    method = METHOD.model_copy(update={"lr_scheduler": schedule, "warmup_ratio": ratio})
    step = data.draw(st.integers(0, num_steps - 1))
    assert 0 < learning_rate_factor(step, num_steps, method) <= 1


@pytest.mark.parametrize("modules", [("q_proj", "down_proj"), ("embed_tokens",)])
def test_a_training_of_one_step_trains_and_one_at_rate_zero_says_that_it_did_not(loaded, encoded, modules):
    """Sixteen examples at one epoch are one step of the default method."""
    base = [losses.total for losses in example_losses(loaded, encoded, "answer", 4096)]
    for rate in (2e-4, 0.0):
        method = Method(num_epochs=1, target_modules=modules, max_length=256, learning_rate=rate)
        result, _ = train(loaded, encoded, method)
        after = [losses.total for losses in example_losses(loaded, encoded, "answer", 4096)]
        loaded.detach()
        assert result.metrics.num_train_steps == 1
        assert (after != base) == (result.metrics.train_notes == "") == (rate > 0)
        assert ("learning rate 0" in result.metrics.train_notes) == (rate == 0)


def reference_steps(num_examples: int, per_step: int, num_steps: int) -> list[list[int]]:
    """Examples of each step for seed 0, in the order that raylora takes them."""
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < num_steps:
        order = list(range(num_examples))
        random.Random(f"0/{epoch}").shuffle(order)
        steps += [order[i : i + per_step] for i in range(0, num_examples, per_step)]
        epoch += 1
    return steps[:num_steps]


@pytest.mark.parametrize("train_on", ["answer", "all"])
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_steps_and_losses_are_those_of_the_transformers_trainer(loaded, tokenizer, tmp_path, train_on, accumulation):
    """The same ordered batches, padded on the right, through transformers.Trainer and PEFT's own forward pass."""
    from transformers import Trainer, TrainingArguments

    num_steps = 8
    method = METHOD.model_copy(
        update={
            "train_on": train_on, "batch_size": 8 // accumulation, "gradient_accumulation": accumulation,
            "warmup_ratio": 0.2, "max_grad_norm": 0.3, "learning_rate": 3e-3,
        }
    )  # fmt: skip
    encoded = [encode_example(tokenizer, e, 256) for e in make_examples(16)]
    result = train_adapter(loaded, parameters := loaded.attach(method, 0), encoded, method, 0, num_steps)
    ours = [p.detach().clone() for p in parameters]
    assert result.metrics.packed

    other = LoadedModel(make_model().requires_grad_(False), tokenizer, "tiny", "none")
    theirs = other.attach(method, 0)
    start = [p.detach().clone() for p in theirs]
    steps = reference_steps(len(encoded), 8, num_steps)
    size = method.batch_size
    batches = [step[i : i + size] for step in steps for i in range(0, len(step), size)]
    losses = []

    class Reference(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=self._batch)

        def _batch(self, indices):
            chosen = [encoded[i] for i in indices]
            width = max(map(len, chosen))
            ids, labels, mask = ([] for _ in range(3))
            for e in chosen:
                pad = width - len(e)
                wanted = [train_on == "all" or of_answer for of_answer in e.is_answer]
                ids.append(e.input_ids + [0] * pad)
                labels.append([t if w else -100 for t, w in zip(e.input_ids, wanted, strict=True)] + [-100] * pad)
                mask.append([1] * len(e) + [0] * pad)
            return {
                k: torch.tensor(v)
                for k, v in zip(("input_ids", "labels", "attention_mask"), (ids, labels, mask), strict=True)
            }

        def create_scheduler(self, num_training_steps, optimizer=None):
            """Transformers' cosine behind a warm-up of two steps, which are at one and two thirds of the peak."""
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda k: (k + 1) / 3 if k < 2 else 0.5 * (1 + math.cos(math.pi * (k - 2) / (num_steps - 2))),
            )
            return self.lr_scheduler

        def log(self, logs, *args, **kwargs):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    arguments = TrainingArguments(
        tmp_path, max_steps=num_steps, logging_steps=1, learning_rate=method.learning_rate, seed=0, optim="adamw_torch",
        max_grad_norm=method.max_grad_norm, gradient_accumulation_steps=accumulation,
        weight_decay=method.weight_decay, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        average_tokens_across_devices=False,
    )  # fmt: skip
    Reference(other.peft_model, arguments).train()
    assert [s.loss for s in result.steps] == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.01, "nothing was learnt that could have gone wrong"
    for mine, other_one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other_one.detach(), atol=1e-4, rtol=0)
    assert max(float((a - b).abs().max()) for a, b in zip(ours, start, strict=True)) > 5e-3
