"""Records, features of them, and what holds two rows of features against each other."""

from __future__ import annotations

import random

import pytest
import torch

from raylora.config.method import Method
from raylora.config.options import FeatureOptions
from raylora.features.pipeline import extract_features
from raylora.features.static import as_dataset

WORDS = ["river", "mountain", "answer", "photosynthesis", "the", "of", "blue", "eleven", "understanding", "cat", "it"]
TIMES = ("text_seconds", "static_seconds", "probe_seconds")


def make_records(num: int = 12, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    sentence = lambda n: " ".join(rng.choice(WORDS) for _ in range(n)).capitalize() + "."  # noqa: E731
    return [
        {"question": sentence(6)[:-1] + "?", "answer": f"{sentence(5)} {sentence(4)}", "context": sentence(9)}
        for _ in range(num)
    ]


def features_of(loaded, records, probe_steps=2, **method):
    options = FeatureOptions(sample_size=0, probe_steps=probe_steps)
    method = Method(batch_size=2, gradient_accumulation=1, learning_rate=1e-3, max_length=256).model_copy(update=method)
    return extract_features(loaded, as_dataset(records), method, options, 512, seed=0)


def assert_same_row(one, two, tolerance=1e-4):
    for name in set(one) - set(TIMES):
        if isinstance(one[name], float):
            assert two[name] == pytest.approx(one[name], rel=tolerance, abs=1e-6), name
        else:
            assert two[name] == one[name], name


def token_losses(model, ids):
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return [0.0, *torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none").tolist()]
