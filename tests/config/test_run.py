"""Options from four sources, and mistakes that end in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from raylora.config.method import Method
from raylora.config.run import Config, load_config
from raylora.errors import UserError
from tests.helpers import ROOT

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_defaults_are_those_of_the_method():
    assert load_config([]).method() == Method(
        lora_r=16, lora_alpha=32, lora_dropout=0.1, num_epochs=3, batch_size=4, gradient_accumulation=4,
        learning_rate=2e-4, max_grad_norm=0.3, warmup_ratio=0.03, lr_scheduler="cosine", adam_beta1=0.9,
        adam_beta2=0.999, weight_decay=0.01,
        target_modules=("auto",),
    )  # fmt: skip
    assert load_config([]).quantization == "8bit"


def test_sources_rise_in_strength(monkeypatch):
    Path("a.yaml").write_text("model: of-yaml\nlearning_rate: 1\n")
    argv = ["--config", "a.yaml"]
    assert load_config(argv).model == "of-yaml"
    monkeypatch.setenv("MODEL_NAME", "of-environment")
    assert load_config(argv).model == "of-environment"
    Path(".env").write_text("MODEL_NAME=of-dotenv\nHF_TOKEN=secret\nRAYLORA_LEARNING_RATE=2\n")
    assert load_config(argv).model == "of-dotenv"
    assert load_config(argv).learning_rate == 2
    assert load_config([*argv, "--model", "of-command-line"]).model == "of-command-line"
    assert "secret" not in load_config(argv).model_dump_json()


def test_repeats_are_seeds_and_a_grid_may_vary_them():
    config = load_config(["--repeats", "3", "--seed", "5", "--grid", '{"lora_r": [4, 8]}'])
    assert [(m.seed, m.lora_r) for m in config.grid_methods()] == [(s, r) for s in (5, 6, 7) for r in (4, 8)]
    assert load_config(["--repeats", "3", "--stages", "features"]).seeds == [0], "features have no training seed"
    assert load_config(["--grid", '{"seed": [2, 1, 2]}']).seeds == [2, 1]
    with pytest.raises(UserError, match="--repeats: the grid has seeds already"):
        load_config(["--grid", '{"seed": [1, 2]}', "--repeats", "2"])
    with pytest.raises(UserError, match="--seed"):
        load_config(["--seed", str(2**53 + 1)])
    with pytest.raises(UserError, match="--repeats: its last seed is beyond"):
        load_config(["--seed", str(2**53), "--repeats", "2"])


@pytest.mark.parametrize("source", ["command", "one word", "environment", "yaml list", "yaml mapping", "python"])
def test_question_sets_are_named_in_every_source(monkeypatch, source):
    words = ["a,b.json", "arc=x/=.json", "my-set.2=s3://bucket/q"]
    argv = []
    if source == "command":
        argv = [word for text in words for word in ("--questions", text)]
    elif source == "one word":
        argv = ["--questions", ",".join(words)]
    elif source == "environment":
        monkeypatch.setenv("RAYLORA_QUESTIONS", ",".join(words))
    elif source.startswith("yaml"):
        sets = dict(word.split("=", 1) for word in words[1:])
        given = {"questions": words} if source == "yaml list" else {"mmlu": words[0], "questions": sets}
        Path("a.yaml").write_text(yaml.safe_dump(given))
        argv = ["--config", "a.yaml"]
    config = load_config(questions=words) if source == "python" else load_config(argv)
    assert config.question_sets == {"": "a,b.json", "arc": "x/=.json", "my-set.2": "s3://bucket/q"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["arc=a", "Arc=b"], "--questions: two sets of one name"),
        (["a", "b"], "--questions: two sets of one name, or without one"),
        (["masked=a"], "--questions: masked is the name of the questions that --mask leaves"),
        (["arc=s3://user:secret@bucket/q"], "no password"),
        (["arc=nothing://q"], "nothing:// is no protocol"),
    ],
)
def test_sets_that_cannot_be_told_from_each_other_are_one_line(given, expected):
    with pytest.raises(UserError, match=expected) as raised:
        load_config(questions=given)
    assert "secret" not in str(raised.value)


def test_a_grid_makes_every_combination():
    methods = load_config(["--grid", '{"lora_r": [4, 8], "learning_rate": [1e-4, 2e-4, 3e-4]}']).grid_methods()
    assert {(m.lora_r, m.learning_rate) for m in methods} == {(r, x) for r in (4, 8) for x in (1e-4, 2e-4, 3e-4)}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--learing-rate", "1"], "--learing-rate: did you mean learning_rate?"),
        (["--learning-rate", "fast"], "--learning-rate: input should be a valid number"),
        (["--quantization", "3bit"], "'none', '8bit', '4bit' or 'fp8'"),
        (["--quantization", "fp8", "--max-memory", '{"0":"9GiB"}'], "--max-memory: not with --quantization fp8"),
        (["--quantization", "fp8", "--gpus-per-worker", "2"], "--gpus-per-worker: not with --quantization fp8"),
        (["--gpus-per-worker", "1.5"], "--gpus-per-worker: a whole number of GPUs, or a share of one"),
        (["--int8-activations", "--quantization", "4bit"], "--int8-activations: needs --quantization 8bit"),
        (["--stages", "train,eat"], "'features', 'train' or 'mmlu'"),
        (["--lora-r", "0"], "greater than or equal to 1"),
        (["--rank-pattern", "q_proj"], "--rank-pattern: q_proj is no NAME=RANK"),
        (["--rank-pattern", "q_proj=0"], "--rank-pattern: q_proj=0 is no NAME=RANK"),
        (["--rank-pattern", "q_proj=2,q_proj=3"], "--rank-pattern: two numbers for one name"),
        (["--alpha-pattern", "q_proj=nan"], "--alpha-pattern: q_proj=nan is no NAME=ALPHA"),
        (["--lora-variant", "qlora"], "'lora', 'rslora' or 'dora'"),
        (["--grid", '{"rank_pattern": ["q_proj"]}'], "rank_pattern: Value error, q_proj is no NAME=RANK"),
        (["--grid", '{"lora_q": [1]}'], "lora_q is no hyperparameter"),
        (["--grid", '{"lora_r": [0]}'], "lora_r"),
        (["--grid", '{"lora_r": []}'], "lora_r has no values"),
        (["--grid", "nonsense"], "--grid"),
        (["--num-epochs"], "--num-epochs: expected one argument"),
        (["word"], "unknown option word"),
        (["--config"], "--config: expected one argument"),
        (["--config", "missing.yaml"], "missing.yaml: No such file"),
    ],
)
def test_mistakes_are_one_line_that_names_the_option(argv, expected):
    with pytest.raises(UserError) as raised:
        load_config(argv)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora_rr: 3", "unknown option lora_rr in a.yaml: did you mean lora_r?"),
        ("lora_r: [", "a.yaml: line 1, column"),
        ("- a", "a.yaml: expected `option: value`"),
        ("!!python/object/apply:os.system ['true']", "a.yaml"),
    ],
)
def test_bad_yaml_is_one_line(text, expected):
    Path("a.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        load_config(["--config", "a.yaml"])
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_shipped_configurations_are_valid():
    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        config = load_config(["--config", str(file)])
        assert config.model
        assert yaml.safe_load(file.read_text()).keys() <= Config.model_fields.keys()


def test_a_misspelt_variable_is_not_passed_over(monkeypatch, tmp_path):
    """It would change nothing, and a night later nobody would know."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYLORA_CACHE", "x")
    monkeypatch.setenv("RAYLORA_SOMETHING", "of somebody else")
    assert load_config(chunk="chunk_001")
    (tmp_path / ".env").write_text("RAYLORA_LERNING_RATE=1e-4\n")
    with pytest.raises(UserError, match=r"RAYLORA_LERNING_RATE in \.env: .*did you mean RAYLORA_LEARNING_RATE\?"):
        load_config(chunk="chunk_001")
    (tmp_path / ".env").unlink()
    monkeypatch.setenv("RAYLORA_MAX_SAMPLE", "5")
    with pytest.raises(UserError, match=r"RAYLORA_MAX_SAMPLE in the environment: .*RAYLORA_MAX_SAMPLES\?"):
        load_config(chunk="chunk_001")


def test_a_command_without_a_model_does_not_mind_its_name_in_the_environment(monkeypatch, tmp_path):
    """``.env`` and MODEL_NAME are shared by all commands, also by those that load no model."""
    from raylora.commands.options import FitConfig
    from raylora.config.sources import load_settings

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL_NAME", "demo")
    (tmp_path / ".env").write_text("MODEL_NAME=demo\n")
    assert load_settings(FitConfig, ["table.csv"], "fit").folds == 5


def test_a_bad_value_is_looked_for_where_it_stands(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lora_r: many\n")
    with pytest.raises(UserError, match=rf"{file}: lora_r: .*got 'many'"):
        load_config(["--config", str(file)])
    with pytest.raises(UserError, match=r"--lora-r: .*got 'some'"):
        load_config(["--config", str(file), "--lora-r", "some"])


@pytest.mark.parametrize("text", ["2", "20250102", "yesterday", "2025-02-30", "", "2025-1-2"])
def test_a_date_that_is_none_is_one_line(text):
    with pytest.raises(UserError, match=r"--template-date|template_date") as raised:
        load_config(["--template-date", text])
    assert "\n" not in str(raised.value)
