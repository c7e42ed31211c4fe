"""Generated answers (``--scoring generate``), and the letter that each one names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from raylora.data.minibatch import pad_left
from raylora.mmlu.letters import marks_thought, open_thought, read_letter
from raylora.mmlu.prompts import THINKING_TOKENS, EncodedQuestion, Thinking

MAX_NEW_TOKENS = 10
TEMPLATE_TOKENS = 16
"""Tokens at the end of a prompt in which a template's mark of thinking is looked for: the question is before them."""


def max_new_tokens(thinking: Thinking) -> int:
    """The most tokens that a written answer may have."""
    return THINKING_TOKENS if thinking == "on" else MAX_NEW_TOKENS


def write_answers(
    model: Any, tokenizer: Any, batch: Sequence[EncodedQuestion], pad: int, thinking: Thinking = ""
) -> list[str]:
    """Generate an answer to each prompt: greedily, at most ten tokens, or 1024 with thoughts before it.

    Args:
        pad: id of the padding token; prompts are padded on the left.

    Returns:
        A text for each of ``batch``. A thinking part that its prompt has begun is begun in the text, too.
    """
    from transformers import GenerationConfig

    inputs = pad_left([e.context_ids for e in batch], pad, model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens(thinking),
        do_sample=False,
        pad_token_id=pad,
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )
    output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, generation_config=config)
    # Some tokenizers have the marks of thinking among their special tokens, which are skipped otherwise.
    marked = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=thinking != "on")
    if thinking != "on":
        return list(marked)
    others = "|".join(re.escape(token) for token in tokenizer.all_special_tokens if not marks_thought(token))
    texts = [re.sub(others, "", text) if others else text for text in marked]
    openings = [open_thought(tokenizer.decode(e.context_ids[-TEMPLATE_TOKENS:])) for e in batch]
    return [f"{opening or ''}{text}" for opening, text in zip(openings, texts, strict=True)]


def parse_answer(text: str, num_choices: int = 4) -> int | None:
    """The choice that a generated text names, from 0; None where it names none clearly. See ``letters.py``."""
    return read_letter(text, num_choices)
