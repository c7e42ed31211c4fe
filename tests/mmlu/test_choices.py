"""Shared prefixes: a faster way that must not move a number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from raylora.mmlu import choices
from raylora.mmlu.scoring import evaluate
from raylora.model.adapters import LoadedModel
from tests.helpers.adapters import attach_random
from tests.helpers.graphs import RecordedGraphs
from tests.helpers.questions import LOGPROBS, ask
from tests.helpers.tiny import make_model

TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip


def plain(model, encoded) -> np.ndarray:
    """One question at a time, all of it, no cache."""
    rows = []
    for e in encoded:
        with torch.inference_mode():
            logprobs = model(input_ids=torch.tensor([e.context_ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        rows.append([float(logprobs[c[0]]) for c in e.continuations])
    return np.array(rows)


def other_model(name: str, tokenizer):
    torch.manual_seed(0)
    vocabulary = {"vocab_size": len(tokenizer)}
    configs = {
        "mistral": lambda: transformers.MistralConfig(**TINY, **vocabulary, sliding_window=16),
        "gemma3": lambda: transformers.Gemma3TextConfig(**TINY, **vocabulary, sliding_window=24),
        "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in TINY.items() if k != "head_dim"}, **vocabulary),
        "mamba": lambda: transformers.MambaConfig(**vocabulary, hidden_size=64, num_hidden_layers=2, pad_token_id=0),
    }
    return transformers.AutoModelForCausalLM.from_config(configs[name]()).eval()


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen2"])
@pytest.mark.parametrize("token_budget", [64, 200])
def test_a_shared_prefix_moves_no_number(name, tokenizer, encoded, token_budget):
    """Sliding windows shorter than the prefix among them."""
    model = other_model(name, tokenizer)
    score = ask(model, tokenizer, encoded, token_budget=token_budget)
    assert score.info["num_shared_prefixes"] == 2, score.info
    assert score.info["num_tokens_spared"] > 0.3 * score.info["num_tokens"]
    np.testing.assert_allclose(score.questions[LOGPROBS].to_numpy(), plain(model, encoded), atol=2e-5)


def test_a_model_without_keys_and_values_falls_back_and_says_so(tokenizer, encoded):
    model = other_model("mamba", tokenizer)
    score = ask(model, tokenizer, encoded, token_budget=200)
    assert score.info["num_shared_prefixes"] == 0
    assert "cannot be packed" in score.info["no_prefix_because"]
    np.testing.assert_allclose(score.questions[LOGPROBS].to_numpy(), plain(model, encoded), atol=2e-5)


def test_a_model_that_answers_differently_behind_a_prefix_is_found_out(tokenizer, encoded):
    """Such as code from a hub that counts positions in its own way."""
    model = make_model()

    def count_anew(module, args, kwargs):
        positions = kwargs.get("position_ids")
        if positions is not None and int(positions[0, 0]):
            kwargs["position_ids"] = positions + 40
        return args, kwargs

    handle = model.register_forward_pre_hook(count_anew, with_kwargs=True)
    score = ask(model, tokenizer, encoded, token_budget=200)
    handle.remove()
    assert "differently" in score.info["no_prefix_because"]
    np.testing.assert_allclose(score.questions[LOGPROBS].to_numpy(), plain(model, encoded), atol=2e-5)


def test_layers_that_share_an_attention_module_share_no_prefix(tokenizer, encoded):
    model = make_model()
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    score = ask(model, tokenizer, encoded, token_budget=200)
    assert "share an attention module" in score.info["no_prefix_because"]
    np.testing.assert_allclose(score.questions[LOGPROBS].to_numpy(), plain(model, encoded), atol=2e-5)


@pytest.fixture
def graphs(monkeypatch) -> RecordedGraphs:
    """What captures passes, as on a GPU."""
    graphs = RecordedGraphs()
    monkeypatch.setattr(choices, "capture_of", lambda loaded: graphs)
    monkeypatch.setattr(choices, "has_flash", lambda device, dtype: True)
    return graphs


def logprobs_of(loaded, encoded) -> np.ndarray:
    return evaluate(loaded, encoded, token_budget=200).questions[LOGPROBS].to_numpy()


def test_adapters_of_a_caller_are_never_answered_for_by_what_was_captured_of_others(graphs, tokenizer, encoded):
    """They act in PEFT's own forward pass, of which a capture has the adapter of that time."""
    from peft import LoraConfig, get_peft_model

    model = make_model()
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = get_peft_model(model, config, "a")
    theirs.add_adapter("b", config)
    loaded, found = LoadedModel(model, tokenizer, "tiny", "none"), []
    for name in ("a", "b", "a"):
        theirs.set_adapter(name)
        found.append(logprobs_of(loaded, encoded))
        np.testing.assert_allclose(found[-1], plain(model, encoded), atol=2e-5)
    with theirs.disable_adapter():
        np.testing.assert_allclose(logprobs_of(loaded, encoded), plain(model, encoded), atol=2e-5)
    assert np.abs(found[0] - found[1]).max() > 0.01
    assert graphs.num_replays > 0


def test_the_next_adapter_replays_what_was_captured_of_the_last_one(graphs, monkeypatch, tokenizer, encoded):
    loaded = LoadedModel(make_model(), tokenizer, "tiny", "none")
    num_captures = []
    for seed in (1, 2, 3):
        attach_random(loaded, seed, "default")
        np.testing.assert_allclose(logprobs_of(loaded, encoded), plain(loaded.model, encoded), atol=2e-5)
        with loaded.base():
            np.testing.assert_allclose(logprobs_of(loaded, encoded), plain(loaded.model, encoded), atol=2e-5)
        loaded.detach()
        num_captures.append(graphs.num_captures)
    assert num_captures[0] == num_captures[-1] > 0
    monkeypatch.setattr(choices, "capture_of", lambda loaded: None)  # as where ``graphs`` is switched off
    before = graphs.num_replays
    attach_random(loaded, 4, "default")
    np.testing.assert_allclose(logprobs_of(loaded, encoded), plain(loaded.model, encoded), atol=2e-5)
    assert graphs.num_replays == before


def test_memory_that_runs_out_in_the_trial_of_a_prefix_costs_what_was_captured_and_no_answer(
    graphs, tokenizer, encoded
):
    loaded = LoadedModel(make_model(), tokenizer, "tiny", "none")
    expected, refused = logprobs_of(loaded, encoded), []

    def refuse(module, args, kwargs):
        if not refused:
            refused.append(kwargs["input_ids"].shape)
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
    score = evaluate(loaded, encoded, token_budget=200)
    hook.remove()
    assert len(refused) == 1
    assert score.info["num_shared_prefixes"] == 2
    np.testing.assert_allclose(score.questions[LOGPROBS].to_numpy(), expected, atol=2e-5)


def test_each_adapter_has_a_prefix_of_its_own(tokenizer, encoded):
    loaded = LoadedModel(make_model(), tokenizer, "tiny", "none")
    found = []
    for seed in (1, 2):
        attach_random(loaded, seed, "default")
        score = evaluate(loaded, encoded, token_budget=200)
        assert score.info["num_shared_prefixes"] == 2
        np.testing.assert_allclose(score.questions[LOGPROBS].to_numpy(), plain(loaded.model, encoded), atol=2e-5)
        found.append(score.questions[LOGPROBS].to_numpy())
        loaded.detach()
    assert np.abs(found[0] - found[1]).max() > 0.01
