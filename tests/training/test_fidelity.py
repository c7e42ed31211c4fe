"""Training against references that share no code with it: transformers' Trainer, PEFT's forward pass, plain text."""

from __future__ import annotations

import json
import random

import pytest
import torch

from raylora.data.datasets import load_dataset
from raylora.data.encoding import IGNORE_INDEX, encode_example, labels_of
from raylora.model.adapters import LoadedModel
from raylora.records import Example, Message
from raylora.training.adapter_products import mix
from raylora.training.gradients import GradientAccumulator, Job
from raylora.training.loop import train_adapter
from tests.data.test_datasets import FORMATS
from tests.helpers.tiny import CHAT_TEMPLATE, make_model
from tests.training.test_loop import METHOD, make_examples

TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "default system": CHAT_TEMPLATE.replace(
        "{% for m",
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe of use.<|im_end|>\n{% endif %}{% for m",
        1,
    ),
    "llama 2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>[INST] {{ m['content'] | trim }} [/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} <|im_end|>"
        "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
    ),
    "llama 3": (
        "<|im_start|>{% for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
    ),
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "reasoning": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}[assistant]{{ m['content'].split('</think>')[-1] }}"
        "<|im_end|>{% else %}[{{ m['role'] }}]{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
    ),
    "gemma": (
        "{% for m in messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
    ),
    "none": None,
}
PAIRS = [
    ("What is the capital of France?", "Paris"),
    ("Sort: 3, 1, 2", "1, 2, 3\nas they should be.\n\n- one\n- two"),
    ("谁会叫? " * 5, "猫会叫，狗也会。"),
    ("Say it again: Paris", "Say it again: Paris"),
    ("Name an emoji", "🎉 é"),
    ("Which letter?", "n"),
    ("What ends a turn?", "im_end"),
    ("Who are you?", "assistant"),
]


@pytest.fixture
def loaded(tokenizer):
    return LoadedModel(make_model().requires_grad_(False), tokenizer, "tiny", "none")


# Labels


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("form", FORMATS)
def test_supervised_tokens_read_as_the_answers_whatever_the_format_and_template(
    tokenizer, tmp_path, monkeypatch, form, template
):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[template])
    path = tmp_path / "data.json"
    path.write_text(json.dumps([FORMATS[form](q, a) for q, a in PAIRS]), encoding="utf-8")
    examples = load_dataset(path).examples
    for (_, answer), example in zip(PAIRS, examples, strict=True):
        whole = encode_example(tokenizer, example, 4096)
        supervised = [t for t in labels_of(whole, "answer") if t != IGNORE_INDEX]
        text = tokenizer.decode(supervised)
        # Where a template puts a space before an answer, it is a part of its first word; a space behind is one to say.
        assert text.removeprefix(" " if template in {"llama 2", "none"} else "").replace(
            " <|im_end|>", "<|im_end|>"
        ) == (f"{answer}<|im_end|>")
        assert whole.input_ids[-len(supervised) :] == supervised, "the answer ends the example"
        for max_length in range(len(supervised) + 1, len(whole), 7):
            cut = encode_example(tokenizer, example, max_length)
            assert len(cut) == max_length
            kept = [t for t in labels_of(cut, "answer") if t != IGNORE_INDEX]
            assert kept == supervised[: len(kept)], "what is left of an answer is its beginning"
            # A quarter of the room is kept for the prompt; only an answer that does not fit the rest is cut.
            assert len(kept) >= min(len(supervised), max_length - max_length // 4)
            assert cut.input_ids[-len(kept) :] == kept


def test_what_a_template_makes_of_thinking_is_supervised_with_the_answer(tokenizer, monkeypatch):
    """One that drops it leaves the answer behind it, and one that adds an empty thought to others keeps a real one."""
    answer = "<think>\nlight is\n</think>\n\nThe answer is water."
    example = Example((Message("user", "What is wet?"),), answer, "What is wet?")
    adds = TEMPLATES["thinking"].replace(
        "<think>\n\n</think>\n\n", "{{ '' if '<think>' in m['content'] else '<think>\n\n</think>\n\n' }}"
    )
    for template, expected in ((TEMPLATES["reasoning"], "\n\nThe answer is water."), (adds, answer)):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        labels = labels_of(encode_example(tokenizer, example, 4096), "answer")
        assert tokenizer.decode([t for t in labels if t != IGNORE_INDEX]) == f"{expected}<|im_end|>"


# The loop


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
@pytest.mark.parametrize("accumulation", [1, 4])
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

        def log(self, logs, *args, **kwargs):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    arguments = TrainingArguments(
        tmp_path, max_steps=num_steps, logging_steps=1, learning_rate=method.learning_rate, seed=0, optim="adamw_torch",
        max_grad_norm=method.max_grad_norm, gradient_accumulation_steps=accumulation, lr_scheduler_type="cosine",
        warmup_steps=2, weight_decay=method.weight_decay, report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=True, average_tokens_across_devices=False,
    )  # fmt: skip
    Reference(other._peft, arguments).train()
    assert [s.loss for s in result.steps] == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.01, "nothing was learnt that could have gone wrong"
    for mine, other_one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other_one.detach(), atol=1e-4, rtol=0)
    assert max(float((a - b).abs().max()) for a, b in zip(ours, start, strict=True)) > 5e-3


def test_dropout_is_that_of_peft_with_the_same_draws(loaded, tokenizer):
    """PEFT's own forward pass, its dropout replaced by one that multiplies with the bytes that raylora drew."""
    method = METHOD.model_copy(update={"lora_dropout": 0.25, "batch_size": 1, "gradient_accumulation": 1})
    (example,) = [encode_example(tokenizer, e, 256) for e in make_examples(1)]
    parameters = loaded.attach(method, 0)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn_like(p) * 0.1)
    passes = GradientAccumulator(loaded, [Job(parameters, [example], method, 3)], None)
    drawn: list[torch.Tensor] = []
    draw = passes._adapters._slice
    passes._adapters._slice = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    loaded.model.train()
    with passes.ready():
        found = passes.backward({0: [0]}, 0)[0]
    gradients = [p.grad.clone() for p in parameters]
    loaded._peft.zero_grad()

    class Drawn(torch.nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.keep = keep

        def forward(self, x):
            return x * self.keep / 0.75

    assert len(drawn) == 14
    for (_, module), part in zip(loaded.lora_modules(), drawn, strict=True):
        share = float(part.keep.float().mean())
        assert share == pytest.approx(0.75, abs=0.03)
        module.lora_dropout["default"] = Drawn(part.keep)
    labels = torch.tensor([labels_of(example, "answer")])
    loss = loaded.model(input_ids=torch.tensor([example.input_ids]), labels=labels).loss
    loss.backward()
    assert found.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    for mine, p in zip(gradients, parameters, strict=True):
        torch.testing.assert_close(mine, p.grad, atol=1e-5, rtol=1e-4)


def test_draws_of_dropout_have_nothing_in_common(loaded, tokenizer):
    seeds = {mix(seed, step, at) for seed in range(10) for step in range(10) for at in range(10)}
    assert len({s >> 32 for s in seeds}) == 1000
    method = METHOD.model_copy(update={"lora_dropout": 0.5})
    same = [encode_example(tokenizer, Example((Message("user", "so " * 40),), "yes", "q"), 256)] * 2
    passes = GradientAccumulator(loaded, [Job(loaded.attach(method, 0), same, method, 3)], None)
    drawn = []
    draw = passes._adapters._slice
    passes._adapters._slice = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    loaded.model.train()
    with passes.ready():
        passes.backward({0: [0, 1]}, 0)
    passes.restore()
    halves = [half for part in drawn if part.keep.shape[1] == 64 for half in part.keep.float().chunk(2)]
    assert len(halves) == 24  # 12 modules of this width, two examples that read the same
    masks = torch.stack([h.flatten() for h in halves]) * 2 - 1
    cosines = masks @ masks.T / masks.shape[1]
    cosines.fill_diagonal_(0)
    assert float(cosines.abs().max()) < 5 / masks.shape[1] ** 0.5
    # Nor do a token's neighbours, or a number's.
    for mask in (h * 2 - 1 for h in halves):
        for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5
