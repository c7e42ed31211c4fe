"""Shared prefixes: a faster way that must not move a number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from raylora.config import Method
from raylora.mmlu.batches import common_prefix
from raylora.mmlu.choices import SharedPrefix, choice_logprobs, why_no_prefix
from raylora.mmlu.scoring import evaluate
from raylora.model.adapters import LoadedModel
from tests.helpers.questions import LOGPROBS
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
    score = evaluate(model, tokenizer, encoded, token_budget=token_budget)
    assert score.info["num_shared_prefixes"] == 2, score.info
    assert score.info["num_tokens_spared"] > 0.3 * score.info["num_tokens"]
    np.testing.assert_allclose(score.questions[LOGPROBS].to_numpy(), plain(model, encoded), atol=2e-5)


def test_a_model_without_keys_and_values_falls_back_and_says_so(tokenizer, encoded):
    model = other_model("mamba", tokenizer)
    score = evaluate(model, tokenizer, encoded, token_budget=200)
    assert score.info["num_shared_prefixes"] == 0
    assert "running state" in score.info["no_prefix_because"]
    np.testing.assert_allclose(score.questions[LOGPROBS].to_numpy(), plain(model, encoded), atol=2e-5)


def test_hybrid_caches_are_told_by_their_layers():
    config = transformers.Qwen3NextConfig(num_hidden_layers=4, hidden_size=64)
    model = torch.nn.Module()
    model.config = config
    assert "LinearAttentionLayer" in why_no_prefix(model)


def test_a_model_that_answers_differently_behind_a_prefix_is_found_out(tokenizer, encoded):
    """Such as code from a hub that ignores positions or past keys."""
    model = make_model()

    def forget(module, args, kwargs):
        if kwargs.get("past_key_values") is not None and "position_ids" in kwargs:
            kwargs["position_ids"] = kwargs["position_ids"] + 40
        return args, kwargs

    handle = model.register_forward_pre_hook(forget, with_kwargs=True)
    score = evaluate(model, tokenizer, encoded, token_budget=200)
    handle.remove()
    assert "differently" in score.info["no_prefix_because"]
    np.testing.assert_allclose(score.questions[LOGPROBS].to_numpy(), plain(model, encoded), atol=2e-5)


def test_a_lent_prefix_is_never_changed(tiny_model, encoded):
    subject = [e for e in encoded if e.question.subject == "anatomy"]
    length = common_prefix(subject)
    with torch.inference_mode():
        prefix = SharedPrefix(tiny_model, subject[0].context_ids[:length])
        before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.cache.layers]
        first = choice_logprobs(tiny_model, subject, 0, prefix)
        again = choice_logprobs(tiny_model, subject, 0, prefix)
    assert first == again
    for layer, (keys, values) in zip(prefix.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_each_adapter_has_a_prefix_of_its_own(tokenizer, encoded):
    loaded = LoadedModel(make_model(), tokenizer, "tiny", "none")
    found = []
    for seed in (1, 2):
        parameters = loaded.attach(Method(lora_dropout=0.0), seed)
        with torch.no_grad():
            for i, p in enumerate(parameters):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i)) * 0.1)
        score = evaluate(loaded.model, tokenizer, encoded, token_budget=200)
        assert score.info["num_shared_prefixes"] == 2
        np.testing.assert_allclose(score.questions[LOGPROBS].to_numpy(), plain(loaded.model, encoded), atol=2e-5)
        found.append(score.questions[LOGPROBS].to_numpy())
        loaded.detach()
    assert np.abs(found[0] - found[1]).max() > 0.01
