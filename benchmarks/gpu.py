"""What benchmarks/gpu.sh measures on one GPU: training and scoring in every way, and one table of all of it.

    python -m benchmarks.gpu training FOLDER --shape llama3-8b --seconds 125
    python -m benchmarks.gpu scoring FOLDER --shape llama3-8b --seconds 125
    python -m benchmarks.gpu table FOLDER
    python -m benchmarks.gpu scoring FOLDER --questions 14042 --seconds 3600    # all of MMLU

What says most comes first, as the seconds are limited: what they did not allow is not in the table. Each row is written
when it is there. Examples are those of the first file of chunk_001, cut to 256 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.end_to_end import STAGES
from benchmarks.mmlu import Shots, Way, best_harness, choose, encode, raylora_way
from benchmarks.training import cost, fastest_of_trl, run_padded, run_trl
from raylora.config.method import Method
from raylora.data.datasets import read_dataset, sample_examples
from raylora.data.encoding import EncodedExample, encode_example, labels_of
from raylora.errors import UserError, one_line
from raylora.model.adapters import LoadedModel
from raylora.records import Question, Score
from raylora.training.gradients import Job
from raylora.training.loop import TrainingResult, train_adapters

RIVALS: tuple[tuple[int, bool], ...] = ()
ROUNDS: tuple[tuple[str, tuple[tuple[int, bool], ...]], ...] = (
    ("none", ((1, True), (1, False), (8, True), (16, True))),
    ("8bit", ((1, True), (1, False), (8, True))),
    ("none", RIVALS),
    ("4bit", ((1, True), (8, True), (1, False))),
    ("fp8", ((1, True), (8, True), (1, False))),
    ("8bit", ((16, True),)),
    ("none", ((8, False), (16, False))),
    ("8bit", RIVALS),
    ("4bit", RIVALS),
    ("4bit", ((16, True),)),
    ("fp8", ((16, True),)),
)
"""Of a model that is made anew each: adapters that are trained together, and whether their passes are graphs."""
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
"""How the calls begin by which Python has the GPU run a kernel, or a whole graph of them."""
REFUSALS = (UserError, ValueError, TypeError, RuntimeError)
"""What a way may raise that this machine, or this commit, does not have. Memory that runs out, and what CUDA refuses,
cost no other row."""


@dataclass(frozen=True)
class Case:
    """Trainings of raylora that are measured together."""

    quantization: str
    adapters: int
    graphed: bool

    @property
    def name(self) -> str:
        return f"raylora, {self.adapters} adapter{'s' * (self.adapters > 1)}, {'graphed' if self.graphed else 'eager'}"


class Results:
    """Rows of a part, written to a JSON file as they come, until its seconds are over."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._deadline = path, time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._deadline

    def add(self, name: str, quantization: str, **values: Any) -> None:
        row = {"what": name, "weights": quantization, **values}
        print(row, flush=True)
        self.rows.append(row)
        self._path.write_text(json.dumps({"machine": common.machine(), "rows": self.rows}, indent=1) + "\n")

    @contextlib.contextmanager
    def refusals(self, name: str, quantization: str) -> Iterator[None]:
        """Inside, a way that this machine does not have becomes a row that says so."""
        try:
            yield
        except REFUSALS as error:
            self.add(name, quantization, note=f"refused: {one_line(error)[:160]}")


def measured(run: Callable[[], Any], device: torch.device) -> tuple[float, float, Any]:
    """Seconds of ``run``, the most GB that were held meanwhile, and what it returned."""
    found = common.measure(run, device)
    return found.seconds, found.reserved_bytes / 1e9, found.result


def count_launches(run: Callable[[int], Any], device: torch.device) -> int | None:
    """Launches of a step; None on a CPU. ``run`` is called with 1 and with 2 steps: what comes once is left out."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    counts = []
    for num_steps in (1, 2):
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            run(num_steps)
            common.synchronize(device)
        counts.append(sum(e.name.startswith(LAUNCHES) for e in profiled.events()))
    return counts[1] - counts[0]


class Trainings:
    """The training part: raylora's cases on one model after another, then its rivals."""

    def __init__(self, options: argparse.Namespace, results: Results) -> None:
        self.options, self.results = options, results
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rate = common.matrix_rate(self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.dataset = read_dataset(sorted((common.SHARED / "chunk_001").iterdir())[0])
        self.method = Method(
            num_epochs=1, max_length=256, batch_size=options.batch_size, gradient_accumulation=options.accumulation
        )

    def run(self) -> None:
        seen: set[Case] = set()
        for quantization, cases in ROUNDS:
            if quantization not in self.options.quantizations:
                continue
            if cases == RIVALS:
                self._rivals(quantization)
                continue
            # Without a GPU there are no graphs, and what is left is measured once.
            with_graphs = self.device.type == "cuda"
            chosen = [Case(quantization, min(k, self.options.most_adapters), g and with_graphs) for k, g in cases]
            fresh = [case for case in dict.fromkeys(chosen) if case not in seen]
            seen.update(fresh)
            self._ours(quantization, fresh)

    def _examples(self, loaded: LoadedModel, num_adapters: int) -> list[list[EncodedExample]]:
        """Of each adapter as many as its steps have; fewer steps for more adapters."""
        per_step = self.method.batch_size * self.method.gradient_accumulation
        each = per_step * max(1, self.options.steps // num_adapters)
        sample = sample_examples(self.dataset.examples, each * num_adapters, self.dataset.seed)
        encoded = [encode_example(loaded.tokenizer, e, self.method.max_length) for e in sample]
        return [encoded[i::num_adapters] for i in range(num_adapters)]

    def _ours(self, quantization: str, cases: Sequence[Case]) -> None:
        if self.results.is_over or not cases:
            return
        with self.results.refusals("raylora", quantization):
            loaded = common.load("demo", quantization, self.options.shape)
            for case in cases:
                if not self.results.is_over:
                    with self.results.refusals(case.name, quantization):
                        self._measure(loaded, case)
            del loaded
        common.empty()

    def _measure(self, loaded: LoadedModel, case: Case) -> None:
        loaded.graphs = case.graphed
        parts = self._examples(loaded, case.adapters)
        names = [f"adapter{i}" for i in range(case.adapters)]
        try:
            attached = [loaded.attach(self.method, 0, name) for name in names]

            def train(num_steps: int | None = None) -> list[Any]:
                made = zip(attached, parts, names, strict=True)
                return train_adapters(loaded, [Job(p, part, self.method, 0, n, num_steps) for p, part, n in made])

            train(1)  # it measures what a token takes
            # A size of a pass is captured when it comes for the second time, so the same steps twice before they are
            # measured: nearly all of a long training are replays.
            for _ in range(2 if case.graphed else 1):
                train()
            seconds, peak, trained = measured(train, self.device)
            result = next(r for r in trained if isinstance(r, TrainingResult))
            launches = count_launches(train, self.device) if case.adapters == 1 else None
        finally:
            for name in names:
                loaded.detach(name)
        note = "" if result.metrics.graphed == case.graphed else "no graphs: see the log"
        self._add(loaded, case.name, [e for part in parts for e in part], seconds, peak, launches, note)

    def _add(
        self,
        loaded: LoadedModel,
        name: str,
        examples: Sequence[EncodedExample],
        seconds: float,
        peak: float,
        launches: int | None = None,
        note: str = "",
    ) -> None:
        num_tokens = sum(map(len, examples))
        supervised = sum(label != -100 for e in examples for label in labels_of(e, self.method.train_on))
        self.results.add(
            name,
            loaded.quantization,
            **{
                "tokens/s": num_tokens / seconds,
                "share": cost(loaded, num_tokens, supervised) / seconds / self.rate,
                "kernels a pass": launches,
                "peak GB": peak,
                "seconds": seconds,
                "note": note,
            },
        )

    def _rivals(self, quantization: str) -> None:
        """TRL in the way that is fastest on a step's examples, and the Trainer, padded."""
        if self.results.is_over:
            return
        with self.results.refusals("TRL", quantization):
            model = common.build(self.options.shape, quantization).requires_grad_(False)
            tokenizer = common.load_tokenizer(common.resolve_model("demo"))
            other = LoadedModel(model, tokenizer, self.options.shape, quantization)
            (examples,) = self._examples(other, 1)
            few = examples[: self.method.batch_size * self.method.gradient_accumulation]
            best = fastest_of_trl(other, few, self.method)
            ways: dict[str, Callable[[], None]] = {
                f"TRL, {best}": lambda: run_trl(other, examples, self.method, best),
                "Trainer, padded": lambda: run_padded(other, examples, self.method),
            }
            for name, run in ways.items():
                if not self.results.is_over:
                    with self.results.refusals(name, quantization):
                        seconds, peak, _ = measured(run, self.device)
                        self._add(other, name, examples, seconds, peak)
        common.empty()


class Scorings:
    """The scoring part: raylora in each quantization, base and adapters, and lm-evaluation-harness in bfloat16."""

    def __init__(self, options: argparse.Namespace, results: Results) -> None:
        self.options, self.results = options, results
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rate = common.matrix_rate(self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        folder = common.SHARED / "mmlu"
        self.chosen: dict[int, tuple[list[Question], Shots]] = {
            0: choose(folder, options.questions, 0),
            5: choose(folder, options.shot_questions, 5, options.shot_subjects),
        }

    def run(self) -> None:
        for quantization in self.options.quantizations:
            self._on_a_model("raylora", quantization, self._ours)
            if quantization == "none":
                # A model of its own: beside what raylora keeps for its next passes, the peaks would be no rival's.
                self._on_a_model("lm-eval", quantization, self._rivals)

    def _on_a_model(self, name: str, quantization: str, measure: Callable[[LoadedModel], None]) -> None:
        if not self.results.is_over:
            with self.results.refusals(name, quantization):
                measure(common.load("demo", quantization, self.options.shape))
            common.empty()

    def _ours(self, loaded: LoadedModel) -> None:
        self._add(loaded, raylora_way(loaded, {}), 0)
        for number in (1, self.options.adapters):
            if not self.results.is_over:
                with common.random_adapters(loaded, number) as names:
                    self._add(loaded, adapters_way(loaded, names), 0, number)
        self._add(loaded, raylora_way(loaded, self.chosen[5][1]), 5)

    def _rivals(self, loaded: LoadedModel) -> None:
        for num_shots, (questions, shots) in self.chosen.items():
            if not self.results.is_over:
                with self.results.refusals(f"lm-eval, {num_shots}-shot", loaded.quantization):
                    way = best_harness(loaded, questions, shots, self.options.batch_sizes)
                    step = 1 if num_shots == 0 else max(1, len(questions) // self.options.rival_shot_questions)
                    self._add(loaded, way, num_shots, step=step)

    def _add(self, loaded: LoadedModel, way: Way, num_shots: int, passes: int = 1, step: int = 1) -> None:
        """A row of a way that is asked every ``step``-th question ``passes`` times: once by each of its adapters."""
        if self.results.is_over:
            return
        questions, shots = self.chosen[num_shots]
        questions = questions[:: step * passes]  # of several adapters each has its part of the questions' number
        name = f"{way.name}, {num_shots}-shot"
        with self.results.refusals(name, loaded.quantization):
            inputs = way.encode(questions)
            way.ask(way.encode(questions[::4]))  # warm, with sizes of batches that come again
            seconds, peak, found = measured(lambda: way.ask(inputs), self.device)
            num_tokens = passes * sum(map(len, encode(loaded, questions, shots)))
            # What a shared prefix spares is in the tokens a second, and not in the share.
            scores = found if isinstance(found, list) else [found]
            spared = sum(s.info["num_tokens_spared"] for s in scores if isinstance(s, Score))
            flops = common.forward_flops(loaded.model, num_tokens - spared, passes * len(questions))
            self.results.add(
                f"{name}, {len(questions)} questions{' each' * (passes > 1)}",
                loaded.quantization,
                **{
                    "tokens/s": num_tokens / seconds,
                    "share": flops / seconds / self.rate,
                    "peak GB": peak,
                    "seconds": seconds,
                },
            )


def adapters_way(loaded: LoadedModel, names: Sequence[str]) -> Way:
    """Attached adapters, each of which is asked all the questions."""
    name = f"raylora, {len(names)} adapter{'s' * (len(names) > 1)}"
    return Way(name, lambda q: encode(loaded, q, {}), lambda encoded: common.score_adapters(loaded, encoded, names))


def table(folder: Path) -> str:
    """All results of a folder as Markdown: the parts, what was measured in them, and the ends of failed ones' logs."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    parts = [line.split("|") for line in sorted((folder / "parts").read_text().splitlines())]
    lines = [f"# {name}, torch {torch.__version__}", "", "| part | result | seconds |", "| --- | --- | --- |"]
    lines += [f"| {' | '.join(part)} |" for part in parts]
    columns = ("what", "weights", "tokens/s", "share", "kernels a pass", "peak GB", "seconds", "note")
    lines += ["", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for file in [folder / f"{part}.json" for part in ("training", "scoring", "whole")]:
        rows = json.loads(file.read_text())["rows"] if file.is_file() else []
        lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
    for part, result, _ in parts:
        if result != "ok":
            log = (folder / f"{part}.log").read_text(errors="replace")
            lines += ["", f"## The end of {part}.log", "", "```", *log.splitlines()[-8:], "```"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def whole(folder: Path, found: Path) -> None:
    """A whole command's experiments, as ``benchmarks.end_to_end`` wrote them to ``found``, as rows of the table."""
    results = Results(folder / "whole.json", 0)
    told = json.loads(found.read_text())
    command = told["rows"][0]
    stages = ", ".join(f"{stage} {command[stage]:.1f} s" for stage in STAGES if command.get(stage) is not None)
    results.add(f"whole command, {told['title']}", "", seconds=command["seconds"], note=stages)
    for row in told["raylora, as planned and as it went"]:
        planned = f"planned {row['estimated seconds']:.1f} s and {row['estimated peak GB']:.1f} GB"
        results.add("one experiment of it", "", seconds=row["seconds"], note=planned, **{"peak GB": row["peak GB"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("training", "scoring", "whole", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(common.SHAPES), default="llama3-8b")
    parser.add_argument("--seconds", type=float, default=125)
    parser.add_argument("--quantizations", nargs="*", default=common.QUANTIZATIONS, choices=common.QUANTIZATIONS)
    parser.add_argument("--most-adapters", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6, help="of a training of one adapter; more adapters have fewer")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--questions", type=int, default=1140, help="asked 0-shot")
    parser.add_argument("--adapters", type=int, default=8, help="of scoring with several")
    parser.add_argument("--shot-subjects", type=int, default=3, help="asked whole, 5-shot")
    parser.add_argument("--shot-questions", type=int, default=40, help="with 0 subjects: so many, 20 a subject")
    parser.add_argument("--rival-shot-questions", type=int, default=96, help="lm-eval's, 5-shot")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=(16, 32, 64), help="lm-eval's")
    parser.add_argument("--found", type=Path, help="whole: what benchmarks.end_to_end wrote")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.part == "table":
        text = table(options.folder)
        (options.folder / "gpu_results.md").write_text(text)
        print(text)
    elif options.part == "whole":
        whole(options.folder, options.found)
    else:
        results = Results(options.folder / f"{options.part}.json", options.seconds)
        (Trainings if options.part == "training" else Scorings)(options, results).run()


if __name__ == "__main__":
    main()
