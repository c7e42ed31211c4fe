"""The page: findings as JSON in one HTML file, with the style and the script that draw it.

The file asks for nothing from anywhere: a content security policy forbids it. Names come from users' files. They reach
the page as JSON whose ``<``, ``>`` and ``&`` are escaped, or through Jinja's escaping, and the script puts them in as
text; the policy lets no script run but the page's own, which it knows by its hash.
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

from raylora.config import Config
from raylora.report import findings
from raylora.report.read_run import FinishedRun, load_run
from raylora.storage.atomic import write_text
from raylora.storage.store import Store

SCRIPTS = ("core.js", "table.js", "ranking.js", "figures.js", "heatmap.js", "sections.js")


def write_report(root: Path, price: float | None = None) -> Path:
    """Write ``report.html`` into a run's folder.

    Args:
        price: of an hour of a GPU, in the reader's currency (default: the run's own ``--price``); it can be set on
            the page too.

    Raises:
        UserError: there is no table in the folder.
    """
    path = root / "report.html"
    write_text(path, render(load_run(root), price))
    return path


def try_write_report(store: Store, console: Console) -> None:
    """The same, at the end of a run whose rows must not be lost to it: what goes wrong is one line."""
    try:
        store.collect()
        write_report(store.root)
        store.publish("report.html")
    except Exception as error:  # noqa: BLE001 - whatever it is, the tables are written and worth more than the page
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        console.print(f"Warning: no report.html ({cause})", soft_wrap=True)


def render(run: FinishedRun, price: float | None = None) -> str:
    environment = Environment(
        loader=PackageLoader("raylora.report", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    source = environment.loader
    assert source is not None
    script = "".join(source.get_source(environment, name)[0] for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = plain(page_data(run, price))
    page = environment.get_template("page.html").render(
        chunk=data["chunk"],
        data=htmlsafe_json_dumps(data, separators=(",", ":")),
        style=source.get_source(environment, "page.css")[0],
        script=script,
        script_hash=digest,
        manifest=run.manifest,
        settings=settings_of(run),
        facts=facts_of(run),
        generated=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        num_rows=len(run.table),
        num_good=int(run.ok.sum()),
        has_csv=(run.root / "results.csv").is_file(),
    )
    return page.encode("utf-8", "replace").decode()  # a file's name may hold bytes that are no text


def page_data(run: FinishedRun, price: float | None) -> dict[str, Any]:
    """Everything the script draws."""
    return {
        "chunk": str(run.manifest.get("chunk") or run.root.absolute().name),
        "labels": run.labels,
        "ok": run.ok.tolist(),
        "folders": [None if (f := run.folder(row)) is None else f.name for row in range(len(run.table))],
        "logs": [(f := run.folder(row)) is not None and (f / "log.txt").is_file() for row in range(len(run.table))],
        "table": {
            "columns": [str(name) for name in run.table.columns],
            "values": [run.table[name].tolist() for name in run.table.columns],
        },
        "ranking": findings.ranking(run),
        "subjects": findings.subjects(run),
        "curves": findings.curves(run),
        "features": findings.features(run),
        "costs": findings.costs(run),
        "failures": findings.failures(run),
        "oddities": findings.oddities(run),
        "price": price if price is not None else _price_of(run),
    }


def _price_of(run: FinishedRun) -> float | None:
    configuration = run.manifest.get("configuration")
    price = configuration.get("price") if isinstance(configuration, dict) else None
    return float(price) if isinstance(price, int | float) else None


def plain(value: Any) -> Any:
    """Values that JSON knows: numpy's as Python's, what is no number as null, floats of findings as they are."""
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
    return None if value is pd.NA or value != value else str(value)


def settings_of(run: FinishedRun) -> list[tuple[str, str, bool]]:
    """The run's options: name, value, and whether it differs from what raylora does by itself."""
    configuration = run.manifest.get("configuration")
    if not isinstance(configuration, dict):
        return []
    defaults = {name: field.get_default(call_default_factory=True) for name, field in Config.model_fields.items()}

    def differs(name: str, value: Any) -> bool:
        return name in defaults and value != defaults[name] and _shown(value) != _shown(defaults[name])

    return [(str(name), _shown(value), differs(name, value)) for name, value in configuration.items()]


def facts_of(run: FinishedRun) -> list[tuple[str, dict[str, str]]]:
    """The rest of ``run.json``: versions, machine, hashes, each with its title."""
    groups = {
        "Versions": run.manifest.get("versions"),
        "Machine": run.manifest.get("machine"),
        "Hashes": run.manifest.get("hashes"),
        "Hashes of the datasets": run.manifest.get("data_hashes"),
    }
    return [
        (title, {str(name): _fact(name, value) for name, value in group.items()})
        for title, group in groups.items()
        if isinstance(group, dict) and group
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
