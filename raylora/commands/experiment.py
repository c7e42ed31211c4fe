"""One dataset, in this process, without a cluster.

python -m raylora.experiment FILE --model demo --mmlu demo
"""

from __future__ import annotations

from pathlib import Path

from raylora.commands.options import ExperimentConfig
from raylora.console import make_console, print_notes
from raylora.experiment.story import run_experiment
from raylora.experiment.workbench import Workbench, use_threads
from raylora.planning.plan import make_plan
from raylora.planning.show_plan import print_plan
from raylora.report.terminal import print_results
from raylora.rows import ROW_COLUMNS
from raylora.run.further_tables import further_tables
from raylora.run.pushes import Pushes, pushing
from raylora.storage.places import check_regular


def run(config: ExperimentConfig) -> int:
    if isinstance(config.file, Path):
        check_regular(config.file)  # within a chunk it is an error row; here it is all that was asked for
    plan = make_plan(config, [config.file], "single")
    console = make_console()
    print_notes(console, plan.notes)
    if config.dry_run:
        print_plan(plan, console)
        return 0
    use_threads(config)
    with plan.store.held(config.fresh):
        bench, done = Workbench(config, plan.store), plan.done()
        if len(done) < len(plan.experiments):
            plan.check_fit()
            plan.write_columns()
        rows = [done.get(e.experiment_id) or run_experiment(bench, e) for e in plan.experiments]
        plan.store.write_tables(rows, ROW_COLUMNS)
        for table in further_tables(plan):
            table.write(rows)
        pushes = Pushes(plan, console)
        with pushing(pushes, rows):
            pass
    print_results(rows, plan.store)
    return 0 if all(row.ok for row in rows) and not pushes.failures else 1
