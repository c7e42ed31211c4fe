"""Chat templates tried in a process of its own, which has seconds and memory to spare but no more.

A template is a program of whoever made the model: jinja2's sandbox keeps it from files and commands, not from loops
within loops or from ``'x' * 10**10``. The process is a fork, so that nothing is imported again: 20 ms.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raylora.data.rendered import render_example
from raylora.errors import ErrorKind, TemplateLimitError, UserError
from raylora.records import Example, Message

SECONDS = 20.0
"""For all examples. The templates of published models take a millisecond each."""
MEMORY_BYTES = 2 << 30
"""More than the process has at its start."""
OUT_OF_MEMORY, SWELLS = 41, 42
"""Exit codes."""
_USER, _ANSWER = Message("user", "What is it? " * 20), Message("assistant", "It is that. " * 20)
_TOOLS = '[{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}]'
CONVERSATIONS = (
    Example((_USER,), _ANSWER.content, _USER.content),
    Example((Message("system", "Be brief."), _USER), _ANSWER.content, _USER.content),
    Example((_USER, _ANSWER) * 8 + (_USER,), _ANSWER.content, _USER.content, num_repeated=16),
    Example((_USER,), _ANSWER.content, _USER.content, tools=_TOOLS),
)
"""Of the forms that datasets have."""


def check_template(tokenizer: Any, name: str | None) -> None:
    """Try the chat template on conversations of all forms, before it is used in this process.

    Args:
        name: what the user calls the model.

    Raises:
        UserError: it takes too long, or too much memory.
    """
    if tokenizer.chat_template and (why := template_failure(tokenizer, CONVERSATIONS)):
        raise UserError(f"--model {name}: its chat template {why}; take another model", kind=ErrorKind.MODEL)


def template_failure(tokenizer: Any, examples: Sequence[Example]) -> str:
    """What is wrong with the chat template where examples cannot be rendered within the limits; empty where they can.

    What it refuses is none of that: who renders it in earnest says why.
    """
    if not tokenizer.chat_template or not any(example.messages for example in examples):
        return ""
    process = multiprocessing.get_context("fork").Process(target=_render, args=(tokenizer, examples), daemon=True)
    process.start()
    process.join(SECONDS)
    if process.exitcode is None or process.exitcode == -signal.SIGXCPU:
        process.kill()
        process.join()
        return f"does not end within {SECONDS:.0f} seconds"
    if process.exitcode in {OUT_OF_MEMORY, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT}:
        return f"takes more than {MEMORY_BYTES >> 30} GiB of memory"
    return "makes far longer texts than it is told" if process.exitcode == SWELLS else ""


def _render(tokenizer: Any, examples: Sequence[Example]) -> None:
    """In the process. Its exit code is the result."""
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    # Where the command is killed meanwhile, this ends all the same.
    seconds = int(time.process_time() + SECONDS) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    code = 0
    for example in examples:
        try:
            render_example(tokenizer, example)
        except (MemoryError, UserError) as error:
            code = code or _code_of(error)
    os._exit(code)


def _code_of(error: BaseException | None) -> int:
    while error is not None:
        if isinstance(error, MemoryError):
            return OUT_OF_MEMORY
        if isinstance(error, TemplateLimitError):
            return SWELLS
        error = error.__cause__
    return 0
