"""Every command: its options are read before anything heavy is imported; then it runs, and ends with an exit code.

    python -m raylora.batch --help
    raylora --help                    # the same commands, in one program

Exit code 0: all is good; 1: some rows failed, or the run ended early; 2: wrong use; 130: Ctrl-C; 143: SIGTERM.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import NoReturn

from raylora import __version__
from raylora.commands import options
from raylora.config import CommonOptions, Config
from raylora.config_sources import OptionParser, Settings, settings_from_command
from raylora.errors import MachineError, RemoteError, StoppedError, UserError


@dataclass(frozen=True)
class Command:
    """What it takes, and the function of ``raylora.commands`` that does it, imported when it is called."""

    settings: type[Settings]
    work: str
    about: str = ""

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
COMMANDS: dict[str, Command | Group] = {
    "batch": Command(Config, "batch:run", "Train, evaluate and describe every dataset of a chunk."),
    "experiment": Command(options.ExperimentConfig, "experiment:run"),
    "mmlu": Command(options.MmluConfig, "mmlu:run"),
    "features": Command(options.FeaturesConfig, "features:run"),
    "predict": PREDICT,
    "rank": Command(options.RankConfig, "rank:run"),
    "report": Command(options.ReportConfig, "report:run"),
}
PROGRAM = Group(
    "Which of these datasets makes my model better, and could I have known before training?",
    {
        **COMMANDS,
        "schema": Command(options.SchemaConfig, "schema:run"),
        "completion": Command(options.CompletionConfig, "completion:run"),
    },
)


def program(argv: list[str] | None = None) -> NoReturn:
    """The console program ``raylora``."""
    _end(PROGRAM, "raylora", sys.argv[1:] if argv is None else argv)


def run_command(name: str, argv: list[str] | None = None) -> NoReturn:
    """``python -m raylora.batch`` and its sisters."""
    _end(COMMANDS[name], f"python -m raylora.{name}", sys.argv[1:] if argv is None else argv)


def call_command(name: str, argv: list[str]) -> int:
    """A command of the program in this process; its exit code.

    Raises:
        UserError: wrong use, in one line.
        StoppedError, RemoteError, KeyboardInterrupt: it did not come to its end.
        SystemExit: 0 after ``--help``; 143 after SIGTERM.
    """
    return _work(*_read(PROGRAM.commands[name], f"raylora {name}", argv))


def make_parser(command: Command | Group, prog: str) -> OptionParser:
    """The options of a command, or of all of a group."""
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
    given = make_parser(command, prog).parse(argv)
    chosen: Command = given["_command"]
    return chosen, settings_from_command(chosen.settings, given)


def _work(command: Command, config: Settings) -> int:
    from raylora.run.interrupts import exit_on_sigterm

    with exit_on_sigterm():
        code: int = resolve_name(f"raylora.commands.{command.work}")(config)
    return code


def _end(command: Command | Group, prog: str, argv: Sequence[str]) -> NoReturn:
    """Read, run, and exit: what goes wrong is one line on stderr."""
    config = None
    try:
        chosen, config = _read(command, prog, argv)
        code = _work(chosen, config)
    except (UserError, MachineError) as error:
        code = _say(f"raylora: {error}", 2)
    except RemoteError as error:
        code = _say(f"raylora: {error.strerror}", 2)
    except StoppedError as error:
        code = _say(f"{error} {_how_to_go_on(config)}", 1)
    except KeyboardInterrupt:
        code = _say(f"Stopped. {_how_to_go_on(config)}", 130)
    except BrokenPipeError:
        code = 1
    sys.exit(code)


def _say(line: str, code: int) -> int:
    print(line.rstrip(), file=sys.stderr)
    return code


def _how_to_go_on(config: Settings | None) -> str:
    """After a run that ended early; nothing where nothing is kept."""
    if not isinstance(config, CommonOptions):
        return ""
    without = " without --fresh" if config.fresh else ""
    return f"What is finished is kept: the same command{without} goes on from here."
