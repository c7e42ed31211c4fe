"""All commands: read a command's options before anything heavy is imported, run it, and exit with a code.

    python -m raylora.batch --help
    raylora --help                    # the same commands, in one program

Exit code 0: all is good; 1: some rows failed, or the run ended early; 2: wrong use; 130: Ctrl-C; 143: SIGTERM.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import NoReturn

from raylora import __version__
from raylora.cluster.watcher import can_be_watched, watched
from raylora.commands import options
from raylora.config.run import CommonOptions, Config
from raylora.config.sources import OptionParser, Settings, settings_from_command
from raylora.console import outlasting_terminal, quietly
from raylora.errors import MachineError, RemoteError, StoppedError, UserError
from raylora.texts import LineFormatter, print_traceback, shown_line

TERMINATED = 143
"""The exit code after SIGTERM."""


@dataclass(frozen=True)
class Command:
    """A command of the program."""

    settings: type[Settings]
    """The class of its options."""
    work: str
    """Its function, ``module:name`` in ``raylora.commands``; imported only when the command runs."""
    about: str = ""
    """What ``--help`` says of it; empty: the docstring of ``settings``."""
    is_run: bool = False
    """Whether it goes on when its terminal is gone, and nobody reads what it prints."""
    on_ray: bool = False
    """Whether it runs in a process that its own watches over, as Ray may end the one that uses it."""

    @property
    def summary(self) -> str:
        return self.about or str(self.settings.__doc__)


@dataclass(frozen=True)
class Group:
    """Commands behind one name."""

    summary: str
    commands: Mapping[str, Command | Group]


PREDICT = Group(
    """\
Can the outcome of a training be known before it? Fit a predictor to finished runs, use it, ask it why.

    python -m raylora.predict fit TABLE [--target accuracy_change] [--leave-out dynamic] [--output results/predictor]
    python -m raylora.predict predict PREDICTOR TABLE [--output predictions.csv]
    python -m raylora.predict explain PREDICTOR

TABLE is the folder of a run, its results.csv or results.parquet, or any table with columns of these names. PREDICTOR is
what fit writes: a folder with the model (predictor.skops), its figures as JSON, its errors on held-out rows as CSV
and a calibration figure. fit --help and so on show all options.""",
    {
        "fit": Command(options.FitConfig, "predict:fit"),
        "predict": Command(options.PredictConfig, "predict:predict"),
        "explain": Command(options.ExplainConfig, "predict:explain"),
    },
)
QUESTIONS = Group(
    "The questions of a benchmark, in the files where raylora looks for them.",
    {"mmlu": Command(options.QuestionsConfig, "questions:run_mmlu")},
)
COMMANDS: dict[str, Command | Group] = {
    "batch": Command(Config, "batch:run", "Train, evaluate and describe every dataset of a chunk.", True, True),
    "experiment": Command(options.ExperimentConfig, "experiment:run", is_run=True),
    "mmlu": Command(options.MmluConfig, "mmlu:run", is_run=True),
    "features": Command(options.FeaturesConfig, "features:run", is_run=True, on_ray=True),
    "predict": PREDICT,
    "rank": Command(options.RankConfig, "rank:run", is_run=True, on_ray=True),
    "report": Command(options.ReportConfig, "report:run"),
}
PROGRAM = Group(
    "Which of these datasets makes my model better, and could I have known before training?",
    {
        **COMMANDS,
        "questions": QUESTIONS,
        "merge": Command(options.MergeConfig, "merge:run"),
        "schema": Command(options.SchemaConfig, "schema:run"),
        "completion": Command(options.CompletionConfig, "completion:run"),
    },
)


def program(argv: list[str] | None = None) -> NoReturn:
    """The console program ``raylora``."""
    _end(PROGRAM, "raylora", sys.argv[1:] if argv is None else argv)


def run_command(name: str, argv: list[str] | None = None) -> NoReturn:
    """``python -m raylora.batch`` and the other commands that have a module."""
    _end(COMMANDS[name], f"python -m raylora.{name}", sys.argv[1:] if argv is None else argv)


def call_command(name: str, argv: list[str]) -> int:
    """Run a command of the program in this process, and return its exit code.

    Raises:
        UserError: wrong use, in one line.
        StoppedError, RemoteError, KeyboardInterrupt: it did not come to its end.
        SystemExit: 0 after ``--help``; 143 after SIGTERM.
    """
    return _work(*_read(PROGRAM.commands[name], f"raylora {name}", argv))


def make_parser(command: Command | Group, prog: str) -> OptionParser:
    """A parser of a command's options, or of a group's commands and their options."""
    parser = OptionParser(prog=prog, description=command.summary)
    if command is PROGRAM:
        parser.add_argument("--version", action="version", version=f"raylora {__version__}")
    _add_command(parser, command)
    return parser


def _add_command(parser: OptionParser, command: Command | Group) -> None:
    if isinstance(command, Command):
        parser.add_options(command.settings)
        parser.set_defaults(_command=command)
        return
    names = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, part in command.commands.items():
        summary = part.summary
        _add_command(names.add_parser(name, help=summary.splitlines()[0], description=summary), part)


def _read(command: Command | Group, prog: str, argv: Sequence[str]) -> tuple[Command, Settings]:
    parsed = make_parser(command, prog).parse(argv)
    chosen: Command = parsed["_command"]
    return chosen, settings_from_command(chosen.settings, parsed)


def _work(command: Command, config: Settings) -> int:
    from raylora.console import make_console, print_notes
    from raylora.run.interrupts import exit_on_sigterm
    from raylora.storage.damage import damage_told

    console = make_console()
    with (
        outlasting_terminal() if command.is_run else contextlib.nullcontext(),
        exit_on_sigterm(),
        damage_told(lambda line: print_notes(console, [line])),
    ):
        code: int = resolve_name(f"raylora.commands.{command.work}")(config)
    return code


def _end(command: Command | Group, prog: str, argv: Sequence[str]) -> NoReturn:
    """Read the options, run the command and exit; an error is one line on stderr."""
    config: Settings | None = None
    sys.excepthook = print_traceback
    if logging.lastResort:  # warnings that no handler takes
        logging.lastResort.setFormatter(LineFormatter())

    def read_and_work() -> int:
        nonlocal config
        chosen, settings = _read(command, prog, argv)
        config = settings
        if chosen.on_ray and can_be_watched():
            return watched(lambda: _exit_code(lambda: _work(chosen, settings), advice))
        return _work(chosen, settings)

    def advice() -> str:
        return _how_to_go_on(config)

    sys.exit(_exit_code(read_and_work, advice))


def _exit_code(work: Callable[[], int], advice: Callable[[], str]) -> int:
    """Do ``work``, and print what ended it early. ``advice`` says how to continue."""
    try:
        return work()
    except (UserError, MachineError) as error:
        return _print_error(f"raylora: {error}", 2)
    except RemoteError as error:
        return _print_error(f"raylora: {error.strerror}", 2)
    except StoppedError as error:
        return _print_error(f"{error} {advice()}", 1)
    except KeyboardInterrupt:
        return _print_error(f"Stopped. {advice()}", 130)
    except BrokenPipeError:  # whoever read the output, such as `head`, has ended
        return 1
    except SystemExit as stop:
        if stop.code != TERMINATED:
            raise
        return _print_error(f"Stopped by SIGTERM. {advice()}", TERMINATED)


def _print_error(line: str, code: int) -> int:
    """Print a line to stderr, and return ``code``."""
    quietly(print, shown_line(line.rstrip()), file=sys.stderr, flush=True)
    return code


def _how_to_go_on(config: Settings | None) -> str:
    """How to continue a run that ended early; empty for commands that keep nothing, and where no option was read."""
    if not isinstance(config, CommonOptions):
        return ""
    without = " without --fresh" if config.fresh else ""
    return f"What is finished is kept: the same command{without} resumes from here."
