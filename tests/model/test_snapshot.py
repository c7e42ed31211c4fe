"""A model is what it was once its snapshot is restored, whatever was done to it."""

from __future__ import annotations

import torch

from raylora.model.snapshot import Snapshot
from tests.helpers.adapters import logits, make_qwen2, parts


def test_everything_is_put_back():
    model = make_qwen2()
    before, base = parts(model), logits(model)
    snapshot = Snapshot(model, {"model.norm.weight"})
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight.data = projection.weight.data + 1
    projection.register_forward_hook(lambda *_: None)
    model.lm_head = torch.nn.Linear(64, len(model.lm_head.weight), bias=False)
    model.config.num_hidden_layers = 7
    model.config.tie_word_embeddings = False
    snapshot.restore()
    assert parts(model) == before
    assert torch.equal(logits(model), base)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_snapshot_copies_no_weight_that_it_need_not():
    model = make_qwen2()
    snapshot = Snapshot(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    changed = logits(model)
    snapshot.restore()
    assert torch.equal(logits(model), changed), "in place, and not said beforehand"
