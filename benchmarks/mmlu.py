"""raylora's MMLU beside lm-evaluation-harness and batched generation, in one run, on the same questions and model.

python -m benchmarks.mmlu                                   # 0-shot, 228 questions
python -m benchmarks.mmlu --num-fewshot 5                   # 120 questions of 6 subjects
python -m benchmarks.mmlu --shape llama3-8b                 # random weights on a GPU
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from raylora.mmlu.prompts import build_shots, encode_questions, harness_prompt
from raylora.mmlu.questions import load_questions, select_questions
from raylora.mmlu.scoring import evaluate
from raylora.model.adapters import LoadedModel
from raylora.records import Question

LOGPROBS = ["logprob_a", "logprob_b", "logprob_c", "logprob_d"]


def choose(folder: Path, num_questions: int, num_fewshot: int) -> tuple[list[Question], dict[str, list[Question]]]:
    """A seeded sample over all subjects; with shots, twenty questions a subject, as many subjects as that makes."""
    everything = load_questions(folder / "test_all_subjects.json")
    if num_fewshot == 0:
        per_subject: dict[str, list[Question]] = {}
        for q in everything:
            per_subject.setdefault(q.subject, []).append(q)
        each = max(1, num_questions // len(per_subject))
        return [q for group in per_subject.values() for q in select_questions(group, each, 0)], {}
    dev = load_questions(folder / "dev_all_subjects.json")
    subjects = ("abstract_algebra", "astronomy", "college_biology", "international_law", "philosophy", "sociology")
    wanted = list(itertools.islice(itertools.cycle(subjects), max(1, num_questions // 20)))
    chosen = []
    for subject in dict.fromkeys(wanted):
        group = [q for q in everything if q.subject == subject]
        chosen += select_questions(group, 20, 0)
    return chosen, build_shots(dev, set(wanted), num_fewshot)


def ask_raylora(loaded: LoadedModel, questions: Sequence[Question], shots: dict) -> np.ndarray:
    encoded = encode_questions(loaded.tokenizer, questions, shots, "harness", 8192)
    return evaluate(loaded, encoded).questions[LOGPROBS].to_numpy()


def ask_harness(lm: Any, questions: Sequence[Question], shots: dict) -> np.ndarray:
    from lm_eval.api.instance import Instance

    requests = [
        Instance("loglikelihood", {}, (harness_prompt(q, shots.get(q.subject, [])), f" {letter}"), i)
        for i, q in enumerate(questions)
        for letter in "ABCD"
    ]
    return np.array([ll for ll, _ in lm.loglikelihood(requests, disable_tqdm=True)]).reshape(-1, 4)


def ask_by_writing(loaded: LoadedModel, questions: Sequence[Question], shots: dict) -> list[str]:
    """The research code's way: ten new tokens, batch 4, left padding, in the file's order."""
    tokenizer, model = loaded.tokenizer, loaded.model
    tokenizer.padding_side = "left"
    texts: list[str] = []
    for start in range(0, len(questions), 4):
        prompts = [harness_prompt(q, shots.get(q.subject, [])) for q in questions[start : start + 4]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=10, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def best_harness(
    loaded: LoadedModel, questions: Sequence[Question], shots: dict, sizes: Sequence[int]
) -> tuple[Any, int]:
    """The harness at the batch size that is fastest on a few of the questions."""
    from tests.helpers.harness import make_lm

    few = list(questions)[:: max(1, len(questions) // 24)]
    sizes = sizes or ((1, 2, 4, 8, 16) if loaded.device.type == "cpu" else (8, 16, 32, 64))
    if len(sizes) == 1:
        return make_lm(loaded.model, loaded.tokenizer, sizes[0]), sizes[0]
    lms = {size: make_lm(loaded.model, loaded.tokenizer, size) for size in sizes}
    seconds = {
        size: common.measure(lambda lm=lm: ask_harness(lm, few, shots), loaded.device).seconds
        for size, lm in lms.items()
    }
    print("lm-eval, seconds by batch size on", len(few), "questions:", {k: round(v, 2) for k, v in seconds.items()})
    best = min(seconds, key=lambda size: seconds[size])
    return lms[best], best


def compare_ways(loaded: LoadedModel, questions: Sequence[Question], shots: dict, options: argparse.Namespace) -> None:
    ways: dict[str, Callable[[], Any]] = {"raylora": lambda: ask_raylora(loaded, questions, shots)}
    names = {"raylora": "raylora"}
    if "lm_eval" in options.ways:
        lm, size = best_harness(loaded, questions, shots, options.batch_sizes)
        ways["lm_eval"] = lambda: ask_harness(lm, questions, shots)
        names["lm_eval"] = f"lm-eval, batch {size}"
    if "generate" in options.ways:
        ways["generate"] = lambda: ask_by_writing(loaded, questions, shots)
        names["generate"] = "generate, batch 4"
    ask_raylora(loaded, questions[:4], shots)  # warm
    taken: dict[str, list[common.Measured]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, run in ways.items():
            taken[way].append(common.measure(run, loaded.device))
            print(f"{way}: {taken[way][-1].seconds:.1f} s, {taken[way][-1].cpu_seconds:.1f} CPU s", flush=True)
    prompts = encode_questions(loaded.tokenizer, questions, shots, "harness", 8192)
    num_tokens = sum(len(e) for e in prompts)
    dtype = torch.bfloat16 if loaded.device.type == "cuda" else torch.float32
    limit = common.matrix_rate(loaded.device, dtype)
    ours = statistics.median(m.seconds for m in taken["raylora"])
    rows = []
    for way, runs in taken.items():
        seconds = statistics.median(m.seconds for m in runs)
        rows.append(
            {
                "way": names[way],
                "seconds": seconds,
                "times raylora": seconds / ours,
                "prompt tokens/s": num_tokens / seconds,
                "share of matrix rate": common.forward_flops(loaded.model, num_tokens, len(prompts)) / seconds / limit,
                "peak GB": max(m.peak_bytes for m in runs) / 1e9,
                "CPU seconds": statistics.median(m.cpu_seconds for m in runs),
                "all seconds": " ".join(f"{m.seconds:.1f}" for m in runs),
            }
        )
    extra: dict[str, Any] = {"prompt tokens": num_tokens, "matrix rate, GFLOP/s": round(limit / 1e9)}
    if "lm_eval" in taken:
        mine, theirs = taken["raylora"][0].result, taken["lm_eval"][0].result
        extra["largest difference of a log-likelihood"] = float(np.abs(mine - theirs).max())
        extra["predictions that differ"] = int((mine.argmax(1) != theirs.argmax(1)).sum())
    model = f"{options.shape or options.model}, {options.quantization}"
    title = f"{len(questions)} questions, {options.num_fewshot}-shot, {model}"
    common.report(title, rows, options.json, extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--shape", choices=sorted(common.SHAPES), help="random weights of this shape in place of the model"
    )
    parser.add_argument("--quantization", default="none", choices=("none", "8bit", "4bit", "fp8"))
    parser.add_argument("--questions", type=Path, default=common.SHARED / "mmlu", help="folder with the two JSON files")
    parser.add_argument("--num-questions", type=int)
    parser.add_argument("--num-fewshot", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default="lm_eval,generate", help="what raylora is held against")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=(), help="lm-eval's, the fastest is taken")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    number = options.num_questions or (228 if options.num_fewshot == 0 else 120)
    questions, shots = choose(options.questions, number, options.num_fewshot)
    loaded = common.load(options.model, options.quantization, options.shape)
    compare_ways(loaded, questions, shots, options)


if __name__ == "__main__":
    main()
