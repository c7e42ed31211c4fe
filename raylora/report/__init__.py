"""What a run found, for people to read: on the terminal, and as one page that needs nothing but a browser.

    python -m raylora.report results/chunk_001

The page is ``report.html`` in the run's folder; every run writes it at its end.
"""

from raylora.report.page import try_write_report, write_report
from raylora.report.terminal import print_results

__all__ = ["print_results", "try_write_report", "write_report"]
