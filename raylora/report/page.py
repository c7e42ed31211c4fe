"""The page: a run's findings as JSON in one HTML file, with the style sheet and the script that draw them.

The page loads nothing from elsewhere: its content security policy forbids it, and allows no script but the page's own,
by its hash. So a dataset whose name is HTML does no harm: names come from users' files, and reach the page as JSON with
``<``, ``>`` and ``&`` escaped, or through Jinja's escaping, and the script inserts them as text.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from rich.console import Console

from raylora.config.run import Config
from raylora.report import findings
from raylora.report.outcomes import outcomes
from raylora.report.power import power_of_run
from raylora.report.read_run import FinishedRun, load_run
from raylora.report.transfer import transfer
from raylora.storage.atomic import write_text
from raylora.storage.store import Store

# Joined in this order: later ones use names of earlier ones.
SCRIPTS = ("core.js", "table.js", "ranking.js", "figures.js", "heatmap.js", "transfer.js", "sections.js")


def write_report(root: Path, price: float | None = None) -> Path:
    """Write ``report.html`` into a run's folder.

    Args:
        root: the run's folder, with ``results.parquet`` or ``results.csv``.
        price: of an hour of a GPU, in the reader's currency (default: the run's own ``--price``); it can be set on
            the page too.

    Returns:
        The page's path.

    Raises:
        UserError: there is no table in the folder, or none that can be read.
    """
    path = root / "report.html"
    write_text(path, render(load_run(root), price))
    return path


def try_write_report(store: Store, console: Console) -> None:
    """``write_report`` at the end of a run: an error is one warning, as the tables are worth more than the page."""
    try:
        store.collect()
        write_report(store.root)
        store.publish("report.html")
    except Exception as error:  # noqa: BLE001 - the tables are written, whatever it is
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        console.print(f"Warning: no report.html ({cause})", soft_wrap=True)


def render(run: FinishedRun, price: float | None = None) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=PackageLoader("raylora.report", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    assets = environment.loader
    assert assets is not None
    script = "".join(assets.get_source(environment, name)[0] for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = plain(page_data(run, price))
    page = environment.get_template("page.html").render(
        chunk=data["chunk"],
        data=htmlsafe_json_dumps(data, separators=(",", ":")),
        style=assets.get_source(environment, "page.css")[0],
        script=script,
        script_hash=digest,
        manifest=run.manifest,
        settings=settings_of(run),
        facts=facts_of(run),
        generated=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        num_rows=len(run.table),
        num_good=int(run.ok.sum()),
        has_transfer=data["transfer"] is not None,
        has_csv=(run.root / "results.csv").is_file(),
    )
    return page.encode("utf-8", "replace").decode()  # a file's name may hold bytes that are not UTF-8 (surrogates)


def page_data(run: FinishedRun, price: float | None) -> dict[str, Any]:
    """Everything that the script draws; lists by row have one entry for each row of the table, in its order."""
    folders = [run.folder(row) for row in range(len(run.table))]
    ranked = findings.ranking(run)
    return {
        "chunk": str(run.manifest.get("chunk") or run.root.absolute().name),
        "labels": run.labels,
        "ok": run.ok.tolist(),
        "folders": [None if folder is None else folder.name for folder in folders],
        "logs": [folder is not None and (folder / "log.txt").is_file() for folder in folders],
        "table": {
            "columns": [str(name) for name in run.table.columns],
            "values": [run.table[name].tolist() for name in run.table.columns],
        },
        "ranking": ranked,
        "outcomes": outcomes(run, ranked),
        "constant": findings.notes_on_constant_answers(run, ranked),
        "power": power_of_run(run, ranked),
        "subjects": findings.subjects(run),
        "transfer": transfer(run),
        "curves": findings.curves(run),
        "features": findings.features(run),
        "costs": findings.costs(run),
        "failures": findings.failures(run),
        "oddities": findings.oddities(run, ranked),
        "price": price if price is not None else _price_of(run),
    }


def _price_of(run: FinishedRun) -> float | None:
    configuration = run.manifest.get("configuration")
    price = configuration.get("price") if isinstance(configuration, dict) else None
    return float(price) if isinstance(price, int | float) else None


def plain(value: Any) -> Any:
    """A value in JSON's types: numpy's become Python's; NaN, infinity and pandas' NA become null; others, text."""
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else _text_or_none(value)


def _text_or_none(value: Any) -> str | None:
    # A missing value is not equal to itself: pandas' NaT, for example.
    return None if value is pd.NA or value != value else str(value)


def settings_of(run: FinishedRun) -> list[tuple[str, str, bool]]:
    """The run's options: name, value as text, and whether it differs from the default."""
    configuration = run.manifest.get("configuration")
    if not isinstance(configuration, dict):
        return []
    defaults = {name: field.get_default(call_default_factory=True) for name, field in Config.model_fields.items()}

    def differs(name: str, value: Any) -> bool:
        # As text too: the manifest's JSON has lists where defaults have tuples.
        return name in defaults and value != defaults[name] and _shown(value) != _shown(defaults[name])

    return [(str(name), _shown(value), differs(name, value)) for name, value in configuration.items()]


def facts_of(run: FinishedRun) -> list[tuple[str, dict[str, str]]]:
    """What else ``run.json`` says, by section: its title, and its facts by name, as text."""
    sections = {
        "Versions": run.manifest.get("versions"),
        "Machine": run.manifest.get("machine"),
        "Hashes": run.manifest.get("hashes"),
        "Hashes of the datasets": run.manifest.get("data_hashes"),
    }
    return [
        (title, {str(name): _fact(name, value) for name, value in facts.items()})
        for title, facts in sections.items()
        if isinstance(facts, dict) and facts
    ]


def _fact(name: str, value: Any) -> str:
    if name == "memory_bytes" and isinstance(value, int):
        return f"{value / 2**30:,.0f} GiB"
    if name == "gpus" and isinstance(value, list):
        return ", ".join(f"{num} × {gpu}" for gpu, num in Counter(map(str, value)).items())
    return _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None or value == {} else str(value)
