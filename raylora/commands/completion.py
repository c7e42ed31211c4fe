"""A script for a shell that completes commands, options and files.

raylora completion bash > ~/.local/share/bash-completion/completions/raylora
"""

from __future__ import annotations

import shtab

from raylora.commands.options import CompletionConfig
from raylora.commands.run_command import PROGRAM, make_parser


def run(config: CompletionConfig) -> int:
    print(shtab.complete(make_parser(PROGRAM, "raylora"), config.shell))
    return 0
