"""Shared prefixes, resuming, and the token budget: faster ways that must not move a number."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from raylora import evaluate_mmlu, evaluate_mmlu_with_model
from raylora.config import Method, ModelOptions
from raylora.errors import UserError
from raylora.mmlu.batches import common_prefix
from raylora.mmlu.choices import SharedPrefix, choice_logprobs, why_no_prefix
from raylora.mmlu.journal import Journal
from raylora.mmlu.prompts import build_shots, encode_questions, load_encoded, save_encoded
from raylora.mmlu.scoring import answer, evaluate, find_token_budget, load_score
from raylora.mmlu.statistics import compare_subjects
from raylora.model.adapters import LoadedModel
from raylora.model.loading import load_model
from raylora.model.memory import GPU_TOKEN_BUDGET
from raylora.records import Question, Score
from tests.helpers.tiny import make_model

LOGPROBS = ["logprob_a", "logprob_b", "logprob_c", "logprob_d"]
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip


def make_questions(per_subject: int = 6) -> list[Question]:
    return [
        Question(s, f"What of {s} {i}?" + " really" * (3 * i), ("one", "two", "three", "four"), i % 4, f"{s}/{i}")
        for s in ("anatomy", "virology")
        for i in range(per_subject)
    ]


@pytest.fixture(scope="module")
def encoded(tokenizer):
    questions = make_questions()
    dev = [
        Question(s, f"Solved {i} of {s}?", ("w", "x", "y", "z"), i, "") for s in ("anatomy", "virology") for i in (1, 2)
    ]
    return encode_questions(tokenizer, questions, build_shots(dev, ["anatomy", "virology"], 2), "harness", 2048)


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


@pytest.mark.parametrize("num_batches", [1, 3, 5])
def test_an_interrupted_evaluation_goes_on_where_it_was(tiny_model, tokenizer, encoded, tmp_path, num_batches):
    expected = evaluate(tiny_model, tokenizer, encoded, token_budget=200)
    journal = tmp_path / "scores.journal"
    calls = 0

    def stop(stage, done, total):
        nonlocal calls
        calls += 1
        if calls == num_batches:
            raise KeyboardInterrupt

    def ask(**more):
        return evaluate(tiny_model, tokenizer, encoded, token_budget=200, journal=Journal(journal, "k"), **more)

    with pytest.raises(KeyboardInterrupt):
        ask(progress=stop)
    with (journal / "answers-owner.jsonl").open("a") as file:
        file.write('{"0": [[')  # the process died while it wrote
    score = ask()
    assert 0 < score.info["num_resumed"] < len(encoded)
    pd.testing.assert_frame_equal(score.questions, expected.questions, check_exact=True)
    whole = ask()
    assert whole.info["num_resumed"] == len(encoded)
    pd.testing.assert_frame_equal(whole.questions, expected.questions, check_exact=True)


def test_a_journal_of_something_else_is_not_used(tiny_model, tokenizer, encoded, tmp_path):
    journal = tmp_path / "scores.journal"
    evaluate(tiny_model, tokenizer, encoded, journal=Journal(journal, "one"))
    score = evaluate(tiny_model, tokenizer, encoded, journal=Journal(journal, "two"))
    assert score.info["num_resumed"] == 0
    assert json.loads((journal / "plan.json").read_text())["key"] == "two"


def test_a_journal_keeps_the_budget_that_memory_allowed(tiny_model, tokenizer, encoded, tmp_path):
    journal = tmp_path / "scores.journal"

    def refuse(module, args, kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = tiny_model.register_forward_pre_hook(refuse, with_kwargs=True)
    first = evaluate(tiny_model, tokenizer, encoded, token_budget=400, journal=Journal(journal, "k"))
    hook.remove()
    again = evaluate(tiny_model, tokenizer, encoded, token_budget=400, journal=Journal(journal, "k"))
    assert first.info["num_oom_backoffs"] > 0
    assert again.info["token_budget"] == first.info["token_budget"] < 400


@pytest.mark.parametrize("num_helpers", [1, 3])
def test_helpers_ask_some_of_the_questions_and_nothing_changes(tiny_model, tokenizer, encoded, tmp_path, num_helpers):
    expected = evaluate(tiny_model, tokenizer, encoded, token_budget=100)
    folder = tmp_path / "scores.journal"
    owner = Journal(folder, "k")
    helpers: list[int] = []

    def help_out(stage, done, total):
        """The owner's first batch is answered: helpers come, one stops midway, and another model's finds nothing."""
        if helpers:
            return
        assert not Journal(folder, "another model's", helper="stranger").is_open
        for k in range(num_helpers):
            helper = Journal(folder, "k", helper=str(k))
            num_known = len(helper.answers)
            batches = 0

            def stop(stage, done, total):
                nonlocal batches
                batches += 1
                if batches == 2:
                    raise KeyboardInterrupt

            with contextlib.suppress(KeyboardInterrupt):
                answer(tiny_model, tokenizer, encoded, helper, progress=stop)
            helpers.append(len(helper.answers) - num_known)
        assert helper.claim(0) is False
        (folder / "claim-2").touch()  # whoever began this one has died

    score = evaluate(tiny_model, tokenizer, encoded, token_budget=100, journal=owner, progress=help_out)
    assert all(helpers)
    pd.testing.assert_frame_equal(score.questions, expected.questions, check_exact=True)
    owner.remove()
    late = Journal(folder, "k", helper="late")
    assert not late.is_open
    assert not folder.exists()


def test_encoded_questions_come_back_from_their_file(encoded, tmp_path):
    save_encoded(encoded, tmp_path / "q.parquet")
    assert load_encoded(tmp_path / "q.parquet", [e.question for e in encoded]) == encoded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_token_budget_of_a_gpu_fits_its_memory(tokenizer, encoded):
    model = make_model().to("cuda", torch.bfloat16)
    with torch.inference_mode():
        budget = find_token_budget(model, encoded, 0)
    assert 256 <= budget <= GPU_TOKEN_BUDGET
    assert budget & (budget - 1) == 0
    score = evaluate(model, tokenizer, encoded)
    assert score.info["token_budget"] == budget


# The command and the functions that users know


@pytest.fixture(scope="module")
def question_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    records = [
        {"question": q.question, "choices": list(q.choices), "answer": q.answer, "subject": q.subject}
        for q in make_questions()
    ]
    (folder / "test_q.json").write_text(json.dumps([*records, records[0]]))
    (folder / "dev_q.json").write_text(json.dumps(records))
    return folder / "test_q.json"


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory, tiny_model_folder, tokenizer):
    loaded = load_model(ModelOptions(model=str(tiny_model_folder), quantization="none"))
    parameters = loaded.attach(Method(lora_dropout=0.0), 0)
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    folder = tmp_path_factory.mktemp("experiment") / "my_adapter"
    loaded.save_adapter(folder)
    loaded.detach()
    return folder


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "raylora.mmlu", *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_the_command_evaluates_a_model_and_its_adapters(tiny_model_folder, adapter_folder, question_file, tmp_path):
    arguments = ["--model", str(tiny_model_folder), "--quantization", "none", "--questions", str(question_file)]
    other_folder = shutil.copytree(adapter_folder, tmp_path / "other" / "adapter")  # named after what holds it
    arguments += ["--adapter", str(adapter_folder), str(other_folder)]
    arguments += ["--num-fewshot", "2", "--output", str(tmp_path / "out")]
    result = run_command(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "my_adapter: none of 2 subjects changed" in result.stdout
    assert "1 questions stand there again" in result.stdout
    (folder,) = (tmp_path / "out" / "mmlu").iterdir()
    summary = pd.read_csv(folder / "summary.csv")
    assert list(summary["model"]) == ["base", "my_adapter", "other"]
    assert summary["total_questions"].eq(13).all()
    subjects = pd.read_csv(folder / "subjects.csv")
    assert len(subjects) == 6
    assert (subjects["holm_p_value"] >= subjects["mcnemar_p_value"]).all()
    scores = pd.read_parquet(summary["scores"][1])
    wanted = {"subject", "question_id", "question", "answer", "prediction", *LOGPROBS, "correct"}
    assert wanted <= set(scores.columns)
    assert scores["correct"].mean() == pytest.approx(summary["overall_accuracy"][1])
    found = evaluate_mmlu(
        str(tiny_model_folder), adapter_folder, question_file, quantization="none", num_fewshot=2, max_samples=1000
    )
    assert found["overall_accuracy"] == pytest.approx(summary["overall_accuracy"][1])
    np.testing.assert_allclose(found["questions"][LOGPROBS], scores[LOGPROBS], atol=1e-5)
    modified = [p.stat().st_mtime_ns for p in sorted(folder.rglob("*.parquet"))]
    assert run_command(*arguments).returncode == 0
    assert [p.stat().st_mtime_ns for p in sorted(folder.rglob("*.parquet"))] == modified, "evaluated again"


def test_a_killed_evaluation_goes_on_where_it_was(tiny_model_folder, tmp_path):
    """SIGKILL, as the system does it when memory is short; the answers so far are on disk."""
    file = tmp_path / "q.json"
    questions = make_questions(200)
    file.write_text(json.dumps([{**vars(q), "question": q.question[:200]} for q in questions]))
    arguments = ["--model", str(tiny_model_folder), "--quantization", "none", "--questions", str(file)]
    arguments += ["--output", str(tmp_path / "out"), "--token-budget", "64"]
    process = subprocess.Popen([sys.executable, "-m", "raylora.mmlu", *arguments], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        answers: list = []
        while not answers or answers[0].read_text().count("\n") < 5:
            assert process.poll() is None, "it was done before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
            answers = list((tmp_path / "out").rglob("answers-owner.jsonl"))
    finally:
        process.kill()
        process.wait()
    assert not list((tmp_path / "out").rglob("scores.parquet"))
    result = run_command(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (tmp_path / "out").rglob("scores.parquet")
    score = load_score(path)
    assert score.info["num_resumed"] >= 5
    assert len(score.questions) == len(questions)
    assert not list((tmp_path / "out").rglob("*.journal"))
    whole = evaluate_mmlu(str(tiny_model_folder), None, file, quantization="none", token_budget=64)
    pd.testing.assert_frame_equal(score.questions, whole["questions"], check_exact=True)


def test_a_model_that_is_loaded_already_is_evaluated_as_it_is(tiny_model, tokenizer, question_file):
    found = evaluate_mmlu_with_model(tiny_model, tokenizer, question_file, batch_size=4, max_samples=6)
    assert found["total_questions"] == 6
    assert found["correct_questions"] == found["questions"]["correct"].sum()
    assert found["overall_accuracy"] == found["correct_questions"] / 6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--questions", "nowhere.json"], "nowhere.json is missing"),
        (["--questions", "demo", "--adapter", "nowhere"], "no adapter_config.json"),
        (["--questions", "demo", "--num-fewshot", "99"], "too few dev questions"),
        (["--questions", "demo", "--num-epochs", "1"], "unknown option --num-epochs"),
    ],
)
def test_wrong_use_of_the_command_is_one_line(tiny_model_folder, arguments, expected):
    result = run_command("--model", str(tiny_model_folder), *arguments)
    assert result.returncode == 2
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_adapter_of_another_model_is_one_line(tokenizer, adapter_folder):
    loaded = LoadedModel(make_model(hidden_size=32), tokenizer, "other", "none")
    with pytest.raises(UserError, match="no adapter of other"):
        loaded.attach_saved(adapter_folder)


def test_p_values_of_subjects_are_adjusted_together():
    rng = np.random.default_rng(0)
    scores = []
    for share in (0.9, 0.4):
        table = pd.DataFrame({"subject": np.repeat(["a", "b", "c"], 40), "correct": rng.random(120) < share})
        scores.append(Score(table.assign(question_id=[f"q{i}" for i in range(120)], prediction="A")))
    table = compare_subjects(*scores)
    ordered = table.sort_values("mcnemar_p_value")
    expected = np.minimum(np.maximum.accumulate(ordered["mcnemar_p_value"].to_numpy() * [3, 2, 1]), 1)
    np.testing.assert_allclose(ordered["holm_p_value"], expected)
