"""Which datasets of a chunk are worth training on? Features only, no training: a prediction for each, and an order.

    python -m raylora.rank --chunk chunk_002 --predictor results/predictor --budget 5
    python -m raylora.batch --chunk chunk_002 --order results/chunk_002/ranking.csv --max-experiments 5

The features go to the folder of the chunk's results, as the batch command's do: it does not measure them again, given
the same options. A predictor of dynamic features needs the probe (a training of a few steps, thrown away); for any
other the probe is left out. Writes ``ranking.csv`` there: rows in the order in which they should be trained.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic_settings import CliApp
from rich import box
from rich.console import Console
from rich.table import Table

from raylora.commands.options import RankConfig
from raylora.config.run import Config
from raylora.console import make_console, print_notes
from raylora.errors import UserError
from raylora.planning.plan import Plan, find_files, make_plan
from raylora.predict.predictor import Predictor, load_predictor
from raylora.predict.ranking import rank
from raylora.predict.sentences import summary_of
from raylora.records import Experiment, ResultRow
from raylora.run.execute import run_pending
from raylora.storage.atomic import write_atomically
from raylora.storage.csv_files import write_csv

NO_RULE = (
    "Order: cheapest first (tokens of all epochs), as nothing is known of which is better: the best of any N is "
    "expected to be equally good. Each that is trained is a row more for the next fit."
)
RULE = (
    "Order: each next one raises most how good the best of those trained is expected to be (in draws from the "
    "predictor's held-out errors), so that a budget is not spent on several that are good or bad together."
)


def measure_features(plan: Plan, console: Console) -> pd.DataFrame:
    """A row for each experiment: names, settings, and its features, or the ``error`` that prevented them.

    Only features that are not in the store yet are measured, and put there. The run's tables stay as they are.

    Raises:
        StoppedError, KeyboardInterrupt: as ``run_plan``.
    """
    rows: dict[str, ResultRow] = {}
    with plan.store.held(plan.config.fresh):
        pending = [e for e in plan.experiments if not e.error and plan.store.read_stage(e, "features") is None]
        run_pending(plan, pending, rows, console, tables=None)
        return pd.DataFrame([_features_row(plan, e, rows.get(e.experiment_id)) for e in plan.experiments])


def _features_row(plan: Plan, experiment: Experiment, row: ResultRow | None) -> dict[str, Any]:
    features = plan.store.read_stage(experiment, "features") if not experiment.error else None
    error = experiment.error or ("" if features else (row.values.get("error") if row else "") or "not measured")
    names = {"dataset": experiment.dataset, "experiment_id": experiment.experiment_id, "error": error}
    cost = experiment.num_tokens * float(experiment.settings["num_epochs"])
    return {**names, "cost": cost, **experiment.settings, **(features or {})}


def print_ranking(ranking: pd.DataFrame, predictor: Predictor, console: Console) -> None:
    """Print what ``raylora.predict.ranking.rank`` returned: good rows in their order, then failures and a warning."""
    target = predictor.card["target"]
    table = Table(title=f"predicted {target}", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("train", "dataset", "prediction", "interval", "best of all", "best so far"):
        table.add_column(name, justify="left" if name == "dataset" else "right", no_wrap=name != "dataset")
    for _, row in ranking[ranking["error"] == ""].iterrows():
        numbers = [f"{row.prediction:z.4f}", f"{row.low:z.4f} {row.high:z.4f}", f"{row.chance_best:.0%}"]
        cells = (str(row["rank"]) if row.train else "-", str(row.dataset), *numbers, f"{row.expected_best:z.4f}")
        table.add_row(*cells)
    console.print(table)
    for _, row in ranking[ranking["error"] != ""].iterrows():
        console.print(f"FAILED {row.dataset}: {row.error}", soft_wrap=True)
    num_outside = int((ranking["outside"].fillna("") != "").sum())
    if num_outside:
        console.print(
            f"Note: {num_outside} datasets have features unlike those that the predictor was fitted on "
            "(column outside; of any 20 one has, by chance): their intervals may be too narrow.",
            soft_wrap=True,
        )
    console.print(RULE if predictor.is_better_than_mean else NO_RULE, soft_wrap=True)


def _notes(predictor: Predictor, config: RankConfig) -> Sequence[str]:
    card, notes = predictor.card, predictor.notes
    if card["needs_probe"]:
        notes.append(
            f"the predictor uses dynamic features: a probe of {config.probe_steps} steps is run on each dataset"
        )
    else:
        notes.append("the predictor uses no dynamic features: no probe is run")
    if card["base_models"] and config.model not in card["base_models"]:
        notes.append(f"the predictor was fitted on runs of {', '.join(card['base_models'])}, this is {config.model}")
    return notes


def next_command(config: RankConfig, order: Path) -> str:
    """The batch command that trains in this order, within the budget, with all options of this run spelled out."""
    options = {name: getattr(config, name) for name in Config.model_fields} | {"order": order, "fresh": False}
    if config.budget:
        options["max_experiments"] = config.budget
    return shlex.join(["python", "-m", "raylora.batch", *CliApp.serialize(Config.model_construct(**options))])


def run(config: RankConfig) -> int:
    console = make_console()
    predictor = load_predictor(config.predictor)
    order = "" if predictor.is_better_than_mean else "; datasets are ordered by cost alone"
    console.print(summary_of(predictor.card), soft_wrap=True)
    console.print(f"{predictor.verdict}{order}", soft_wrap=True)
    steps = config.probe_steps if predictor.card["needs_probe"] else 0
    if predictor.card["needs_probe"] and steps == 0:
        raise UserError("--probe-steps 0: the predictor uses dynamic features; give steps, or fit --leave-out dynamic")
    measuring = config.model_copy(update={"stages": ("features",), "probe_steps": steps, "trackers": ()})
    print_notes(console, _notes(predictor, measuring))
    chunk, files = find_files(measuring)
    plan = make_plan(measuring, files, chunk)
    table = measure_features(plan, console)
    ranking = rank(predictor, table, config.budget, config.coverage, config.seed)
    path = plan.store.root / "ranking.csv"
    write_atomically(path, lambda partial: write_csv(ranking, partial))
    plan.store.publish("ranking.csv")
    print_ranking(ranking, predictor, console)
    console.print(f"Files: {path}", soft_wrap=True)
    console.print(f"Next: {next_command(config, path)}", soft_wrap=True)
    return 0 if (ranking["error"] == "").all() else 1
