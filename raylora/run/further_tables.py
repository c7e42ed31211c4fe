"""What is written beside ``results.csv``."""

from __future__ import annotations

from raylora.planning.plan import Plan
from raylora.report.harness_results import HarnessResults
from raylora.report.transfer_tables import TransferTables
from raylora.storage.tables import RowsTable


def further_tables(plan: Plan) -> list[RowsTable]:
    """What is written beside ``results.csv`` of a run that scores adapters."""
    tables: list[RowsTable] = [TransferTables(plan.store)] if plan.columns else []
    if "mmlu" in plan.config.stages and plan.experiments:
        tables.append(HarnessResults(plan.store, plan.experiments[0].base_key, plan.config.question_sets))
    return tables
