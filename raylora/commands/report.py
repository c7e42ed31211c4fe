"""The page of a finished or half-finished run, written again.

python -m raylora.report results/chunk_001
python -m raylora.report results/chunk_001 --price 2.5    # of a GPU-hour, for the costs
"""

from __future__ import annotations

from raylora.commands.options import ReportConfig
from raylora.errors import UserError
from raylora.report.page import write_report
from raylora.texts import shown_line


def run(config: ReportConfig) -> int:
    try:
        path = write_report(config.folder, config.price)
    except OSError as error:
        raise UserError(f"{config.folder}: the report cannot be written there: {error.strerror}") from error
    print(shown_line(path))
    return 0
