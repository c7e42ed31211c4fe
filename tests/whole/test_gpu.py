"""What a GPU must do as a CPU does. Tests run on the CPU too, so that they are known to test what they say.

Those of what only a GPU does run on a GPU alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from raylora.config.method import Method
from raylora.config.options import ModelOptions
from raylora.data.encoding import encode_example
from raylora.data.minibatch import Blocks
from raylora.model.adapter_products import AdapterProducts, Span
from raylora.model.attention import attend_in_blocks
from raylora.model.candidates import CandidatePasses, Row
from raylora.model.forward import inference
from raylora.model.graphs import capture_of
from raylora.model.grouped import may_group
from raylora.model.kept_keys import Behind, KeptKeys
from raylora.model.kernels import drop
from raylora.model.loading import as_loaded, load_model
from raylora.model.memory import CPU_TOKEN_BUDGET, ENOUGH_TOKENS, GPU_TOKEN_BUDGET, TokenBudget, tokens_that_fit
from raylora.training.gradients import GradientAccumulator, Job
from raylora.training.loop import train_adapter, train_adapters
from raylora.training.losses import example_losses
from tests.helpers.adapters import attach_random
from tests.helpers.tiny import make_model, make_tokenizer
from tests.helpers.training import Recorder, make_examples

METHOD = Method(lora_r=8, num_epochs=1, batch_size=4, gradient_accumulation=2, learning_rate=2e-3, lora_dropout=0.1)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
QUANTIZATIONS = ["none", "8bit", "4bit"]
ON_GPU = pytest.mark.parametrize("device", [GPU], indirect=True)


@pytest.fixture(params=["cpu", GPU])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    on_gpu = request.node.get_closest_marker("gpu") is not None
    assert on_gpu == (request.param == "cuda"), "a test marked gpu asserts what only a GPU does"
    return torch.device(request.param)


@contextlib.contextmanager
def refused(loaded, refuses: Callable[[int], bool]) -> Iterator[None]:
    """Inside, memory runs out in every minibatch of whose number of tokens ``refuses`` says so."""

    def check(module, args, kwargs):
        if refuses(kwargs["input_ids"].numel()):
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = loaded.model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture
def load(device, tiny_model_folder):
    def load(quantization: str, where: torch.device = device):
        loaded = load_model(ModelOptions(model=str(tiny_model_folder), quantization=quantization), where)
        return loaded, [encode_example(loaded.tokenizer, e, 256) for e in make_examples(16)]

    return load


def keep_of(loaded, seed: int) -> torch.Tensor:
    """What dropout keeps of the first module's input, on the CPU."""
    loaded.attach(METHOD.model_copy(update={"lora_dropout": 0.3}), 0)
    try:
        products = AdapterProducts(loaded, 1, 1)
        products.hold(["default"])
        spans = [Span(0, 7, 0, seed), Span(7, 12, 0, seed + 1)]
        rows = products.rows_of(spans, 12).on(loaded.device)
        return (drop(torch.ones(12, 64, device=loaded.device), rows.dropout(0, 64), torch.float32) != 0).cpu()
    finally:
        loaded.detach()


def test_dropout_drops_the_same_on_every_device(load):
    here, there = load("none")[0], load("none", torch.device("cpu"))[0]
    assert torch.equal(keep_of(here, 2**40 + 7), keep_of(there, 2**40 + 7))
    assert 0.5 < keep_of(here, 3).float().mean() < 0.9


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_training_leaves_the_base_as_it_was(load, quantization):
    loaded, encoded = load(quantization)
    before = loaded.logits_hash()
    result = train_adapter(loaded, loaded.attach(METHOD, 0), encoded, METHOD, 0, 6)
    loaded.detach()
    assert loaded.logits_hash() == before
    assert result.steps[-1].loss < result.steps[0].loss


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_gradient_is_that_of_pefts_own_forward_pass(load, quantization):
    """Without dropout; half precision depends a little on what is multiplied together."""
    loaded, encoded = load(quantization)
    method = METHOD.model_copy(update={"lora_dropout": 0.0})
    parameters = loaded.attach(method, 0)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn_like(p) * 0.05)
    runner = GradientAccumulator(loaded, [Job(parameters, encoded, method, 0, loaded.active_adapter)], None)
    loaded.model.train()
    with runner.ready():
        ours = float(runner.backward({0: (0, range(8))})[0].loss)
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    runner.restore()
    loaded.model.eval()
    losses = example_losses(loaded, encoded[:8], "answer", 512, with_gradient=True)
    peft = torch.cat([p.grad.flatten() for p in parameters])
    exact = loaded.device.type == "cpu"
    mean = sum(loss.total for loss in losses) / sum(loss.num_supervised for loss in losses)
    assert ours == pytest.approx(mean, rel=1e-5 if exact else 2e-2)
    assert float((gradient - peft).norm() / peft.norm()) < (1e-4 if exact else 0.06)
    loaded.detach()


def test_checkpoints_change_nothing_but_memory(load):
    loaded, encoded = load("none")
    curves, gradients = [], []
    for checkpointing in (False, True):
        parameters = loaded.attach(METHOD, 0)
        runner = GradientAccumulator(loaded, [Job(parameters, encoded, METHOD, 0, loaded.active_adapter)], None)
        loaded.model.train()

        def refuse(num_tokens: int, checkpointing: bool = checkpointing) -> bool:
            return checkpointing and not loaded.model.is_gradient_checkpointing

        with runner.ready(), refused(loaded, refuse):
            curves.append([float(runner.backward({0: (k, range(k, k + 8))})[0].loss) for k in range(3)])
        assert loaded.model.is_gradient_checkpointing == checkpointing
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        runner.restore()
        loaded.detach()
    assert not loaded.model.is_gradient_checkpointing
    exact = loaded.device.type == "cpu"
    assert curves[0] == pytest.approx(curves[1], rel=1e-5 if exact else 1e-2)
    assert float(gradients[0].norm()) > 0
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < (1e-4 if exact else 0.05)


def test_a_minibatch_on_a_gpu_is_what_memory_holds():
    gigabyte = 2**30
    assert tokens_that_fit(8e6, 60 * gigabyte) == int(0.8 * 60 * gigabyte / 8e6)
    assert tokens_that_fit(1e3, 60 * gigabyte) == GPU_TOKEN_BUDGET
    assert tokens_that_fit(1e12, gigabyte) == 256
    assert tokens_that_fit(8e6, 60 * gigabyte, captured=True) == int(0.4 * 60 * gigabyte / 8e6)


def test_large_minibatches_are_halved_before_anything_is_computed_twice(load):
    loaded, encoded = load("none")
    job = Job(loaded.attach(METHOD, 0), encoded * 25, METHOD, 0, loaded.active_adapter)
    runner = GradientAccumulator(loaded, [job], None)
    runner.budget = TokenBudget(2 * ENOUGH_TOKENS, may_checkpoint=True)
    seen = []

    def refuse(module, args, kwargs):
        seen.append((kwargs["input_ids"].numel(), loaded.model.is_gradient_checkpointing))
        if len(seen) < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
    loaded.model.train()
    try:
        with runner.ready():
            runner.backward({0: (0, range(400))})
    finally:
        hook.remove()
        loaded.model.eval()
        runner.restore()
        loaded.detach()
    sizes = [size for size, _ in seen[:4]]
    assert sizes[0] > ENOUGH_TOKENS
    assert sizes[1] <= sizes[0] // 2
    assert sizes[2] == sizes[1], "a small one is not halved before activations are checkpointed"
    assert sizes[3] <= sizes[2] // 2
    assert [checkpointing for _, checkpointing in seen[:4]] == [False, False, True, True]
    assert runner.budget.num_backoffs == 3


@ON_GPU
def test_memory_that_really_runs_out_makes_minibatches_smaller_and_changes_no_loss(load):
    loaded, encoded = load("none")
    many = encoded * 40
    method = METHOD.model_copy(update={"batch_size": 320, "gradient_accumulation": 2})

    def losses() -> tuple[list[float], int]:
        result = train_adapter(loaded, loaded.attach(method, 0), many, method, 0, 2)
        loaded.detach()
        return [step.loss for step in result.steps], result.metrics.num_oom_backoffs

    loaded.training_tokens = GPU_TOKEN_BUDGET
    expected, backoffs = losses()
    assert backoffs == 0
    torch.cuda.empty_cache()
    loaded.training_tokens = GPU_TOKEN_BUDGET
    _, total = torch.cuda.mem_get_info()
    taken = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction((taken + 64 * 2**20) / total)
    try:
        found, backoffs = losses()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert backoffs > 0
    assert loaded.training_tokens < GPU_TOKEN_BUDGET, "the next training would find out again"
    assert found == pytest.approx(expected, rel=1e-2)


@ON_GPU
def test_what_a_token_takes_is_learnt_in_the_first_step(load):
    loaded, encoded = load("none")
    method = METHOD.model_copy(update={"batch_size": 64})
    train_adapter(loaded, loaded.attach(method, 0), encoded * 40, method, 0, 1)
    assert loaded.training_tokens == GPU_TOKEN_BUDGET, "a tiny model's minibatches are bound by nothing else"


def test_a_cpu_learns_nothing(load, device):
    if device.type == "cuda":
        pytest.skip("about the CPU")
    loaded, encoded = load("none")
    parameters = loaded.attach(METHOD, 0)
    runner = GradientAccumulator(loaded, [Job(parameters, encoded, METHOD, 0, loaded.active_adapter)], None)
    assert runner.budget.tokens == CPU_TOKEN_BUDGET
    train_adapter(loaded, parameters, encoded, METHOD, 0, 1)
    assert loaded.training_tokens is None


def training_of(loaded, encoded, methods, graphs: bool):
    """Losses of each adapter, trained together for six steps, and whether passes were replayed."""
    loaded.graphs = graphs
    jobs = [
        Job(loaded.attach(method, i, f"a{i}"), encoded[i:], method, i, f"a{i}", 6) for i, method in enumerate(methods)
    ]
    results = train_adapters(loaded, jobs)
    for job in jobs:
        loaded.detach(job.name)
    return [[step.loss for step in result.steps] for result in results], {r.metrics.graphed for r in results}


@ON_GPU
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("num_adapters", [1, 3])
def test_replays_of_cuda_graphs_train_as_passes_that_are_launched(load, quantization, num_adapters):
    loaded, encoded = load(quantization)
    methods = [METHOD, METHOD.model_copy(update={"lora_r": 3, "lora_dropout": 0.0}), METHOD][:num_adapters]
    expected, launched = training_of(loaded, encoded, methods, graphs=False)
    found, replayed = training_of(loaded, encoded, methods, graphs=True)
    assert (launched, replayed) == ({False}, {True})
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-2)


@ON_GPU
@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_adapter_that_is_no_number_changes_no_other(load, quantization, when):
    """Where its passes are launched, and in step 3, where a graph replays them."""
    loaded, encoded = load(quantization)
    losses = []
    for ruined in (False, True):
        jobs = [Job(loaded.attach(METHOD, i, f"a{i}"), encoded, METHOD, i, f"a{i}") for i in range(3)]
        runner = GradientAccumulator(loaded, jobs, None)
        loaded.model.train()
        with runner.ready():
            for k in range(4):
                for p in jobs[1].parameters if ruined and k == when else ():
                    p.detach().fill_(float("nan"))
                steps = runner.backward({i: (k, range(8)) for i in range(3)})
                norms = [float(torch.cat([p.grad.flatten() for p in jobs[i].parameters]).norm()) for i in (0, 2)]
        losses.append([float(steps[i].loss) for i in (0, 2)] + norms)
        runner.restore()
        for job in jobs:
            loaded.detach(job.name)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@ON_GPU
@pytest.mark.parametrize("window", [None, 20])
def test_attention_at_once_is_that_of_block_by_block(device, window):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 96, 64, device=device).bfloat16() for heads in (8, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    lengths = (40, 7, 49)
    ends = torch.tensor([0, 40, 47, 96, 96], dtype=torch.int32, device=device)
    options = {"sliding_window": window, "scaling": 0.1}
    at_once, _ = attend_in_blocks(module, query, key, value, None, blocks=Blocks(ends, 64), **options)
    halves = [t.float() for t in (query, key, value)]  # in float32, block by block
    expected, _ = attend_in_blocks(module, *halves, None, blocks=Blocks(ends, 64, lengths), **options)
    torch.testing.assert_close(at_once.float(), expected, atol=2e-2, rtol=2e-2)


@ON_GPU
@pytest.mark.parametrize("is_captured", [False, True])
def test_attention_behind_prefixes_at_once_is_that_of_block_by_block(device, is_captured):
    """Captured passes have empty blocks, prefixes without rows, and room behind the prefixes."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    prefixes, rows, lengths = (0, 30, 60, 90), (0, 47, 47, 96), (40, 7, 49)
    spans = ((0, 30), (0, 30), (60, 90))
    query, *own = (torch.randn(1, heads, 96, 64, device=device).bfloat16() for heads in (8, 2, 2))
    before = [torch.randn(1, 2, 90, 64, device=device).bfloat16() for _ in range(2)]

    def attend(is_at_once: bool) -> torch.Tensor:
        kept = KeptKeys(128 if is_at_once and is_captured else None)
        kept.put(module, *(t if is_at_once else t.float() for t in before))
        ends = [torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (prefixes, rows)]
        behind = Behind(kept, *ends, 90, 200, None if is_captured and is_at_once else spans)
        empty = (96,) * 3 if is_captured and is_at_once else ()
        ends_of_blocks = torch.tensor([0, 40, 47, 96, *empty], dtype=torch.int32, device=device)
        blocks = Blocks(ends_of_blocks, 49, None if empty else lengths)
        given = [t if is_at_once else t.float() for t in (query, *own)]
        return attend_in_blocks(module, *given, None, blocks=blocks, behind=behind, scaling=0.1)[0].float()

    torch.testing.assert_close(attend(True), attend(False), atol=2e-2, rtol=2e-2)


PREFIX = [3 + 7 * i % 90 for i in range(23)]
TEXTS = [[5 + (7 * i + k) % 90 for k in range(n)] for i, n in enumerate((12, 3, 40, 25))]
CANDIDATES = [10, 30, 50, 70]


def logprobs_alone(loaded, prefix, adapter: str | None) -> torch.Tensor:
    """Of the candidates behind one text after another, (texts, 4), by PEFT's own forward pass."""
    if adapter is not None:
        loaded.activate(adapter)
    found = []
    base = loaded.base() if adapter is None else contextlib.nullcontext()
    with inference(loaded.model), base, loaded.forward_autocast():
        for text in TEXTS:
            ids = torch.tensor([[*prefix, *text]], device=loaded.device)
            logits = loaded.model(input_ids=ids, use_cache=False).logits[0, -1]
            found.append(logits.float().log_softmax(-1)[CANDIDATES])
    return torch.stack(found).cpu()


def logprobs_together(loaded, passes, prefix, adapters) -> list[torch.Tensor]:
    """The same of each adapter, in a pass of all texts of all of them; after passes of other orders."""
    names = [name for name in adapters if name is not None]
    base = loaded.base() if adapters == [None] else contextlib.nullcontext()
    with inference(loaded.model), base, passes.ready(names, packed=True, longest_prefix=len(prefix)):
        for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 0, 1, 3)):
            pairs = [(i, name) for i in order for name in adapters]
            rows = [Row(TEXTS[i], CANDIDATES, passes.slot_of(name)) for i, name in pairs]
            found = dict(zip(pairs, passes.run(rows, prefix).read(), strict=True))
    return [torch.tensor([found[i, name] for i in range(len(TEXTS))]) for name in adapters]


@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("adapters", [[None], ["a"], ["b", None, "a"]], ids=str)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_candidates_of_passes_are_those_of_each_text_alone(load, quantization, adapters, prefix):
    """On a GPU of captured ones. Half precision moves them by 0.01, an adapter by 0.08 and more."""
    loaded, _ = load(quantization)
    attach_random(loaded, 1, "a", lora_r=4, lora_alpha=16)
    attach_random(loaded, 2, "b", lora_r=8, lora_alpha=8, target_modules=("q_proj", "down_proj"))
    passes = CandidatePasses(loaded, 0 if adapters == [None] else len(adapters), capture_of(loaded))
    found = logprobs_together(loaded, passes, prefix, adapters)
    exact = loaded.device.type == "cpu"
    for mine, adapter in zip(found, adapters, strict=True):
        expected = logprobs_alone(loaded, prefix, adapter)
        torch.testing.assert_close(mine, expected, atol=2e-5 if exact else 0.03, rtol=0)
    if not exact:
        by_group = len(adapters) > 1 and not may_group(torch.bfloat16, loaded.device)
        assert passes.graphed.num_replayed == (0 if by_group else 1)


def test_questions_between_trainings_are_asked_of_the_adapter_that_is_there(load):
    loaded, encoded = load("none")
    passes = CandidatePasses(loaded, 1, capture_of(loaded))
    exact = loaded.device.type == "cpu"
    for seed in range(3):
        train_adapter(loaded, loaded.attach(METHOD, seed), encoded, METHOD, seed, 3)
        (found,) = logprobs_together(loaded, passes, PREFIX, ["default"])
        expected = logprobs_alone(loaded, PREFIX, "default")
        torch.testing.assert_close(found, expected, atol=2e-5 if exact else 0.03, rtol=0)
        (of_base,) = logprobs_together(loaded, CandidatePasses(loaded, 0, None), PREFIX, [None])
        torch.testing.assert_close(of_base, logprobs_alone(loaded, PREFIX, None), atol=2e-5 if exact else 0.03, rtol=0)
        loaded.detach()


def test_a_callers_model_in_float32_answers_in_float32(device):
    """With an adapter, too: as lm-evaluation-harness has it, to 1e-3."""
    model = make_model().requires_grad_(False).to(device)
    loaded = as_loaded(model, make_tokenizer())
    attach_random(loaded, 1, "a")
    assert loaded.forward_dtype == torch.float32
    for adapters in ([None], ["a"]):
        passes = CandidatePasses(loaded, 0 if adapters == [None] else 1, None)
        (found,) = logprobs_together(loaded, passes, PREFIX, adapters)
        torch.testing.assert_close(found, logprobs_alone(loaded, PREFIX, adapters[0]), atol=1e-4, rtol=0)


@ON_GPU
def test_a_probe_is_captured_and_measures_what_a_cpu_measures(load):
    gradients = []
    for where in (torch.device("cuda"), torch.device("cpu")):
        loaded, encoded = load("none", where)
        parameters = loaded.attach(METHOD, 0)
        observer = Recorder(loaded)
        train_adapter(loaded, parameters, encoded, METHOD, 0, 4, observer)
        gradients.append(torch.stack([g.cpu() for g in observer.gradients]))
        loaded.detach()
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert float(difference) < 0.1, "bfloat16 beside float32"


@ON_GPU
def test_fp8_trains_on_a_card_that_has_it(load):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply fp8")
    loaded, encoded = load("fp8")
    before = loaded.logits_hash()
    (losses,), graphed = training_of(loaded, encoded, [METHOD], graphs=True)
    assert graphed == {True}
    assert losses[-1] < losses[0]
    assert loaded.logits_hash() == before
