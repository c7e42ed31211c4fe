"""``python -m raylora.mmlu``."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from raylora import evaluate_mmlu
from raylora.commands import mmlu
from raylora.commands.mmlu import Evaluated, print_tables, summary_of
from raylora.commands.options import MmluConfig
from raylora.config.sources import load_settings
from raylora.mmlu.scoring import load_score
from raylora.records import Score
from tests.helpers.adapters import make_qwen2, save_kind
from tests.helpers.questions import LOGPROBS, as_dicts, questions_of_many_sizes, questions_of_two_subjects
from tests.helpers.runs import letter_scores, make_score
from tests.helpers.thinking import thinking_tokenizer
from tests.helpers.tiny import make_tokenizer, save_model


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "raylora.mmlu", *arguments], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
@pytest.mark.ci
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
    of_adapters = subjects[subjects["model"] != "base"]
    assert (of_adapters["holm_p_value"] >= of_adapters["mcnemar_p_value"]).all()
    assert subjects[subjects["model"] == "base"][["difference", "ci_low", "mcnemar_p_value"]].isna().all(axis=None)
    assert summary["ci_low"].isna().tolist() == [True, False, False]
    assert (summary["fdr_p_value"] <= summary["holm_p_value"]).tolist() == [False, True, True]
    assert summary["accuracy_change_shrunk"].isna().all(), "fewer than three adapters"
    assert summary["overall_stderr_clustered"].between(0, 1).all()
    assert summary[[f"prediction_share_{letter}" for letter in "abcd"]].sum(axis=1).tolist() == pytest.approx([1, 1, 1])
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


def test_further_sets_and_a_mask_have_columns_of_their_own(tiny_model_folder, adapter_folder, question_file, tmp_path):
    many = questions_of_many_sizes()
    (tmp_path / "many.json").write_text(json.dumps(as_dicts(many)))
    (tmp_path / "mask.txt").write_text("anatomy/0\nvirology/1\n")
    given = {
        "model": str(tiny_model_folder),
        "quantization": "none",
        "num_fewshot": 2,
        "mask": str(tmp_path / "mask.txt"),
    }
    given |= {"questions": (str(question_file), f"many={tmp_path / 'many.json'}")}
    config = load_settings(MmluConfig, None, "mmlu", **given, adapter=[adapter_folder], output=tmp_path / "out")
    stream = io.StringIO()
    evaluated, failures = mmlu.evaluate_all(config, console := Console(file=stream, width=200))
    assert not failures
    mmlu.print_all(evaluated, console)
    shown = stream.getvalue()
    assert "asked 0-shot" in shown
    assert "2 of 13 questions are left out" in shown
    assert "many: 6 questions" in shown
    assert "masked: 11 questions" in shown
    (path,) = (tmp_path / "out").rglob("summary.csv")
    summary = pd.read_csv(path)
    assert list(summary["model"]) == ["base", "my_adapter"]
    sizes = summary[["total_questions", "total_questions[masked]", "total_questions[many]"]]
    assert sizes.iloc[1].tolist() == [13, 11, 6]
    assert "prediction_share_j[many]" in summary
    assert "prediction_share_e" not in summary
    adapter = pd.read_parquet(summary["scores"][1])
    left = adapter[~adapter["question_id"].isin(["anatomy/0", "virology/1"])]
    assert summary["overall_accuracy[masked]"][1] == pytest.approx(left["correct"].mean())
    of_many = pd.read_parquet(summary["scores[many]"][1])
    assert list(of_many["question_id"]) == [q.question_id for q in many]
    subjects = pd.read_csv(path.with_name("subjects.csv"), keep_default_na=False)
    assert subjects.groupby("set").size().to_dict() == {"": 4, "many": 2, "masked": 4}
    found = evaluate_mmlu(str(tiny_model_folder), adapter_folder, **{k: v for k, v in given.items() if k != "model"})
    assert found["sets"]["many"]["overall_accuracy"] == summary["overall_accuracy[many]"][1]
    assert found["sets"]["masked"]["overall_accuracy"] == pytest.approx(summary["overall_accuracy[masked]"][1])


def test_an_adapter_that_does_not_fit_costs_no_other_and_alone_is_wrong_use(
    tiny_model_folder, adapter_folder, question_file, tmp_path, capsys
):
    """Half of its weights, or NaN in the place of them, would give the base's score, or one in between."""
    half, broken = (shutil.copytree(adapter_folder, tmp_path / name) for name in ("half", "broken"))
    weights = load_file(adapter_folder / "adapter_model.safetensors")
    save_file({name: weights[name] for name in sorted(weights)[::2]}, half / "adapter_model.safetensors")
    save_file({name: t * float("nan") for name, t in weights.items()}, broken / "adapter_model.safetensors")
    given = {"model": str(tiny_model_folder), "quantization": "none", "mmlu": str(question_file)}

    def ask(*adapters):
        config = load_settings(MmluConfig, None, "mmlu", **given, adapter=list(adapters), output=tmp_path / "out")
        return mmlu.run(config), capsys.readouterr().err.splitlines()

    code, lines = ask(half, adapter_folder, broken)
    assert code == 1
    assert [line.split(": ")[1] for line in lines] == [str(half), str(broken)]
    assert f"no adapter of {tiny_model_folder}: lacks weights" in lines[0]
    assert "weights are not finite numbers" in lines[1]
    (path,) = (tmp_path / "out").rglob("summary.csv")
    assert list(pd.read_csv(path)["model"]) == ["base", "my_adapter"]
    assert ask(half, broken) == (2, lines)


def test_a_favourite_letter_that_moved_is_named(tmp_path):
    evaluated = []
    for name, score in zip(("base", "only_letters", "knowledge"), letter_scores(), strict=True):
        info = {**score.info, "scoring": "letters"}
        evaluated.append(Evaluated(name, Score(score.questions, info), tmp_path / f"{name}.parquet"))
    summary = summary_of({"": evaluated}).set_index("model")
    assert summary["verdict"].to_dict() == {"base": "", "only_letters": "letter", "knowledge": "gain"}
    assert summary["num_gained"].tolist()[1:] == [360, 432]
    assert summary["balanced_accuracy"].to_dict() == pytest.approx(
        {"base": 0.25, "only_letters": 0.25, "knowledge": 0.925}
    )
    console = Console(width=120, file=io.StringIO(), record=True)
    print_tables(evaluated, console)
    lines = console.export_text().splitlines()
    (letters,) = [line for line in lines if line.startswith("only_letters: balanced")]
    assert "answers A 0%, B 0%, C 0%, D 100%" in letters
    assert letters.endswith("its favourite letter moved")
    assert [line for line in lines if "its favourite letter moved" in line] == [
        letters,
        *(line for line in lines if line.startswith(("only_letters: anatomy", "only_letters: virology"))),
    ]


def test_the_probability_of_the_right_choice_and_constant_answers_are_printed(tmp_path):
    base = make_score(1, {"anatomy": 30}, None, 0.0)
    base = Score(base.questions.assign(prediction="A", correct=base.questions["answer"] == "A"), base.info)
    scores = {"base": base, "other": make_score(2, {"anatomy": 30}, base, 0.2)}
    info = {**base.info, "scoring": "logits"}
    evaluated = [Evaluated(name, Score(s.questions, info), tmp_path / name) for name, s in scores.items()]
    summary = summary_of({"": evaluated}).set_index("model")
    assert summary["correct_probability"].between(0, 1).all()
    change = summary["correct_probability"]["other"] - summary["correct_probability"]["base"]
    assert summary["correct_probability_change"]["other"] == pytest.approx(change)
    assert summary[["correct_probability_change", "brier_change"]].loc["base"].isna().all()
    console = Console(width=120, file=io.StringIO(), record=True)
    print_tables(evaluated, console)
    lines = console.export_text().splitlines()
    note = "the model answers A to 30 of 30 questions: letters cannot show a change; try --scoring cloze"
    assert [line for line in lines if "cloze" in line] == [f"base: {note}"]
    assert summary["mmlu_note"].to_dict() == {"base": note, "other": ""}
    (printed,) = [line for line in lines if line.startswith("other: probability of the right choice")]
    assert f"change {change:+.4f} (" in printed


def test_an_adapter_that_is_the_base_is_called_that(tiny_model_folder, adapter_folder, question_file, tmp_path):
    """Written as a training at rate 0 leaves it: its B matrices are zero."""
    untrained = shutil.copytree(adapter_folder, tmp_path / "untrained")
    weights = load_file(untrained / "adapter_model.safetensors")
    zeroed = {name: weight * ("lora_B" not in name) for name, weight in weights.items()}
    save_file(zeroed, untrained / "adapter_model.safetensors", {"format": "pt"})
    base, own, other = (
        evaluate_mmlu(str(tiny_model_folder), folder, question_file, quantization="none")["questions"]
        for folder in (None, untrained, adapter_folder)
    )
    assert mmlu.is_same(Score(own), Score(base))
    assert not mmlu.is_same(Score(other), Score(base))


@pytest.mark.slow
@pytest.mark.ci
def test_adapters_of_all_kinds_in_one_run_cost_each_other_nothing(question_file, tmp_path):
    """Each adapter's score is its own, whatever came before it; one that cannot be asked costs a line."""
    model = tmp_path / "qwen2"
    make_qwen2().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    kinds = ["modules to save", "plain", "IA3", "bias of all"]
    adapters = [save_kind(name, tmp_path / name.replace(" ", "_")) for name in kinds]
    config = json.loads((adapters[1] / "adapter_config.json").read_text())
    (adapters[1] / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/another"}))
    prompt, broken = save_kind("prompt tuning", tmp_path / "prompt"), shutil.copytree(adapters[1], tmp_path / "broken")
    (broken / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["no_such_module"]}))
    arguments = ["--model", str(model), "--quantization", "none", "--questions", str(question_file)]
    given = [adapters[0], prompt, adapters[1], tmp_path / "nowhere", adapters[2], broken, adapters[3]]
    result = run_command(*arguments, "--output", str(tmp_path / "out"), "--adapter", *map(str, given))
    assert result.returncode == 1, result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("raylora: ")]
    assert len(errors) == 3
    for folder, error, reason in zip(
        (prompt, tmp_path / "nowhere", broken),
        errors,
        ("is prompt tuning", "no adapter_config", "no adapter of"),
        strict=True,
    ):
        assert f"raylora: {folder}: {reason}" in error
    assert "Note: plain: was trained on org/another" in result.stdout
    (folder,) = (tmp_path / "out" / "mmlu").iterdir()
    summary = pd.read_csv(folder / "summary.csv")
    assert list(summary["model"]) == ["base", "modules_to_save", "plain", "IA3", "bias_of_all"]
    for adapter, path in zip((None, *adapters), summary["scores"], strict=True):
        alone = evaluate_mmlu(str(model), adapter, question_file, quantization="none")
        np.testing.assert_allclose(load_score(Path(path)).questions[LOGPROBS], alone["questions"][LOGPROBS], atol=1e-6)


@pytest.mark.slow
@pytest.mark.ci
def test_prompt_tuning_alone_is_one_line(tiny_model_folder, tmp_path):
    folder = save_kind("prompt tuning", tmp_path / "prompt")
    result = run_command("--model", str(tiny_model_folder), "--questions", "demo", "--adapter", str(folder))
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"raylora: {folder}: is prompt tuning: only adapters that change the model's layers")


@pytest.mark.slow
@pytest.mark.ci
def test_the_row_says_what_became_of_thinking(question_file, tmp_path):
    save_model(tmp_path / "model")
    thinking_tokenizer("begun").save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--quantization", "none", "--questions", str(question_file)]
    result = run_command(*arguments, "--prompt-style", "chat", "--output", str(tmp_path / "out"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "(thinking: closed)" in result.stdout
    (summary,) = (tmp_path / "out" / "mmlu").glob("*/summary.csv")
    assert list(pd.read_csv(summary)["thinking"]) == ["closed"]


@pytest.mark.slow
@pytest.mark.ci
def test_a_killed_evaluation_goes_on_where_it_was(tiny_model_folder, tmp_path):
    """SIGKILL, as the system does it when memory is short; the answers so far are on disk."""
    file = tmp_path / "q.json"
    questions = questions_of_two_subjects(200)
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


@pytest.mark.slow
@pytest.mark.ci
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
