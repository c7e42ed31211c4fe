"""``python -m raylora.predict``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from raylora.commands.predict import print_card
from raylora.commands.run_command import run_command
from raylora.console import make_console
from raylora.predict.predictor import load_predictor
from tests.helpers.predictors import fitted, fitted_to_noise, make_noise, make_table


def test_the_output_of_runs_is_not_that_of_predictors(monkeypatch, tmp_path):
    from raylora.commands.options import FitConfig, PredictConfig
    from raylora.config.sources import load_settings

    monkeypatch.setenv("RAYLORA_OUTPUT", str(tmp_path))
    assert load_settings(FitConfig, ["table.csv"], "fit").output == Path("results/predictor")
    assert load_settings(PredictConfig, ["predictor", "table.csv"], "predict").output is None


def call_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "raylora.predict", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_the_command_fits_predicts_and_explains(tmp_path):
    run = tmp_path / "results" / "chunk_001"
    run.mkdir(parents=True)
    make_table(40).to_parquet(run / "results.parquet")
    out = tmp_path / "predictor"
    fit = call_command("fit", str(run), "--output", str(out), "--leave-out", "dynamic", "--threads", "1")
    assert fit.returncode == 0, fit.stderr
    assert "Better than guessing the mean: RMSE on held-out rows -" in fit.stdout
    assert {p.name for p in out.iterdir()} == {"predictor.skops", "predictor.json", "held_out.csv", "calibration.png"}
    assert json.loads((out / "predictor.json").read_text())["columns"] == load_predictor(out).columns
    assert (out / "calibration.png").read_bytes()[:4] == b"\x89PNG"
    csv = tmp_path / "predictions.csv"
    predict = call_command("predict", str(out), str(run), "--output", str(csv))
    assert predict.returncode == 0, predict.stderr
    assert predict.stdout.startswith("It predicts a new dataset's accuracy to within 0.0")
    assert "Better than guessing the mean: RMSE on held-out rows -" in predict.stdout.splitlines()[1]
    assert "rows with a measured overall_accuracy: RMSE" in predict.stdout
    predicted = pd.read_csv(csv)
    assert list(predicted["dataset"]) == list(make_table(40)["dataset"])
    assert (predicted["low"] <= predicted["prediction"]).all()
    explain = call_command("explain", str(out))
    assert explain.returncode == 0, explain.stderr
    assert all(name in explain.stdout for name in load_predictor(out).columns)
    make_table(40).drop(columns="base_model_perplexity").to_csv(tmp_path / "less.csv")
    missing = call_command("predict", str(out), str(tmp_path / "less.csv"))
    assert missing.returncode == 2
    assert "uses 1 columns that are not there: base_model_perplexity" in missing.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "verdict", "row"),
    [
        (fitted, "Better than guessing the mean: RMSE", "predictor"),
        (
            fitted_to_noise,
            "No better than guessing the mean, which every prediction therefore is: RMSE",
            "regression, no",
        ),
    ],
)
def test_a_sentence_and_the_verdict_are_the_first_lines_of_what_is_predicted_and_explained(
    make, verdict, row, tmp_path, capsys
):
    predictor, _ = make()
    predictor.save(tmp_path)
    make_noise(12).to_csv(tmp_path / "t.csv")
    with pytest.raises(SystemExit) as stop:
        run_command("predict", ["predict", str(tmp_path), str(tmp_path / "t.csv")])
    assert not stop.value.code
    assert capsys.readouterr().out.splitlines()[1].startswith(verdict)
    with pytest.raises(SystemExit):
        run_command("predict", ["explain", str(tmp_path)])
    explained = capsys.readouterr().out
    assert explained.splitlines()[1].startswith(verdict)
    assert row in explained


def test_every_figure_of_the_printed_card_has_its_interval(capsys):
    card = fitted()[0].card
    print_card(card, make_console())
    shown = " ".join(capsys.readouterr().out.split())
    for figures in (card, *card["baselines"].values()):
        ends = figures["intervals"]
        assert f"{ends['rmse'][0]:.4f} {ends['rmse'][1]:.4f}" in shown
        assert f"{ends['r2'][0]:.2f} {ends['r2'][1]:.2f}" in shown
    assert "90%: " in shown
    gain = card["feature_groups"]["perplexity"]["intervals"]["gain"]
    assert f"{gain[0]:.4f} {gain[1]:.4f}" in shown


def test_effects_have_a_sign_and_no_number_is_minus_zero(capsys):
    card = fitted()[0].card
    assert card["effects"]["loss_stability"] > 0 > card["effects"]["approximate_duplicates"]
    name = next(iter(card["importance"]))
    print_card({**card, "importance": {name: [-1e-9, 0.0]}, "effects": {name: -1e-9}}, make_console(width=200))
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.strip().startswith(name)]
    assert line.split()[1:] == ["0.00000", "0.00000", "+0.00000"]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--help"], 0, "fit TABLE"),
        (["fit", "--help"], 0, "--leave-out"),
        (["predict", "--help"], 0, "--coverage"),
        (["guess"], 2, "invalid choice: 'guess' (choose from 'fit', 'predict', 'explain')"),
        (["fit"], 2, "required: TABLE"),
        (["predict", "only-one"], 2, "required: TABLE"),
        (["fit", "s3://a/b"], 2, "only what lies on this machine"),
        (["fit", "nowhere.csv"], 2, "nowhere.csv: No such file"),
        (["fit", "nowhere.csv", "--target", "speed"], 2, "--target"),
        (["explain", "nowhere"], 2, "nowhere: no such predictor"),
    ],
)
def test_the_commands_help_and_mistakes(arguments, code, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command("predict", arguments)
    assert (stop.value.code or 0) == code
    shown = capsys.readouterr()
    assert expected in (shown.out if code == 0 else shown.err)
    if code:
        assert len(shown.err.strip().splitlines()) == 1
