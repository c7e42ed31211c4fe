"""Generated answers (``--scoring generate``), and the letter that each one names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from raylora.data.minibatch import pad_left
from raylora.mmlu.prompts import EncodedQuestion
from raylora.mmlu.questions import LETTERS

MAX_NEW_TOKENS = 10


def write_answers(model: Any, tokenizer: Any, batch: Sequence[EncodedQuestion], pad: int) -> list[str]:
    """Generate an answer to each prompt: greedily, at most ten tokens. Returns a text for each of ``batch``.

    Args:
        pad: id of the padding token; prompts are padded on the left.
    """
    from transformers import GenerationConfig

    inputs = pad_left([e.context_ids for e in batch], pad, model.device)
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=pad,
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )
    output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, generation_config=config)
    texts: list[str] = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


_OPEN, _CLOSE = r"[\s*_(\[\"']*", r"(?=$|[\s.,:;)\]*_\"'!?])"
_ANSWER_PATTERNS = (
    # The letter comes first: "C", "(C)", "C.", "C) banana", "**C**". Before a space and a word it is none: "A cat".
    re.compile(rf"^{_OPEN}([A-Da-d])(?:$|[.,:;)\]*_\"'!?]|\s*\n)"),
    # The letter comes later: "The answer is C", "Answer: (C)", "the correct option is option C".
    re.compile(rf"\b(?:answer|option|choice)\b(?:\s+is)?(?:\s+(?:option|choice))?\s*:?{_OPEN}([A-Da-d]){_CLOSE}", re.I),
)


def parse_answer(text: str) -> int | None:
    """The choice that a generated text names, 0 to 3; None where it names none clearly."""
    text = text.strip()
    for pattern in _ANSWER_PATTERNS:
        if match := pattern.search(text):
            return LETTERS.index(match[1].upper())
    return None
