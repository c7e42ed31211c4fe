"""Chat templates that think, in the forms of published models, for the tiny tokenizer."""

from __future__ import annotations

import copy
from typing import Any

from tests.helpers.tiny import make_tokenizer

_TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n"
TEMPLATES = {
    # As Qwen3, SmolLM3: thinks unless it is told not to.
    "switch": _TURNS + _PROMPT + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    # As DeepSeek R1, QwQ: the prompt has begun the thoughts.
    "begun": _TURNS + _PROMPT + "<think>\n{% endif %}",
    # As Cohere's, with other marks.
    "other marks": _TURNS + _PROMPT + "<|START_THINKING|>{% endif %}",
    # As DeepSeek V3.1: the prompt has ended the thoughts.
    "ended": _TURNS + _PROMPT + "</think>{% endif %}",
    # Takes thoughts out of earlier turns: the model begins them itself.
    "known": "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}\n{% endfor %}",
}


def thinking_tokenizer(name: str) -> Any:
    """The tiny tokenizer with one of ``TEMPLATES``."""
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer
