"""Packed rows, losses in chunks, and adapters trained together: each the same as the plain way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylora.config import ModelOptions
from raylora.data.encoding import IGNORE_INDEX, encode_example, labels_of
from raylora.data.minibatch import pack_rows, pad_left
from raylora.errors import TrainingDivergedError, UserError
from raylora.model import forward, memory
from raylora.model.adapters import LoadedModel
from raylora.model.forward import head_is_plain, token_losses
from raylora.model.loading import load_model
from raylora.model.memory import packs_by_budget
from raylora.model.packing import attention_in_blocks, can_pack, window_of
from raylora.training.gradients import GradientAccumulator, Job
from raylora.training.loop import adapters_a_pass, train_adapter, train_adapters
from tests.helpers.tiny import make_model, make_tokenizer
from tests.training.test_loop import METHOD, make_examples

DROPOUT = METHOD.model_copy(update={"lora_dropout": 0.1})


@pytest.fixture
def loaded(tokenizer):
    return LoadedModel(make_model().requires_grad_(False), tokenizer, "tiny", "none")


@pytest.fixture
def encoded(tokenizer):
    return [encode_example(tokenizer, e, 256) for e in make_examples(16)]


def gradient_of(loaded, encoded, method, packed, budget=10**6):
    """Gradient of one step over all examples, from an adapter that is not zero."""
    parameters = loaded.attach(method, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn_like(p) * 0.1)
    step = GradientAccumulator(loaded, [Job(parameters, encoded, method, 0)], None)
    assert step.packed
    step.packed, step.budget.tokens = packed, budget
    loaded.model.train()
    try:
        with step.ready():
            found = step.backward({0: range(len(encoded))}, 0)[0]
        return found.loss, [p.grad.clone() for p in parameters], step.fullest
    finally:
        step.restore()
        loaded.detach()


@pytest.mark.parametrize("train_on", ["answer", "all"])
@pytest.mark.parametrize("budget", [300, 10**6])
def test_a_packed_and_a_padded_step_have_the_same_gradient_dropout_included(loaded, encoded, train_on, budget):
    method = DROPOUT.model_copy(update={"train_on": train_on})
    loss, gradients, fullest = gradient_of(loaded, encoded, method, packed=True, budget=budget)
    expected, padded, _ = gradient_of(loaded, encoded, method, packed=False)
    assert fullest == 16 if budget > 300 else 1 < fullest < 16
    assert loss == pytest.approx(expected, abs=1e-5)
    for a, b in zip(gradients, padded, strict=True):
        assert float(b.abs().max()) > 1e-4
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_gradients_of_chunks_are_those_of_all_logits_at_once(loaded, encoded, monkeypatch):
    monkeypatch.setattr(forward, "CPU_LOGITS", 3 * len(make_tokenizer()))
    chunked = gradient_of(loaded, encoded, METHOD, packed=True)
    loaded._allowed[head_is_plain] = False
    whole = gradient_of(loaded, encoded, METHOD, packed=True)
    assert chunked[0] == pytest.approx(whole[0], abs=1e-6)
    for a, b in zip(chunked[1], whole[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_weights_on_single_tokens_reach_their_own_gradients(loaded, encoded):
    """The mean over a row is not the only thing that may be asked of losses."""
    (p, *_), e = loaded.attach(METHOD, 0), encoded[3]
    with torch.no_grad():
        for q in loaded.attach(METHOD, 1, "other"):
            q.copy_(torch.randn_like(q) * 0.1)
            p = q
    batch = pad_left([e.input_ids], 0, "cpu", [labels_of(e, "answer")])
    found = token_losses(loaded, batch)
    weights = torch.arange(len(found)) + 1.0
    (found * weights).sum().backward()
    gradient = p.grad.clone()
    p.grad = None
    logits = loaded.model(input_ids=batch.input_ids).logits[0, :-1]
    labels = torch.tensor(labels_of(e, "answer"))
    wanted = labels[1:] != IGNORE_INDEX
    assert batch.targets.tolist() == labels[1:][wanted].tolist()
    plain = torch.nn.functional.cross_entropy(logits[wanted], labels[1:][wanted], reduction="none")
    (plain * weights).sum().backward()
    torch.testing.assert_close(gradient, p.grad, atol=1e-5, rtol=1e-4)


# What a model allows


class Scaled(torch.nn.Module):
    """A model whose logits are bent after the head, as Gemma's and Cohere's are."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config
        self.device = model.device

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **kwargs):
        output = self.inner(**kwargs)
        output.logits = torch.tanh(output.logits / 2) * 2
        return output


def test_logits_that_are_bent_after_the_head_are_seen():
    model = make_model()
    assert head_is_plain(model)
    assert not head_is_plain(Scaled(model))


def family(name):
    """Tiny models of other families, at random."""
    import transformers as t

    torch.manual_seed(0)
    size = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size["num_attention_heads"] = 4
    return {
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**size, num_key_value_heads=2)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**size, num_key_value_heads=2, head_dim=8)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**size, num_key_value_heads=2, sliding_window=64)),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**size, pad_token_id=0)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**size, num_key_value_heads=2, head_dim=8)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=4)),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(
                vocab_size=500, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                word_embed_proj_dim=32,
            )
        ),
        "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=500, hidden_size=32, n_layer=2, n_head=4)),
        "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=500, hidden_size=32, num_hidden_layers=2)),
    }[name]().eval()  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "phi3", "gemma", "gpt2", "opt", "bloom", "mamba"])
def test_a_model_that_may_be_packed_says_the_same_of_each_example(name):
    model = family(name)
    rows = [[(17 * i + k) % 500 for i in range(n)] for n, k in ((12, 1), (30, 7), (5, 2))]
    if name in {"qwen2", "qwen3", "mistral", "phi3", "gemma"}:
        assert can_pack(model), "the families that are trained most should not lose their speed"
    if not can_pack(model):
        return
    before = model.config._attn_implementation
    with torch.inference_mode(), attention_in_blocks(model):
        packed = model(**pack_rows(rows, "cpu").model_inputs(), use_cache=False).logits[0].split([12, 30, 5])
    assert model.config._attn_implementation == before
    for row, logits in zip(rows, packed, strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(logits, model(input_ids=torch.tensor([row])).logits[0], atol=1e-4, rtol=1e-3)


def test_positions_that_run_on_forbid_packing():
    class RunsOn(torch.nn.Module):
        """Counts positions itself."""

        def __init__(self, model):
            super().__init__()
            self.model, self.config, self.device = model, model.config, model.device

        def forward(self, input_ids, position_ids, **kwargs):
            shift = 0 if "attention_mask" in kwargs else torch.arange(input_ids.shape[1]) ** 2
            return self.model(input_ids=input_ids, position_ids=position_ids + shift, **kwargs)

    assert can_pack(make_model())
    assert not can_pack(RunsOn(make_model()))


def test_a_mask_over_the_whole_row_forbids_packing(monkeypatch):
    """A block that sees the one before it: torch's attention over everything, in place of block by block."""

    def attend_to_everything(module, query, key, value, attention_mask, *, block_lengths=None, **kwargs):
        return forward.sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)

    monkeypatch.setitem(forward.AttentionInterface._global_mapping, forward.BLOCKS, attend_to_everything)
    assert not can_pack(make_model())


def test_models_that_cannot_be_packed_are_trained_with_padding(tokenizer, encoded):
    results = []
    for implementation in ("sdpa", "eager"):
        model = make_model().requires_grad_(False)
        model.set_attn_implementation(implementation)
        loaded = LoadedModel(model, tokenizer, "tiny", "none")
        parameters = loaded.attach(DROPOUT, 0)
        results.append((train_adapter(loaded, parameters, encoded, DROPOUT, 0, 3), parameters))
    (packed, mine), (padded, theirs) = results
    assert (packed.metrics.packed, padded.metrics.packed) == (True, False)
    assert [s.loss for s in packed.steps] == pytest.approx([s.loss for s in padded.steps], abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, theirs, strict=True))


def test_examples_longer_than_the_window_are_padded(tokenizer, encoded):
    model = family("mistral").requires_grad_(False)
    model.resize_token_embeddings(len(tokenizer))
    loaded = LoadedModel(model, tokenizer, "mistral", "none")
    assert window_of(model) == 64
    longest = max(map(len, encoded))
    result = train_adapter(loaded, loaded.attach(METHOD, 0), encoded, METHOD, 0, 1)
    assert result.metrics.packed == (longest <= 64)
    loaded.detach()
    short = [e for e in encoded if len(e) <= 64]
    if short:
        assert train_adapter(loaded, loaded.attach(METHOD, 0), short, METHOD, 0, 1).metrics.packed


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_packs_hold_everything_once_and_keep_to_the_budget(lengths, budget):
    packs = list(packs_by_budget(range(len(lengths)), lambda i: lengths[i], budget))
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in pack) for pack in packs]
    assert all(size <= budget or len(pack) == 1 for size, pack in zip(sizes, packs, strict=True))
    assert sizes == sorted(sizes, reverse=True)
    assert sum(2 * size <= budget for size in sizes) <= 1, "two half-empty packs would have been one"


# Several adapters


def jobs_of(loaded, encoded):
    """Three adapters that differ in everything that may differ."""
    methods = [
        DROPOUT,
        DROPOUT.model_copy(update={"lora_r": 3, "lora_alpha": 5, "learning_rate": 3e-3, "batch_size": 2}),
        DROPOUT.model_copy(update={"lora_dropout": 0.0, "target_modules": ("q_proj", "down_proj"), "train_on": "all"}),
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
    assert adapters_a_pass(loaded, jobs[0]) == 1, "on a CPU nothing is won"
    results = train_adapters(loaded, jobs)
    for job, result, (solo, weights) in zip(jobs, results, expected, strict=True):
        assert [s.loss for s in result.steps] == pytest.approx([s.loss for s in solo.steps], abs=1e-5)
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


def test_an_adapter_that_diverges_stops_alone(loaded, encoded):
    wild = METHOD.model_copy(update={"learning_rate": 9.0, "max_grad_norm": 1e30, "lora_alpha": 1e30})
    expected, weights = alone(loaded, "a", METHOD, encoded, 4, 0)
    jobs = [Job(loaded.attach(m, 0, name), encoded, m, 0, name, 4) for name, m in (("wild", wild), ("a", METHOD))]
    diverged, result = train_adapters(loaded, jobs)
    assert isinstance(diverged, TrainingDivergedError)
    assert [s.loss for s in result.steps] == pytest.approx([s.loss for s in expected.steps], abs=1e-5)
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
    with pytest.raises(UserError, match="--target-modules"):
        train_adapters(loaded, jobs)
    assert len(train_adapter(loaded, jobs[1].parameters, encoded, method, 0, 1).steps) == 1


def assert_packed_agrees(loaded, encoded, of_loss: float, of_gradient: float) -> None:
    """One step packed and padded: the loss and the whole gradient, each within its relative tolerance."""
    loss, gradients, _ = gradient_of(loaded, encoded, DROPOUT, packed=True)
    expected, padded, _ = gradient_of(loaded, encoded, DROPOUT, packed=False)
    assert loss == pytest.approx(expected, rel=of_loss)
    ours, theirs = (torch.cat([g.flatten() for g in gs]) for gs in (gradients, padded))
    assert float((ours - theirs).norm() / theirs.norm()) < of_gradient


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantized_bases_are_trained_packed(tiny_model_folder, quantization):
    """A quantized product depends a little on its neighbours: the same within a percent, and it learns."""
    loaded = load_model(ModelOptions(model=str(tiny_model_folder), quantization=quantization), torch.device("cpu"))
    encoded = [encode_example(loaded.tokenizer, e, 256) for e in make_examples(16)]
    assert_packed_agrees(loaded, encoded, of_loss=1e-3, of_gradient=0.02)
    result = train_adapter(loaded, loaded.attach(DROPOUT, 0), encoded, DROPOUT, 0, 8)
    assert result.metrics.packed
    assert result.steps[-1].loss < result.steps[0].loss


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
    assert adapters_a_pass(loaded, job) > 3, "a tiny adapter's steps fill no minibatch"
