"""In a step the CPU reads nothing that a GPU has yet to compute: it reads the numbers once the next one is launched."""

from __future__ import annotations

import math

import pytest
import torch

from raylora.config.options import ModelOptions
from raylora.data.encoding import encode_example
from raylora.errors import TrainingDivergedError
from raylora.features.observer import ProbeObserver
from raylora.model.loading import load_model
from raylora.training.gradients import GradientAccumulator, Job, StepGradient
from raylora.training.loop import train_adapter, train_adapters
from raylora.training.optimizer_step import LaunchedStep, take_step
from tests.helpers.reads import Reads
from tests.helpers.tiny import load
from tests.helpers.training import DROPOUT, METHOD, make_examples


def steps(loaded, jobs, observer=None, num_steps=3, before_step=lambda k: None) -> list[LaunchedStep]:
    """The first steps of a training by hand, none of them read."""
    passes = GradientAccumulator(loaded, jobs, observer)
    optimizers = [torch.optim.AdamW(job.parameters, fused=loaded.device.type == "cuda") for job in jobs]
    for parameter in (p for job in jobs for p in job.parameters):
        parameter.requires_grad_(True)
    loaded.model.train()
    launched = []
    try:
        with passes.ready():
            for k in range(num_steps):
                before_step(k)
                gradients = passes.backward({i: (k, range(4)) for i in range(len(jobs))})
                launched += [
                    take_step(k, jobs[i].parameters, optimizers[i], gradient, 0.3, 1e-3, observer)
                    for i, gradient in gradients.items()
                ]
    finally:
        before_step(0)
        loaded.model.eval()
        passes.restore()
    return launched


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("num_jobs", [1, 2])
def test_nothing_in_a_step_waits_for_the_gpu(outlier_model_folder, quantization, num_jobs):
    loaded = load(outlier_model_folder, quantization)
    encoded = [encode_example(loaded.tokenizer, e, 256) for e in make_examples(8)]
    jobs = [Job(loaded.attach(DROPOUT, i, f"a{i}"), encoded, DROPOUT, i, f"a{i}") for i in range(num_jobs)]
    steps(loaded, jobs, num_steps=1)  # what is found out once may be read
    with Reads() as reads:
        launched = steps(loaded, jobs)
    assert reads.places == []
    read = [step.read() for step in launched]
    assert [step.step for step in read] == [k + 1 for k in range(3) for _ in range(num_jobs)]
    assert all(math.isfinite(step.loss) and step.grad_norm > 0 for step in read)


@pytest.mark.parametrize("modules", [("q_proj", "down_proj"), ("embed_tokens", "q_proj"), ("lm_head",)])
def test_nothing_in_a_probes_step_waits_for_the_gpu(loaded, encoded, modules):
    method = DROPOUT.model_copy(update={"target_modules": modules, "batch_size": 2})
    job = Job(parameters := loaded.attach(method, 0), encoded, method, 0)
    steps(loaded, [job], num_steps=1)
    observer = ProbeObserver(parameters)
    with Reads() as reads:
        launched = steps(loaded, [job], observer)
    assert reads.places == []
    assert observer.losses == []
    assert [step.read().loss for step in launched] == observer.losses
    features = observer.features()
    assert all(features[name] is not None for name in ("loss_stability", "gradient_consistency", "avg_grad_sparsity"))


def test_a_training_reads_each_step_when_the_next_is_launched(loaded, encoded):
    """An observer sees the numbers of a step after the next one's gradient, and those of the last step too."""
    seen = []

    class Order(ProbeObserver):
        def before_clipping(self):
            super().before_clipping()
            seen.append("launched")

        def after_step(self, step):
            super().after_step(step)
            seen.append(step.step)

    parameters = loaded.attach(METHOD, 0)
    observer = Order(parameters)
    result = train_adapter(loaded, parameters, encoded, METHOD, 0, 3, observer)
    assert seen == ["launched", "launched", 1, "launched", 2, 3]
    assert observer.losses == [s.loss for s in result.steps]


@pytest.mark.parametrize("loss", [math.inf, math.nan])
@pytest.mark.parametrize("what", ["loss", "norm"])
def test_a_step_without_a_number_is_found_when_it_is_read(loss, what):
    gradient = StepGradient(torch.tensor(loss if what == "loss" else 1.0, dtype=torch.float64), 4, 2)
    step = LaunchedStep(6, gradient, torch.tensor(loss if what == "norm" else 1.0), 1e-3, None)
    with pytest.raises(TrainingDivergedError, match="at step 7: lower --learning-rate"):
        step.read()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("with_observer", [False, True])
def test_on_a_gpu_a_step_that_waits_is_an_error(tiny_model_folder, quantization, with_observer):
    loaded = load_model(ModelOptions(model=str(tiny_model_folder), quantization=quantization))
    encoded = [encode_example(loaded.tokenizer, e, 256) for e in make_examples(8)]
    method = DROPOUT.model_copy(update={"batch_size": 2})
    num_jobs = 1 if with_observer else 2
    jobs = [Job(loaded.attach(method, i, f"a{i}"), encoded, method, i, f"a{i}") for i in range(num_jobs)]
    train_adapters(loaded, jobs)  # what is found out once may be waited for
    observer = ProbeObserver(jobs[0].parameters) if with_observer else None
    launched = steps(loaded, jobs, observer, 4, lambda k: torch.cuda.set_sync_debug_mode("error" if k else "default"))
    assert all(math.isfinite(step.read().loss) for step in launched)
