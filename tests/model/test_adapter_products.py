"""Adapters trained together become what they become alone, and their dropout is PEFT's."""

from __future__ import annotations

import pytest
import torch

from raylora.config.options import ModelOptions
from raylora.data.encoding import encode_example, labels_of
from raylora.errors import TrainingDivergedError, UserError
from raylora.model import memory
from raylora.model.adapted_product import PassRows
from raylora.model.adapters import LoadedModel
from raylora.model.dropout import mix
from raylora.model.loading import load_model
from raylora.records import Example, Message
from raylora.training.gradients import GradientAccumulator, Job
from raylora.training.loop import TrainingResult, train_adapter, train_adapters
from raylora.training.slots import adapters_a_pass
from tests.helpers.tiny import load, make_model
from tests.helpers.training import DROPOUT, METHOD, assert_packed_agrees, make_examples


def jobs_of(loaded, encoded):
    """Three adapters that differ in everything that may differ."""
    methods = [
        DROPOUT,
        DROPOUT.model_copy(update={"lora_r": 3, "lora_alpha": 5, "learning_rate": 3e-3, "batch_size": 2}),
        # Draws of dropout are a module's own, whatever else is adapted for the others of its pass.
        DROPOUT.model_copy(update={"lora_dropout": 0.3, "target_modules": ("q_proj", "down_proj"), "train_on": "all"}),
    ]
    parts, steps = (encoded[:12], encoded[5:], encoded[3:9]), (4, 6, 3)
    return [
        (f"a{i}", method, part, num) for i, (method, part, num) in enumerate(zip(methods, parts, steps, strict=True))
    ]


def attach_all(loaded, plans):
    return [
        Job(loaded.attach(method, seed, name), part, method, seed, name, num)
        for seed, (name, method, part, num) in enumerate(plans)
    ]


def alone(loaded, name, method, part, num, seed):
    parameters = loaded.attach(method, seed, name)
    result = train_adapter(loaded, parameters, part, method, seed, num)
    weights = [p.detach().clone() for p in parameters]
    loaded.detach(name)
    return result, weights


@pytest.mark.parametrize("budget", [400, 1024])
def test_adapters_trained_together_are_what_they_become_alone(loaded, encoded, tmp_path, monkeypatch, budget):
    monkeypatch.setattr(memory, "CPU_TOKEN_BUDGET", budget)
    plans = jobs_of(loaded, encoded)
    expected = [alone(loaded, *plan, seed=i) for i, plan in enumerate(plans)]
    jobs = [
        Job(loaded.attach(method, i, name), part, method, i, name, num)
        for i, (name, method, part, num) in enumerate(plans)
    ]
    assert adapters_a_pass(loaded, jobs, 1e12) == 1, "on a CPU nothing is won"
    results = train_adapters(loaded, jobs)
    for job, result, (solo, weights) in zip(jobs, results, expected, strict=True):
        assert [s.loss for s in result.steps] == pytest.approx([s.loss for s in solo.steps], abs=1e-6)
        assert [s.grad_norm for s in result.steps] == pytest.approx([s.grad_norm for s in solo.steps], rel=1e-3)
        assert (result.metrics.num_train_examples, result.metrics.num_train_steps) == (
            solo.metrics.num_train_examples,
            solo.metrics.num_train_steps,
        )
        for a, b in zip(job.parameters, weights, strict=True):
            torch.testing.assert_close(a.detach(), b, atol=1e-4, rtol=0)
    ids = torch.tensor([encoded[0].input_ids])
    for job in jobs:
        loaded.save_adapter(tmp_path / job.name, job.name)
        loaded.activate(job.name)
        with torch.inference_mode():
            here = loaded.model(input_ids=ids).logits
        fresh = LoadedModel(make_model().requires_grad_(False), loaded.tokenizer, "tiny", "none")
        fresh.attach_saved(tmp_path / job.name)
        with torch.inference_mode():
            torch.testing.assert_close(fresh.model(input_ids=ids).logits, here)


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_gradients_of_a_first_step_are_those_of_each_alone(outlier_model_folder, quantization):
    """Of fresh adapters, to 1e-6 of their norm. Later ones are those of Adam's steps, of which noise is a part."""
    loaded = load(outlier_model_folder, quantization)
    plans = jobs_of(loaded, [encode_example(loaded.tokenizer, e, 256) for e in make_examples(16)])

    def first_step(jobs):
        runner = GradientAccumulator(loaded, jobs, None)
        loaded.model.train()
        with runner.ready():
            found = runner.backward({i: (0, range(len(job.examples))) for i, job in enumerate(jobs)})
        gradients = [torch.cat([p.grad.flatten() for p in job.parameters]) for job in jobs]
        runner.restore()
        return [float(found[i].loss) for i in range(len(jobs))], gradients

    solo = []
    for i, (name, method, part, num) in enumerate(plans):
        solo.append(first_step([Job(loaded.attach(method, i, name), part, method, i, name, num)]))
        loaded.detach(name)
    losses, gradients = first_step(attach_all(loaded, plans))
    for loss, gradient, ((loss_alone,), (alone_,)) in zip(losses, gradients, solo, strict=True):
        assert loss == pytest.approx(loss_alone, abs=1e-6)
        assert float(alone_.norm()) > 1e-3
        assert float((gradient - alone_).norm()) <= 1e-6 * float(alone_.norm())


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_over_a_quantized_base_they_are_what_they_become_alone(outlier_model_folder, quantization):
    loaded = load(outlier_model_folder, quantization)
    plans = jobs_of(loaded, [encode_example(loaded.tokenizer, e, 256) for e in make_examples(16)])
    expected = [alone(loaded, *plan, seed=i) for i, plan in enumerate(plans)]
    jobs = attach_all(loaded, plans)
    for job, result, (solo, weights) in zip(jobs, train_adapters(loaded, jobs), expected, strict=True):
        assert [s.loss for s in result.steps] == pytest.approx([s.loss for s in solo.steps], rel=3e-6)
        assert [s.grad_norm for s in result.steps] == pytest.approx([s.grad_norm for s in solo.steps], rel=1e-4)
        # By norm: where a number's gradient is all but 0, Adam makes a step of float noise.
        for a, b in zip(job.parameters, weights, strict=True):
            assert float((a.detach() - b).norm()) < 1e-3 * float(b.norm())


def test_an_adapter_that_diverges_stops_alone(loaded, encoded):
    wild = METHOD.model_copy(update={"learning_rate": 9.0, "max_grad_norm": 1e30, "lora_alpha": 1e30})
    expected, weights = alone(loaded, "a", METHOD, encoded, 4, 0)
    jobs = [Job(loaded.attach(m, 0, name), encoded, m, 0, name, 4) for name, m in (("wild", wild), ("a", METHOD))]
    diverged, result = train_adapters(loaded, jobs)
    assert isinstance(diverged, TrainingDivergedError)
    assert [s.loss for s in result.steps] == pytest.approx([s.loss for s in expected.steps], abs=1e-6)
    for a, b in zip(jobs[1].parameters, weights, strict=True):
        torch.testing.assert_close(a.detach(), b, atol=1e-4, rtol=0)


def test_running_out_of_memory_together_changes_no_adapter(loaded, encoded):
    plans = jobs_of(loaded, encoded)
    expected = [alone(loaded, *plan, seed=i) for i, plan in enumerate(plans)]

    def refuse(module, args, kwargs):
        if kwargs["input_ids"].numel() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")

    jobs = [
        Job(loaded.attach(method, i, name), part, method, i, name, num)
        for i, (name, method, part, num) in enumerate(plans)
    ]
    hook = loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        results = train_adapters(loaded, jobs)
    finally:
        hook.remove()
    for job, result, (_, weights) in zip(jobs, results, expected, strict=True):
        assert result.metrics.num_oom_backoffs >= 2
        for a, b in zip(job.parameters, weights, strict=True):
            torch.testing.assert_close(a.detach(), b, atol=1e-4, rtol=0)


def test_modules_that_are_no_matrices_cannot_share_a_pass(loaded, encoded):
    method = METHOD.model_copy(update={"target_modules": ("embed_tokens",)})
    jobs = [Job(loaded.attach(method, i, n), encoded, method, i, n, 1) for i, n in enumerate("ab")]
    first, second = train_adapters(loaded, jobs)
    assert isinstance(first, TrainingResult)
    assert isinstance(second, UserError)
    assert "--target-modules" in str(second)
    assert len(train_adapter(loaded, jobs[1].parameters, encoded, method, 0, 1).steps) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_on_a_gpu_packed_and_padded_agree_and_adapters_share_passes(tiny_model_folder, quantization):
    loaded = load_model(ModelOptions(model=str(tiny_model_folder), quantization=quantization))
    assert loaded.device.type == "cuda"
    encoded = [encode_example(loaded.tokenizer, e, 256) for e in make_examples(16)]
    assert_packed_agrees(loaded, encoded, of_loss=1e-2, of_gradient=0.05)
    plans = jobs_of(loaded, encoded)
    solo = [alone(loaded, *plan, seed=i)[0] for i, plan in enumerate(plans)]
    for result, other in zip(train_adapters(loaded, attach_all(loaded, plans)), solo, strict=True):
        assert [s.loss for s in result.steps] == pytest.approx([s.loss for s in other.steps], rel=2e-2)
    job = Job(loaded.attach(DROPOUT, 0, "next"), encoded, DROPOUT, 0, "next")
    assert adapters_a_pass(loaded, [job], 1e9) > 3, "a tiny adapter's steps fill no minibatch"


def record_masks(monkeypatch, drawn: list) -> None:
    """Whatever is drawn for dropout from now on is put to ``drawn``, too."""
    draw = PassRows.mask
    monkeypatch.setattr(PassRows, "mask", lambda *args: drawn.append(draw(*args)) or drawn[-1])


def test_dropout_is_that_of_peft_with_the_same_draws(loaded, tokenizer, monkeypatch):
    """PEFT's own forward pass, its dropout replaced by one that multiplies with the bytes that raylora drew."""
    method = METHOD.model_copy(update={"lora_dropout": 0.25, "batch_size": 1, "gradient_accumulation": 1})
    (example,) = [encode_example(tokenizer, e, 256) for e in make_examples(1)]
    parameters = loaded.attach(method, 0)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn_like(p) * 0.1)
    passes = GradientAccumulator(loaded, [Job(parameters, [example], method, 3)], None)
    drawn: list[torch.Tensor] = []
    record_masks(monkeypatch, drawn)
    loaded.model.train()
    with passes.ready():
        found = passes.backward({0: (0, [0])})[0]
    gradients = [p.grad.clone() for p in parameters]
    loaded.peft_model.zero_grad()

    class Drawn(torch.nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.keep = keep

        def forward(self, x):
            return x * self.keep / 0.75

    assert len(drawn) == 14
    for (_, module), part in zip(loaded.lora_modules(), drawn, strict=True):
        share = float(part.float().mean())
        assert share == pytest.approx(0.75, abs=0.03)
        module.lora_dropout["default"] = Drawn(part)
    labels = torch.tensor([labels_of(example, "answer")])
    loss = loaded.model(input_ids=torch.tensor([example.input_ids]), labels=labels).loss
    loss.backward()
    assert float(found.loss) == pytest.approx(float(loss.detach()), abs=1e-5)
    for mine, p in zip(gradients, parameters, strict=True):
        torch.testing.assert_close(mine, p.grad, atol=1e-5, rtol=1e-4)


def test_draws_of_dropout_have_nothing_in_common(loaded, tokenizer, monkeypatch):
    seeds = {mix(seed, step, at) for seed in range(10) for step in range(10) for at in range(10)}
    assert len({s >> 32 for s in seeds}) == 1000
    method = METHOD.model_copy(update={"lora_dropout": 0.5})
    same = [encode_example(tokenizer, Example((Message("user", "so " * 40),), "yes", "q"), 256)] * 2
    passes = GradientAccumulator(loaded, [Job(loaded.attach(method, 0), same, method, 3)], None)
    drawn = []
    record_masks(monkeypatch, drawn)
    loaded.model.train()
    with passes.ready():
        passes.backward({0: (0, [0, 1])})
    passes.restore()
    halves = [half for part in drawn if part.shape[1] == 64 for half in part.float().chunk(2)]
    assert len(halves) == 24  # 12 modules of this width, two examples that read the same
    masks = torch.stack([h.flatten() for h in halves]) * 2 - 1
    cosines = masks @ masks.T / masks.shape[1]
    cosines.fill_diagonal_(0)
    assert float(cosines.abs().max()) < 5 / masks.shape[1] ** 0.5
    # Nor do a token's neighbours, or a number's.
    for mask in (h * 2 - 1 for h in halves):
        for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5
