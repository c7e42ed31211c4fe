"""Every form that a record may have, and files of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(lambda s: s.strip())
FORMATS = {
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "conversations": lambda q, a: {"conversations": [{"role": "user", "content": q}, {"role": "model", "content": a}]},
    "parts": lambda q, a: {
        "messages": [{"role": "user", "content": [{"type": "text", "text": q}]}, {"role": "assistant", "content": a}]
    },
    "input/output": lambda q, a: {"input": q, "output": a},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "dolly": lambda q, a: {"instruction": q, "context": "", "response": a, "category": "open_qa"},
    "question/answer": lambda q, a: {"question": q, "answer": a},
    "prompt/completion": lambda q, a: {"prompt": q, "completion": a},
    "prompt/response": lambda q, a: {"prompt": q, "response": a},
    "final": lambda q, a: {"context_text": "", "qa_pairs": [{"question": q, "output": a}]},
}


def conversation(contents: list[str]) -> dict[str, object]:
    """A record of several turns, the user's first."""
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


PAIRS = [(f"What is {i} and {i % 7}?", f"It is {i + i % 7}, of course.") for i in range(40)]


def write_data(folder: Path, value: object, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path
