"""How a tokenizer's text is made: the date that its chat template is told, and special tokens written in the data.

A chat template's own special tokens (``<|im_end|>``, ``</s>``) are special; the same characters in a question, an
answer or a context are text. Both stand in one rendered string, so a record that has any is rendered with aliases in
their place, and tokenized by a copy of the tokenizer in which the special tokens themselves have these names:

    record          What is <|im_end|>?
    rendered        <|im_start|>user / What is {alias of im_end}? <|im_end|>
    swapped         {alias of im_start}user / What is <|im_end|>? {alias of im_end}

The copy has the same vocabulary, ids and rules, so that a text without any has the same tokens in both. transformers'
own ``sanitize_control_tokens`` (5.23) gives no offsets, and tokenizes what it marks apart from the text around it.
"""

from __future__ import annotations

import functools
import json
import re
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time
from string import ascii_letters
from typing import Any

from raylora.config.options import TEMPLATE_DATE, ModelOptions
from raylora.records import Example

LAST_ALIAS = 0x10FFFD
"""The last character for private use: aliases are counted down from here, and no text is expected to have them."""
MAX_KNOWN_TEXTS = 1000


@dataclass(frozen=True)
class Rendering:
    """The options of a tokenizer's text."""

    template_date: date = TEMPLATE_DATE
    allow_special_tokens: bool = False


def set_rendering(tokenizer: Any, options: ModelOptions) -> Any:
    """The tokenizer, whose text is made by these options from now on."""
    tokenizer.raylora_rendering = Rendering(options.template_date, options.allow_special_tokens)
    _KNOWN.pop(tokenizer, None)
    return tokenizer


def rendering_of(tokenizer: Any) -> Rendering:
    """What ``set_rendering`` gave it; the defaults for a caller's own tokenizer."""
    found: Rendering = getattr(tokenizer, "raylora_rendering", Rendering())
    return found


# The date


def dated_template(tokenizer: Any, tools: Any) -> str | None:
    """The chat template, if it asks for the date: one in which ``strftime_now`` is of the fixed date; else None.

    transformers gives templates that function, of the machine's clock, and takes no other in its place: so the template
    begins with a macro of that name.
    """
    if "strftime_now" not in str(tokenizer.chat_template):
        return None
    template = str(tokenizer.get_chat_template(None, tools))
    return _date_macro(rendering_of(tokenizer).template_date) + template


@functools.lru_cache(maxsize=8)
def _date_macro(day: date) -> str:
    moment = datetime.combine(day, time(), UTC)
    codes = {f"%-{code}": moment.strftime(f"%-{code}") for code in "dejmyHIMSuwUV"}
    codes |= {f"%{code}": moment.replace(tzinfo=None).strftime(f"%{code}") for code in ascii_letters}
    codes["%s"] = str(int(moment.timestamp()))  # strftime's depends on the machine's time zone
    replaced = "".join(f" | replace({code!r}, {text!r})" for code, text in codes.items() if text != code)
    # trim_blocks takes the line break behind a block away, and no other.
    return "{%- macro strftime_now(format) %}{{ format" + replaced + " | replace('%%', '%') }}{%- endmacro %}\n"


# Special tokens


class SpecialTokens:
    """The special tokens of a tokenizer, and texts in which they are written. ``special_tokens_of`` makes it."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend: Any = getattr(
            tokenizer, "backend_tokenizer", None
        )  # a slow tokenizer has none, and keeps its ways
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        control = getattr(tokenizer, "chat_control_tokens", None) or ()  # of transformers from 5.23 on
        special = [token.content for token in added if token.special or token.content in control]
        if rendering_of(tokenizer).allow_special_tokens or self._backend is None:
            special = []
        self._aliases = {text: chr(LAST_ALIAS - i) for i, text in enumerate(special)}
        self._partners = {**self._aliases, **{alias: text for text, alias in self._aliases.items()}}
        self._written = _any_of(special)
        self._swapped = _any_of(self._partners)
        self._all = tuple(token.content for token in added)
        self._marks = _any_of(self._all)
        self._has_mark: dict[str, bool] = {}

    def has_mark(self, text: str) -> bool:
        """Whether a text, such as what ends a turn, holds a special or another added token."""
        if text not in self._has_mark:
            if len(self._has_mark) > MAX_KNOWN_TEXTS:
                self._has_mark.clear()
            self._has_mark[text] = bool(self._marks and self._marks.search(text))
        return self._has_mark[text]

    def ends_with_mark(self, text: str) -> bool:
        """Whether a special or another added token stands at the end of a text."""
        return text.endswith(self._all)

    def is_in(self, *texts: str) -> bool:
        """Whether special tokens are written in data, and are to be text."""
        return self._written is not None and any(map(self._written.search, texts))

    def is_in_example(self, example: Example) -> bool:
        """``is_in`` of all that a chat template is told of an example."""
        turns = [text for m in example.messages for text in (m.content, m.extra) if text]
        return self.is_in(example.answer, example.tools, *turns)

    def hidden(self, text: str) -> str:
        """Data as a template is told it: with aliases in place of the special tokens that are written in it."""
        return self._written.sub(lambda match: self._aliases[match[0]], text) if self._written else text

    def hidden_example(self, example: Example) -> Example:
        """``hidden`` of an example."""
        messages = tuple(
            replace(m, content=self.hidden(m.content), extra=self.hidden(m.extra)) for m in example.messages
        )
        return replace(example, messages=messages, answer=self.hidden(example.answer), tools=self.hidden(example.tools))

    def swapped(self, text: str) -> str:
        """A rendered text with each special token and each alias in the other's place: what ``tokenize`` takes."""
        return self._swapped.sub(lambda match: self._partners[match[0]], text) if self._swapped else text

    def swapped_places(self, text: str, places: Sequence[int]) -> list[int]:
        """Where these places of a rendered text, in characters, are in ``swapped`` of it."""
        ends, shifts = [0], [0]
        for match in self._swapped.finditer(text) if self._swapped else ():
            ends.append(match.end())
            shifts.append(shifts[-1] + len(self._partners[match[0]]) - len(match[0]))
        return [place + shifts[bisect_right(ends, place) - 1] for place in places]

    def tokenize(
        self, texts: Sequence[str], add_special_tokens: bool
    ) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """The token ids of ``swapped`` texts, and (start, end) of each token, in characters of them."""
        encodings = self._renamed.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [e.ids for e in encodings], [e.offsets for e in encodings]

    @functools.cached_property
    def _renamed(self) -> Any:
        """The copy of the tokenizer. It is made only if there is such a text: with 128,000 tokens it takes a second."""
        from tokenizers import Tokenizer

        data = json.loads(self._backend.to_str())
        for token in data["added_tokens"]:
            if token["content"] in self._aliases:
                # An alias is found in the text as it is, whatever the normalizer makes of characters for private use.
                token |= {"content": self._aliases[token["content"]], "normalized": False}
        model = data["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {self._aliases.get(text, text): number for text, number in vocabulary.items()}
        else:  # of a unigram model: [text, score] each
            model["vocab"] = [[self._aliases.get(text, text), score] for text, score in vocabulary]
        if model.get("unk_token") in self._aliases:
            model["unk_token"] = self._aliases[model["unk_token"]]
        renamed = Tokenizer.from_str(json.dumps(data))
        renamed.no_truncation()
        renamed.no_padding()
        return renamed


def special_tokens_of(tokenizer: Any) -> SpecialTokens:
    """The special tokens of a tokenizer; the same object at each call."""
    if (known := _KNOWN.get(tokenizer)) is None:
        known = _KNOWN[tokenizer] = SpecialTokens(tokenizer)
    return known


_KNOWN: weakref.WeakKeyDictionary[Any, SpecialTokens] = weakref.WeakKeyDictionary()


def _any_of(texts: Sequence[str] | dict[str, str]) -> re.Pattern[str] | None:
    """Finds the longest of these texts; None where there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
