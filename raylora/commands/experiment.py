"""One dataset, in this process, without a cluster.

python -m raylora.experiment FILE --model demo --mmlu demo
"""

from __future__ import annotations

from raylora.config import load_config
from raylora.console import make_console
from raylora.errors import UserError
from raylora.experiment.story import run_experiment
from raylora.experiment.workbench import Workbench, use_threads
from raylora.planning.plan import make_plan
from raylora.rows import ROW_COLUMNS
from raylora.storage.places import location


def main(argv: list[str]) -> int:
    """``python -m raylora.experiment FILE [options]``: one dataset, in this process, without a cluster."""
    from raylora.report.terminal import print_results

    if not argv or (argv[0].startswith("-") and argv[0] not in {"-h", "--help"}):
        raise UserError("name a dataset file first: python -m raylora.experiment FILE --model demo --mmlu demo")
    file = location(argv[0])
    config = load_config(argv if argv[0] in {"-h", "--help"} else argv[1:], prog="python -m raylora.experiment FILE")
    plan = make_plan(config, [file], "single")
    if config.dry_run:
        from raylora.planning.show_plan import print_plan

        print_plan(plan, make_console())
        return 0
    use_threads(config)
    with plan.store.held(config.fresh):
        bench, done = Workbench(config, plan.store), plan.done()
        if len(done) < len(plan.experiments):
            plan.check_fit()
        rows = [done.get(e.experiment_id) or run_experiment(bench, e) for e in plan.experiments]
        plan.store.write_tables(rows, ROW_COLUMNS)
    print_results(rows, plan.store)
    return 0 if all(row.ok for row in rows) else 1
