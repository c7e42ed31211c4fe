"""What all commands share: exit codes, and one line for what went wrong."""

from __future__ import annotations

import sys
from typing import Any

from raylora.errors import MachineError, RemoteError, UserError


def run_command(main: Any, argv: list[str] | None = None) -> None:
    """Run a command: a user's mistake, or an object store that says no, ends in one line on stderr and exit code 2."""
    try:
        code = main(sys.argv[1:] if argv is None else argv)
    except (UserError, MachineError) as error:
        print(f"raylora: {error}", file=sys.stderr)
        code = 2
    except RemoteError as error:
        print(f"raylora: {error.strerror}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:  # before there is anything to bring to an end
        print("Stopped.", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 1
    sys.exit(code)
