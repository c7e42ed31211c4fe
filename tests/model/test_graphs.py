"""Passes of fixed sizes that are replayed come to what passes as they are come to.

A recorder stands in for CUDA's graphs.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.model import memory
from raylora.model.adapters import LoadedModel
from raylora.model.graphs import SMALLEST, GraphedPasses, fixed_size, largest_size, make_room
from raylora.model.grouped import may_group
from raylora.training.gradients import GradientAccumulator, Job
from raylora.training.loop import train_adapters
from tests.helpers.graphs import RecordedGraphs
from tests.helpers.tiny import make_loaded, make_routed
from tests.helpers.training import DROPOUT, METHOD, Recorder


def replays_nothing(run):
    run()
    return lambda: None


def cannot_capture(run):
    run()
    raise RuntimeError("operation not permitted when stream is capturing\n a second line")


def does_not_fit(run):
    raise torch.OutOfMemoryError("CUDA out of memory")


def jobs_of(loaded, encoded, methods):
    return [
        Job(loaded.attach(method, i, f"a{i}"), encoded[2 * i :], method, i, f"a{i}") for i, method in enumerate(methods)
    ]


def steps_of(loaded, encoded, methods, capture, num_steps=6, observer=None, seed=1):
    """Losses and gradients of some steps of several adapters, and the accumulator."""
    jobs = jobs_of(loaded, encoded, methods)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in (p for job in jobs for p in job.parameters):
            p.copy_(torch.randn_like(p) * 0.1)
    runner = GradientAccumulator(loaded, jobs, observer, capture)
    losses, gradients = [], []
    loaded.model.train()
    with runner.ready():
        for k in range(num_steps):
            # The same number of examples, others each time, so that sizes come again and their contents do not.
            found = runner.backward({i: (k, [(k + j) % 8 for j in range(4 + i)]) for i in range(len(jobs))})
            losses.append([float(found[i].loss) for i in range(len(jobs))])
            gradients.append([p.grad.clone() for job in jobs for p in job.parameters])
            runner.restore()
    for job in jobs:
        loaded.detach(job.name)
    return losses, gradients, runner


def assert_equal(gradients, others) -> None:
    """Float noise apart: as much as a change of the weights by 1e-7 makes.

    Of all gradients together that is 5e-5 at most, of a single small one 1.8e-4, by processor.
    """
    for a, b in zip(gradients, others, strict=True):
        assert float((a - b).norm()) <= 3e-4 * float(b.norm())
    whole = [torch.cat([g.flatten() for g in side]) for side in (gradients, others)]
    assert float((whole[0] - whole[1]).norm()) <= 1e-4 * float(whole[1].norm())


METHODS = {
    "one": [DROPOUT],
    "one without dropout": [METHOD],
    "several": [DROPOUT, DROPOUT.model_copy(update={"lora_r": 3, "lora_dropout": 0.3, "train_on": "all"}), METHOD],
}


@pytest.mark.parametrize("which", METHODS)
def test_replayed_passes_have_the_losses_and_gradients_of_passes_as_they_are(loaded, encoded, which):
    graphs = RecordedGraphs()
    losses, gradients, runner = steps_of(loaded, encoded, METHODS[which], graphs)
    expected, others, plain = steps_of(loaded, encoded, METHODS[which], None)
    assert (runner.graphed, plain.graphed) == (True, False)
    assert 1 <= graphs.num_captures < graphs.num_replays
    for mine, theirs in zip(losses, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)
    for mine, theirs in zip(gradients, others, strict=True):
        assert_equal(mine, theirs)


@pytest.mark.parametrize(
    ("capture", "why"),
    [(replays_nothing, "its first replay gives other numbers"), (cannot_capture, "not permitted when stream is")],
)
def test_what_cannot_be_captured_is_run_as_it_is_and_said_in_a_line(loaded, encoded, caplog, capture, why):
    losses, gradients, runner = steps_of(loaded, encoded, METHODS["several"], capture)
    expected, others, _ = steps_of(loaded, encoded, METHODS["several"], None)
    assert not runner.graphed
    lines = [r.getMessage() for r in caplog.records if "CUDA graph" in r.getMessage()]
    assert len(lines) == 1
    assert why in lines[0]
    assert "\n" not in lines[0]
    for mine, theirs in zip(losses, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)
    assert_equal(gradients[-1], others[-1])


def test_a_capture_that_memory_does_not_hold_costs_nothing_but_its_speed(loaded, encoded):
    losses, _, runner = steps_of(loaded, encoded, [DROPOUT], does_not_fit)
    expected, _, _ = steps_of(loaded, encoded, [DROPOUT], None)
    assert not runner.graphed
    assert runner.budget.num_backoffs == 0
    assert losses == [pytest.approx(step, abs=1e-6) for step in expected]


def test_the_next_training_replays_what_the_last_one_captured(loaded, encoded):
    graphs = RecordedGraphs()
    steps_of(loaded, encoded, [DROPOUT], graphs)
    before = graphs.num_captures
    other = DROPOUT.model_copy(update={"lora_dropout": 0.3})
    losses, _, runner = steps_of(loaded, encoded, [other], graphs, seed=2)
    assert graphs.num_captures == before
    assert runner.graphed
    expected, _, _ = steps_of(loaded, encoded, [other], None, seed=2)
    assert losses == [pytest.approx(step, abs=1e-6) for step in expected]
    loaded.unwrap()
    steps_of(loaded, encoded, [METHOD], graphs)
    assert graphs.num_captures > before, "other modules: what was captured of the last ones is gone"


def test_micro_batches_of_a_probe_are_groups_of_captured_passes(loaded, encoded):
    seen = []
    for capture in (RecordedGraphs(), None):
        observer = Recorder(loaded)
        losses, _, runner = steps_of(
            loaded, encoded, [DROPOUT.model_copy(update={"batch_size": 2})], capture, observer=observer
        )
        seen.append((losses, observer.gradients, runner.graphed))
    (losses, gradients, graphed), (expected, others, _) = seen
    assert graphed
    assert losses == [pytest.approx(step, abs=1e-6) for step in expected]
    assert len(gradients) == len(others) == 2 * 6
    for mine, theirs in zip(gradients, others, strict=True):
        assert_equal([mine], [theirs])


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("which", ["embeddings", "experts"])
def test_modules_that_compute_their_gradient_themselves_have_it_once(encoded, which, observed):
    """A replay would leave it out of the parameters' ``grad``, and a trial of a capture count it twice."""
    targets = ("q_proj", "embed_tokens") if which == "embeddings" else ("q_proj", "experts.0", "experts.1")
    method = METHOD.model_copy(update={"batch_size": 2, "target_modules": targets})
    loaded = make_loaded() if which == "embeddings" else make_routed()
    for _ in range(2):  # the second training has what was captured of the first
        found = []
        for capture in (graphs := RecordedGraphs(), None):
            observer = Recorder(loaded) if observed else None
            losses, gradients, _ = steps_of(loaded, encoded, [method], capture, observer=observer)
            found.append((losses, observer.gradients if observer else [g.flatten() for gs in gradients for g in gs]))
        (losses, mine), (expected, theirs) = found
        assert graphs.num_replays == 0
        assert losses == [pytest.approx(step, abs=1e-6) for step in expected]
        assert_equal(mine, theirs)


@pytest.mark.parametrize("lasts", [False, True])
def test_memory_that_runs_out_drops_what_was_captured_first(loaded, encoded, monkeypatch, lasts):
    """And then what takes time: gradient checkpointing, with which nothing is captured. No number changes."""
    monkeypatch.setattr(memory, "CPU_TOKEN_BUDGET", 1024)
    steps = [range(4), range(4, 8), range(2, 6), range(12), range(4), range(4, 8), range(2, 6)]
    found = []
    for capture in (graphs := RecordedGraphs(), None):
        (job,) = jobs_of(loaded, encoded, [DROPOUT])
        runner = GradientAccumulator(loaded, [job], None, capture)
        refused = []

        def refuse(module, args, kwargs, refused=refused):
            is_large = kwargs["input_ids"].numel() > 512 and not loaded.model.is_gradient_checkpointing
            if is_large and (lasts or not refused):
                refused.append(graphs.num_captures)
                raise torch.OutOfMemoryError("CUDA out of memory")

        hook = loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
        loaded.model.train()
        with runner.ready():
            found.append([float(runner.backward({0: (k, step)})[0].loss) for k, step in enumerate(steps)])
        hook.remove()
        assert runner.budget.checkpointing == (lasts or capture is None)
        assert runner.budget.num_backoffs == (2 if lasts and capture else 1)
        if capture:
            assert refused[0] == 1
            assert graphs.num_captures == 1, "passes as large are not captured again"
        runner.restore()
        loaded.detach(job.name)
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize("modules", [("embed_tokens", "q_proj"), ("lm_head", "q_proj")])
def test_what_keeps_its_gradient_itself_is_not_captured(loaded, encoded, modules):
    """Passes that are run again for a capture would add to that gradient, and replays would not."""
    graphs, method = RecordedGraphs(), DROPOUT.model_copy(update={"lora_dropout": 0, "target_modules": modules})
    found = [steps_of(loaded, encoded, [method], graphs) for _ in range(2)]
    expected, others, _ = steps_of(loaded, encoded, [method], None)
    assert graphs.num_captures == 0
    for losses, gradients, _ in found:
        assert losses == [pytest.approx(step, abs=1e-6) for step in expected]
        for mine, theirs in zip(gradients, others, strict=True):
            assert_equal(mine, theirs)


def test_products_that_read_where_groups_end_are_not_captured(loaded, encoded, monkeypatch):
    """As on GPUs that have no kernel for grouped products."""
    expected, others, _ = steps_of(loaded, encoded, METHODS["several"], None)
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    may_group.cache_clear()
    try:
        losses, gradients, runner = steps_of(loaded, encoded, METHODS["several"], graphs := RecordedGraphs())
    finally:
        may_group.cache_clear()
    assert (runner.graphed, graphs.num_captures) == (False, 0)
    for mine, theirs in zip(losses, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)
    assert_equal(gradients[-1], others[-1])


def test_aligned_groups_fit_into_a_pass_as_large_as_the_budget(loaded, encoded):
    sizes = []

    def note(module, args, kwargs):
        sizes.append(kwargs["input_ids"].numel())

    jobs = jobs_of(loaded, encoded, METHODS["several"])
    runner = GradientAccumulator(loaded, jobs, None, RecordedGraphs())
    assert runner.budget.tokens == memory.CPU_TOKEN_BUDGET
    hook = loaded.model.register_forward_pre_hook(note, with_kwargs=True)
    loaded.model.train()
    with runner.ready():
        runner.backward({i: (0, range(len(job.examples))) for i, job in enumerate(jobs)})
    hook.remove()
    runner.restore()
    assert len(sizes) > 1
    assert set(sizes) == {memory.CPU_TOKEN_BUDGET}


def test_what_was_captured_is_gone_with_the_wrapper(loaded, encoded):
    """At once: it may be most of a GPU's memory, and Python looks for cycles when it pleases."""
    graphs = RecordedGraphs()
    gc.collect()
    gc.disable()
    try:
        steps_of(loaded, encoded, [DROPOUT], graphs)
        capture = weakref.ref(graphs)
        del graphs
        assert capture() is not None
        loaded.unwrap()
        assert capture() is None
    finally:
        gc.enable()


def test_memory_that_runs_out_lets_go_of_all_that_other_passes_hold(loaded, encoded):
    """The weights and gradients of adapters, too, not what was captured alone."""
    steps_of(loaded, encoded, [DROPOUT], RecordedGraphs())
    (passes,) = map(weakref.ref, loaded.kept.values())
    running = GraphedPasses(lambda inputs: None, None, lambda: [])
    assert make_room(loaded, running)
    assert passes() is None
    assert not make_room(loaded, running)


@pytest.mark.slow
def test_passes_of_another_number_of_adapters_are_let_go(loaded, encoded):
    for which, num_slots in (("one", [1]), ("several", [1, 3])):
        steps_of(loaded, encoded, METHODS[which], RecordedGraphs())
        assert sorted(slots for _, slots, _ in loaded.kept) == num_slots
    steps_of(loaded, encoded, METHODS["several"][:2], RecordedGraphs())
    assert sorted(slots for _, slots, _ in loaded.kept) == [1, 2]


def test_what_fills_a_training_pass_up_has_no_positions_that_the_model_lacks(loaded, encoded):
    """GPT-2's positions are a table of as many rows as its context is long: here 200, and a pass has 512 tokens."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(loaded.tokenizer), n_positions=200, n_embd=64, n_layer=2, n_head=4, pad_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    method = METHOD.model_copy(update={"target_modules": ("c_attn",)})
    found = []
    for capture in (RecordedGraphs(), None):
        other = LoadedModel(model, loaded.tokenizer, "tiny", "none")
        losses, gradients, runner = steps_of(other, encoded, [method], capture, num_steps=3)
        other.unwrap()
        assert runner.packed
        found.append((losses, gradients))
    (losses, gradients), (expected, others) = found
    assert losses == [pytest.approx(step, abs=1e-5) for step in expected]
    assert_equal(gradients[-1], others[-1])


def test_a_loss_that_is_no_number_is_no_reason_to_give_captures_up(loaded, encoded, caplog):
    graphs = RecordedGraphs()
    wild = METHOD.model_copy(update={"learning_rate": 9.0, "max_grad_norm": 1e30, "lora_alpha": 1e30})
    jobs = jobs_of(loaded, encoded, [wild])
    runner = GradientAccumulator(loaded, jobs, None, graphs)
    loaded.model.train()
    with runner.ready(), torch.no_grad():
        jobs[0].parameters[0].fill_(float("nan"))
        with torch.enable_grad():
            for k in range(3):
                runner.backward({0: (k, range(4))})
    assert not [r for r in caplog.records if "CUDA graph" in r.getMessage()]
    runner.restore()


@pytest.mark.slow
@pytest.mark.parametrize("ruined", range(3))
def test_an_adapter_that_is_no_number_changes_no_other_in_replayed_passes(loaded, encoded, ruined):
    """Not by a weight of 0 either: 0 times NaN is NaN."""
    found = []
    for value in (None, float("nan")):
        jobs = jobs_of(loaded, encoded, METHODS["several"])
        runner = GradientAccumulator(loaded, jobs, None, RecordedGraphs())
        loaded.model.train()
        with runner.ready():
            for k in range(4):
                if k == 3 and value is not None:
                    for p in jobs[ruined].parameters:
                        p.detach().fill_(value)
                steps = runner.backward({i: (k, range(4)) for i in range(3)})
            found.append(
                {i: (float(steps[i].loss), torch.cat([p.grad.flatten() for p in jobs[i].parameters])) for i in range(3)}
            )
        assert runner.graphed
        runner.restore()
        for job in jobs:
            loaded.detach(job.name)
    (expected, seen) = found
    assert not seen[ruined][1].isfinite().any()
    for i in {0, 1, 2} - {ruined}:
        assert seen[i][0] == expected[i][0]
        assert torch.equal(seen[i][1], expected[i][1])


def test_rows_say_whether_passes_were_captured(loaded, encoded):
    (result,) = train_adapters(loaded, jobs_of(loaded, encoded, [METHOD]))
    assert result.metrics.graphed is False


# Sizes


@settings(deadline=None)
@given(st.integers(1, 10**6))
def test_a_fixed_size_is_the_least_that_holds_the_tokens(num_tokens):
    size = fixed_size(num_tokens)
    assert size >= num_tokens
    assert fixed_size(size) == size
    assert size == SMALLEST or size <= num_tokens * 5 / 4, "filled up by a quarter at most"
    assert size == SMALLEST or largest_size(size - 1) < num_tokens


@settings(deadline=None)
@given(st.integers(1, 10**6))
def test_the_largest_size_is_the_last_that_is_not_above(num_tokens):
    size = largest_size(num_tokens)
    assert fixed_size(size) == size
    assert size <= max(num_tokens, SMALLEST)
    assert fixed_size(size + 1) > num_tokens
    assert largest_size(fixed_size(num_tokens)) == fixed_size(num_tokens)


def test_there_are_four_sizes_in_each_doubling():
    assert sorted({fixed_size(n) for n in range(1, 4097)}) == [
        512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096,
    ]  # fmt: skip
