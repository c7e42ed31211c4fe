"""Makes real worker processes fail where a test asks for it; every Python process that has it on its path runs it.

``RAYLORA_FAULTS`` names a folder with ``faults.json``: a list of ``{stage, what, times}``, some for certain
``datasets`` or a ``gpu``.
Nothing is replaced: raylora's own functions run, and are ended where a real fault would end them.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = os.environ.get("RAYLORA_FAULTS")
now = {"dataset": ""}


def faults(stage: str) -> list[tuple[int, dict[str, Any]]]:
    path = Path(str(FOLDER)) / "faults.json"
    found = json.loads(path.read_text()) if path.is_file() else []
    return [
        (i, f)
        for i, f in enumerate(found)
        if f["stage"] == stage
        and now["dataset"] in f.get("datasets", [now["dataset"]])
        and f.get("gpu") in (None, gpu())
    ]


def gpu() -> str:
    import ray

    return ",".join(ray.get_runtime_context().get_accelerator_ids().get("GPU", []))


def may_fire(number: int, times: int) -> bool:
    for k in range(times):
        try:
            (Path(str(FOLDER)) / f"fired-{number}-{k}").open("x").close()
        except FileExistsError:
            continue
        return True
    return False


def reach(stage: str) -> None:
    """A place where a fault may strike."""
    for number, fault in faults(stage):
        if may_fire(number, fault.get("times", 1)):
            strike(fault["what"])


def strike(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "hang":
        time.sleep(3600)
    elif what == "raise":
        raise RuntimeError("something went wrong\nwith two lines of text")
    elif what == "gpu memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory")
    elif what == "host memory":
        held = []
        while True:
            held.append(b"x" * (256 << 20))
            time.sleep(0.05)


def around_experiments(module: Any) -> None:
    run_experiment = module.run_experiment

    @functools.wraps(run_experiment)
    def run(bench: Any, experiment: Any, progress: Any) -> Any:
        def told(stage: str, done: int, total: int) -> None:
            progress(stage, done, total)
            reach(stage)

        now["dataset"] = experiment.dataset
        reach("begin")
        return run_experiment(bench, experiment, told)

    module.run_experiment = run


def around_models(module: Any) -> None:
    load_model = module.load_model

    def load(*args: Any, **kwargs: Any) -> Any:
        reach("model")
        return load_model(*args, **kwargs)

    module.load_model = load


def around_store(module: Any) -> None:
    write_text = module.write_text

    def write(path: Path, text: str) -> None:
        if path.name == "result.json":
            reach("write")
            path.with_name(".partial-torn-result.json").write_text(text[:20])
            reach("half written")
            path.with_name(".partial-torn-result.json").unlink()
        write_text(path, text)

    module.write_text = write


def around_batches(module: Any) -> None:
    """An allocation that fails for every minibatch of more examples than one."""
    token_losses = module.token_losses

    def losses(loaded: Any, batch: Any) -> Any:
        if max(len(batch.input_ids), len(batch.blocks.ends) - 1 if batch.blocks else 0) > 1:
            reach("minibatch")
        return token_losses(loaded, batch)

    module.token_losses = losses


def around_tables(module: Any) -> None:
    """In the sink's process alone; the command writes the same tables at its end."""
    write_if_due, write_file = module.RunTables.write_if_due, module.Store.write_file

    def write_by_sink(self: Any, name: str, write: Any) -> None:
        def write_and_reach(partial: Path) -> None:
            write(partial)
            reach(f"{name} half written")

        write_file(self, name, write_and_reach)

    def write_if_due_and_reach(self: Any, rows: Any) -> None:
        reach("sink")
        module.Store.write_file = write_by_sink
        write_if_due(self, rows)

    module.RunTables.write_if_due = write_if_due_and_reach


class JumpingClock:
    """The module ``time`` with the seconds of the file ``clock`` added to its ``time()``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time(self) -> float:
        try:
            return time.time() + float((Path(str(FOLDER)) / "clock").read_text())
        except (OSError, ValueError):
            return time.time()


def around_clock(module: Any) -> None:
    module.time = JumpingClock()


PATCHES = {
    "raylora.cluster.worker": around_clock,
    "raylora.run.live_table": around_clock,
    "raylora.experiment.story": around_experiments,
    "raylora.model.loading": around_models,
    "raylora.storage.store": around_store,
    "raylora.storage.run_tables": around_tables,
    "raylora.model.forward": around_batches,
}


class AfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec
        assert spec.loader
        execute = spec.loader.exec_module

        def execute_and_patch(module: Any) -> None:
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


if FOLDER:
    sys.meta_path.insert(0, AfterImport())
