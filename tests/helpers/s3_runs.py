"""Runs of a small chunk whose data, questions and results lie on a real S3 server, on machines of separate caches."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raylora.mmlu.question_set import DEMO_QUESTIONS
from tests.helpers.chunks import OPTIONS, write_dataset
from tests.helpers.objects import BUCKET, Objects
from tests.helpers.store_proxy import StoreProxy

OUT = "out/chunk_1"
"""Where the results of a run with ``options_on_s3`` lie in the bucket."""


def put_chunk(objects: Objects, folder: Path, num_datasets: int) -> None:
    """The questions and ``chunk_1``, which stays in ``folder`` as well."""
    for i in range(num_datasets):
        path = write_dataset(folder / "chunk_1", f"data_{i}", offset=i)
        objects.put(f"data/chunk_1/{path.name}", path.read_bytes())
    objects.put("mmlu/questions.json", DEMO_QUESTIONS.read_bytes())


def options_on_s3(model: Path) -> dict[str, Any]:
    place = f"s3://{BUCKET}"
    return {
        **OPTIONS, "model": str(model), "mmlu": f"{place}/mmlu/questions.json", "data_root": f"{place}/data",
        "output": f"{place}/out",
    }  # fmt: skip


@contextmanager
def on_machine(folder: Path) -> Iterator[Path]:
    """A machine is told from another one by what it keeps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLORA_CACHE", str(folder))
        yield folder


def only_process(words: Sequence[str], machine: Path, **kwargs: Any) -> subprocess.Popen[Any]:
    """A command on such a machine."""
    environment = {**os.environ, "RAYLORA_CACHE": str(machine)}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)


@contextmanager
def behind_proxy() -> Iterator[StoreProxy]:
    """Between the server and all that is opened inside: faults can be injected."""
    s3fs = pytest.importorskip("s3fs")
    with StoreProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()  # instances keep the address that they were made with
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


def wait_for(condition: Callable[[], Any]) -> None:
    for _ in range(1800):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError
