"""raylora's MMLU beside lm-evaluation-harness and batched generation, in one run, on the same questions and model.

    python -m benchmarks.mmlu                                   # 0-shot, 228 questions; on a GPU all 14,042
    python -m benchmarks.mmlu --num-fewshot 5                   # 120 of 6 subjects; on a GPU 10 whole subjects
    python -m benchmarks.mmlu --scoring cloze --ways lm_eval    # texts of choices in place of letters
    python -m benchmarks.mmlu --shape llama3-8b --quantization 8bit         # random weights on a GPU
    python -m benchmarks.mmlu --shape llama3-8b --flips         # predictions that batches and quantizations change

Tokenization is timed apart: each way encodes all its prompts first, and is then asked. Where lm-eval, at the batch size
that is fastest on a sample, would take longer than ``--rival-seconds``, it gets every n-th question; "times raylora" is
of the tokens a second, which for the same questions is of the seconds.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from raylora.config.options import Scoring
from raylora.errors import UserError, one_line
from raylora.mmlu.prompts import EncodedQuestion, build_shots, cloze_prompt, encode_questions, harness_prompt
from raylora.mmlu.questions import load_questions, select_questions
from raylora.model.adapters import LoadedModel
from raylora.model.loading import context_window
from raylora.model.memory import is_out_of_memory
from raylora.records import Question, Score

LOGPROBS = ["logprob_a", "logprob_b", "logprob_c", "logprob_d"]
SHOT_SUBJECTS = ("abstract_algebra", "astronomy", "college_biology", "international_law", "philosophy", "sociology")
Shots = dict[str, list[Question]]
"""The solved questions of each subject."""


def choose(folder: Path, num_questions: int, num_fewshot: int, whole_subjects: int = 0) -> tuple[list[Question], Shots]:
    """A seeded sample over all subjects; with shots, twenty questions a subject, as many subjects as that makes.

    Args:
        whole_subjects: with shots, all questions of so many subjects in place of that, spread over the alphabet.
    """
    everything = load_questions(folder / "test_all_subjects.json")
    by_subject: dict[str, list[Question]] = {}
    for question in everything:
        by_subject.setdefault(question.subject, []).append(question)
    if num_fewshot == 0:
        if num_questions >= len(everything):
            return everything, {}
        each = max(1, num_questions // len(by_subject))
        return [q for group in by_subject.values() for q in select_questions(group, each, 0)], {}
    dev = load_questions(folder / "dev_all_subjects.json")
    if whole_subjects:
        enough = sorted(s for s in by_subject if sum(q.subject == s for q in dev) >= num_fewshot)
        subjects = enough[:: max(1, len(enough) // whole_subjects)][:whole_subjects]
        return [q for s in subjects for q in by_subject[s]], build_shots(dev, subjects, num_fewshot)
    wanted = list(itertools.islice(itertools.cycle(SHOT_SUBJECTS), max(1, num_questions // 20)))
    chosen = [q for subject in dict.fromkeys(wanted) for q in select_questions(by_subject[subject], 20, 0)]
    return chosen, build_shots(dev, set(wanted), num_fewshot)


def encode(
    loaded: LoadedModel, questions: Sequence[Question], shots: Shots, scoring: Scoring = "letters"
) -> list[EncodedQuestion]:
    window = context_window(loaded.model)
    return encode_questions(loaded.tokenizer, questions, shots, "harness", window, scoring=scoring)


def logprobs_of(score: Score) -> np.ndarray:
    """Log-likelihoods of the four choices, (questions, 4)."""
    return score.questions[LOGPROBS].to_numpy()


def encode_for_harness(lm: Any, questions: Sequence[Question], shots: Shots, scoring: Scoring = "letters") -> list[Any]:
    """Four requests a question, tokenized by the harness itself."""
    prompt = cloze_prompt if scoring == "cloze" else harness_prompt
    answers = [q.choices if scoring == "cloze" else "ABCD" for q in questions]
    contexts = [prompt(q, shots.get(q.subject, [])) for q in questions]
    pairs = [(context, f" {a}") for context, own in zip(contexts, answers, strict=True) for a in own]
    return [(pair, *lm._encode_pair(*pair)) for pair in pairs]


def ask_harness(lm: Any, requests: Sequence[Any]) -> np.ndarray:
    """Log-likelihoods of the four choices, (questions, 4)."""
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    return np.array([logprob for logprob, _ in found]).reshape(-1, 4)


def encode_for_writing(loaded: LoadedModel, questions: Sequence[Question], shots: Shots) -> list[Any]:
    """Batches of four prompts in the questions' order, padded at the left."""
    loaded.tokenizer.padding_side = "left"
    prompts = [harness_prompt(q, shots.get(q.subject, [])) for q in questions]
    starts = range(0, len(prompts), 4)
    return [loaded.tokenizer(prompts[i : i + 4], return_tensors="pt", padding=True) for i in starts]


def ask_by_writing(loaded: LoadedModel, batches: Sequence[Any]) -> list[str]:
    """The research code's way: ten new tokens."""
    tokenizer, model = loaded.tokenizer, loaded.model
    texts: list[str] = []
    for batch in batches:
        inputs = batch.to(model.device)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=10, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


@dataclass(frozen=True)
class Way:
    """How questions are put to a model, in two steps that are timed apart."""

    name: str
    encode: Callable[[Sequence[Question]], Any]
    ask: Callable[[Any], Any]


def raylora_way(loaded: LoadedModel, shots: Shots, scoring: Scoring = "letters") -> Way:
    return Way(
        "raylora",
        lambda q: encode(loaded, q, shots, scoring),
        lambda encoded: common.score(loaded, encoded, scoring=scoring),
    )


def writing_way(loaded: LoadedModel, shots: Shots) -> Way:
    return Way(
        "generate, batch 4",
        lambda q: encode_for_writing(loaded, q, shots),
        lambda batches: ask_by_writing(loaded, batches),
    )


def best_harness(
    loaded: LoadedModel,
    questions: Sequence[Question],
    shots: Shots,
    sizes: Sequence[int] = (),
    scoring: Scoring = "letters",
) -> Way:
    """The harness at the batch size that is fastest on a sample of the questions, and does not run out of memory."""
    from tests.helpers.harness import make_lm

    sizes = sizes or ((1, 2, 4, 8, 16) if loaded.device.type == "cpu" else (8, 16, 32, 64))
    # The four choices of a question are one row of the harness's batches, so a batch takes as many questions.
    few = list(questions)[:: max(1, len(questions) // max(24, 2 * max(sizes)))]
    seconds: dict[int, float] = {}
    for size in sizes if len(sizes) > 1 else ():
        lm = make_lm(loaded.model, loaded.tokenizer, size)
        requests = encode_for_harness(lm, few, shots, scoring)
        try:
            ask_harness(lm, requests[: 4 * size])  # warm
            seconds[size] = common.measure(lambda lm=lm, r=requests: ask_harness(lm, r), loaded.device).seconds
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
    if seconds:
        print("lm-eval, seconds by batch size on", len(few), "questions:", {k: round(v, 2) for k, v in seconds.items()})
    best = min(seconds, key=lambda size: seconds[size]) if seconds else min(sizes)
    lm = make_lm(loaded.model, loaded.tokenizer, best)
    return Way(
        f"lm-eval, batch {best}",
        lambda q: encode_for_harness(lm, q, shots, scoring),
        lambda requests: ask_harness(lm, requests),
    )


def step_within(way: Way, questions: Sequence[Question], seconds: float, device: torch.device) -> int:
    """n, so that every n-th question is asked in about ``seconds``; 1 where all are. Judged by a few of them."""
    if not math.isfinite(seconds):
        return 1
    few = list(questions)[:: max(1, len(questions) // 64)]
    taken = common.measure(lambda: way.ask(way.encode(few)), device).seconds
    return math.ceil(max(1.0, taken / len(few) * len(questions) / seconds))


def compare_ways(loaded: LoadedModel, questions: list[Question], shots: Shots, options: argparse.Namespace) -> None:
    """Each way on all questions, or every n-th. The others come first: their peaks hold nothing that raylora keeps."""
    rivals = []
    if "lm_eval" in options.ways:
        rivals.append(best_harness(loaded, questions, shots, options.batch_sizes, options.scoring))
    if "generate" in options.ways:
        rivals.append(writing_way(loaded, shots))
    ours = raylora_way(loaded, shots, options.scoring)
    steps = [*(step_within(way, questions, options.rival_seconds, loaded.device) for way in rivals), 1]
    runs = [Runs(way, questions[::step]) for way, step in zip([*rivals, ours], steps, strict=True)]
    for turn in range(options.rounds):
        for run in runs:
            if run.way is ours and turn == 0:
                ours.ask(ours.encode(questions[:: max(1, len(questions) // 64)]))  # warm
            run.ask_again(loaded.device)
    lengths = np.array([len(e) for e in runs[-1].inputs])
    limit = common.matrix_rate(loaded.device, torch.bfloat16 if loaded.device.type == "cuda" else torch.float32)
    info = runs[-1].taken[0].result.info
    our_rate = lengths.sum() / runs[-1].seconds
    rows = []
    for run, step in zip(reversed(runs), reversed(steps), strict=True):
        num_tokens, of_ours = int(lengths[::step].sum()), run is runs[-1]
        # What a shared prefix spares is in the tokens a second, and not in the share.
        spared = info["num_tokens_spared"] if of_ours else 0
        flops = common.forward_flops(loaded.model, num_tokens - spared, len(run.questions))
        rows.append(
            {
                "way": run.way.name,
                "questions": len(run.questions),
                "seconds": run.seconds,
                "times raylora": float(our_rate / (num_tokens / run.seconds)),
                "prompt tokens/s": num_tokens / run.seconds,
                "share of matrix rate": flops / run.seconds / limit,
                "peak GB": (max if of_ours else min)(m.reserved_bytes for m in run.taken) / 1e9,
                "tokenization, ms a question": 1000 * run.tokenized / len(run.questions),
                "CPU seconds": statistics.median(m.cpu_seconds for m in run.taken),
                "all seconds": " ".join(f"{m.seconds:.1f}" for m in run.taken),
            }
        )
    extra: dict[str, Any] = {
        "prompt tokens": int(lengths.sum()),
        "of them in shared prefixes, and computed once": info["num_tokens_spared"],
        "tokens in a batch": info["token_budget"],
        "matrix rate, GFLOP/s": round(limit / 1e9),
    }
    if "lm_eval" in options.ways:
        mine, theirs = logprobs_of(runs[-1].taken[0].result)[:: steps[0]], runs[0].taken[0].result
        extra["largest difference of a log-likelihood"] = float(np.abs(mine - theirs).max())
        number, *margins = margins_of_flips(theirs, mine)
        extra["predictions that differ"] = number
        extra["their margins in nats, median and largest"] = margins
    common.report(title_of(loaded, len(questions), options), rows, options.json, extra)


class Runs:
    """A way on some questions, which it encodes once and is asked again and again."""

    def __init__(self, way: Way, questions: Sequence[Question]) -> None:
        self.way, self.questions = way, questions
        started = time.perf_counter()
        self.inputs = way.encode(questions)
        self.tokenized = time.perf_counter() - started
        """Seconds of the tokenization."""
        self.taken: list[common.Measured] = []

    def ask_again(self, device: torch.device) -> None:
        found = common.measure(lambda: self.way.ask(self.inputs), device)
        self.taken.append(found)
        print(f"{self.way.name}: {found.seconds:.1f} s, {found.cpu_seconds:.1f} CPU s", flush=True)

    @property
    def seconds(self) -> float:
        return statistics.median(m.seconds for m in self.taken)


def margins_of_flips(expected: np.ndarray, found: np.ndarray) -> tuple[int, float, float]:
    """How many predictions of two evaluations differ, and how far apart the best two answers are in these questions.

    Args:
        expected: log-likelihoods, (questions, 4), from which margins are taken.
        found: those of the other evaluation.

    Returns:
        The number of flips, and the median and the largest of their margins in nats; zeros without flips.
    """
    best_two = np.sort(expected, axis=1)[:, -2:]
    margins = (best_two[:, 1] - best_two[:, 0])[expected.argmax(1) != found.argmax(1)]
    return len(margins), float(np.median(margins)) if len(margins) else 0.0, float(margins.max(initial=0.0))


def compare_flips(questions: list[Question], shots: Shots, options: argparse.Namespace) -> None:
    """Predictions of each quantization by token budget, against its first budget and against the first quantization."""
    rows: list[dict[str, Any]] = []
    base, base_name, title = None, "", ""
    for quantization in options.quantizations:
        try:
            loaded = common.load(options.model, quantization, options.shape)
        except UserError as error:
            print(f"{quantization}: {one_line(error)}")
            continue
        encoded = encode(loaded, questions, shots)
        first = None
        for budget in options.budgets or ((512, 128, 2048) if loaded.device.type == "cpu" else (16384, 2048, 65536)):
            taken = common.measure(
                lambda model=loaded, e=encoded, budget=budget: common.score(model, e, budget), loaded.device
            )
            found = logprobs_of(taken.result)
            first = found if first is None else first
            if base is None:
                base, base_name = found, f"{quantization} ({loaded.model.dtype})".replace("torch.", "")
            rows.append(
                {
                    "weights": quantization,
                    "tokens in a batch": budget,
                    "tokens/s": sum(map(len, encoded)) / taken.seconds,
                    "peak GB": taken.reserved_bytes / 1e9,
                    **flips("batch", first, found),
                    **flips("base", base, found),
                }
            )
            print(rows[-1], flush=True)
        title = title_of(loaded, len(questions), options)
        del loaded, encoded
        common.empty()
    extra = {
        "batch": "beside the same weights at the first batch size; margins are of the best two answers there, in nats",
        "base": f"beside {base_name} at its first batch size",
        "off": "differences of log-likelihoods",
    }
    common.report(f"flips: {title}", rows, options.json, extra)


def flips(name: str, expected: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    number, median, largest = margins_of_flips(expected, found)
    off = np.abs(expected - found)
    return {
        f"{name}: flips": number,
        f"their margin, median ({name})": median,
        f"largest ({name})": largest,
        f"all off, median ({name})": float(np.median(off)),
        f"most ({name})": float(off.max()),
    }


def title_of(loaded: LoadedModel, num_questions: int, options: argparse.Namespace) -> str:
    weights = "" if options.flips else f", {options.quantization}"
    return f"{num_questions} questions, {options.num_fewshot}-shot, {loaded.source}{weights}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--shape", choices=sorted(common.SHAPES), help="random weights of this shape in place of the model"
    )
    parser.add_argument("--quantization", default="none", choices=common.QUANTIZATIONS)
    parser.add_argument("--questions", type=Path, default=common.SHARED / "mmlu", help="folder with the two JSON files")
    parser.add_argument("--num-questions", type=int)
    parser.add_argument("--num-fewshot", type=int, default=0)
    parser.add_argument(
        "--subjects", type=int, help="with shots: all questions of so many subjects; 0: twenty of each (on a CPU)"
    )
    parser.add_argument("--scoring", choices=("letters", "cloze"), default="letters")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default="", help="what raylora is held against: lm_eval,generate (GPU: lm_eval)")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=(), help="lm-eval's, the fastest is taken")
    parser.add_argument(
        "--rival-seconds", type=float, help="those of the others; 300 on a GPU, else as long as it takes"
    )
    parser.add_argument("--flips", action="store_true", help="raylora alone, by token budget and quantization")
    parser.add_argument("--quantizations", nargs="*", default=common.QUANTIZATIONS, choices=common.QUANTIZATIONS)
    parser.add_argument("--budgets", type=int, nargs="*", default=(), help="tokens in a batch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    number = options.num_questions or (10**6 if on_gpu else 228 if options.num_fewshot == 0 else 120)
    subjects = options.subjects if options.subjects is not None else 10 if on_gpu and not options.num_questions else 0
    options.ways = options.ways or ("lm_eval" if on_gpu or options.scoring == "cloze" else "lm_eval,generate")
    options.rival_seconds = options.rival_seconds or (300 if on_gpu else math.inf)
    questions, shots = choose(options.questions, number, options.num_fewshot, subjects)
    if options.flips:
        compare_flips(questions, shots, options)
    else:
        compare_ways(common.load(options.model, options.quantization, options.shape), questions, shots, options)


if __name__ == "__main__":
    main()
