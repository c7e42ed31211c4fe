"""Long texts are cut before they are tokenized: a tokenizer takes 400 bytes and 5 microseconds a character.

Of a text only the tokens around the beginning of the answer are kept (``encoding.encode_example``):

    front  |        . . . . . . . . . answer . . . . . . . . .        |  rest
           '-- max_length + MARGIN --'      '-- as many -----'

What is tokenized begins and ends where tokenizers split: before a space or a mark between two letters. Its tokens are
counted: where there are fewer than that, more is taken. The ``MARGIN`` next to a cut is never used, as a tokenizer
without such splits may need some tokens until it goes on as in the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

LONG = 100_000
"""Characters. Shorter texts are tokenized whole."""
CHARS_A_TOKEN = 16
"""What is taken at first; prose has 4 or 5, and a text of long runs of spaces more."""
MARGIN = 256
"""Tokens next to a cut that are not used."""
SEARCHED = 100_000
"""Characters in which a place for a cut is looked for. A text that has none, such as a million times the same letter,
is cut anyway: there alone tokens may differ from those of the whole text."""
PIECE = 50_000
"""Characters that are tokenized at a time where tokens are only counted."""
_PLACE = re.compile(r"(?<=[^\W\d_])[ ,.;:!?、。，；：！？](?=[^\W\d_])")

Tokens = tuple[list[int], list[tuple[int, int]]]
"""Ids, and (start, end) of each token in characters."""


def is_long(text: str, max_length: int) -> bool:
    """Whether it pays to cut a text of which ``max_length`` tokens are kept."""
    return len(text) > max(LONG, 4 * _reach(max_length))


def _reach(max_length: int) -> int:
    return CHARS_A_TOKEN * (max_length + MARGIN)


def tokenize_around(text: str, place: int, max_length: int, tokenize: Callable[[str], Tokens]) -> Tokens:
    """The tokens of a long text around ``place``, where its answer begins, at their places in the whole text.

    On each side these are all, or ``max_length + MARGIN`` at least: those that ``encode_example`` keeps are among them.

    Args:
        tokenize: gives the tokens of a part.
    """
    reach, needed = _reach(max_length), max_length + MARGIN
    while True:
        begin, end = place_before(text, place - reach), place_after(text, place + reach)
        ids, offsets = tokenize(text[begin:end])
        offsets = [(a + begin, b + begin) for a, b in offsets]
        num_before = next((i for i, (a, b) in enumerate(offsets) if b > max(a, place)), len(ids))
        is_enough_before = begin == 0 or num_before >= needed
        is_enough_behind = end == len(text) or len(ids) - num_before >= needed
        if is_enough_before and is_enough_behind:
            return ids, offsets
        reach *= 4


def place_before(text: str, target: int) -> int:
    """The last place before ``target`` where a text may be cut; 0 where all before it is near."""
    start = target - SEARCHED
    if target <= 0:
        return 0
    for searched in (1000, SEARCHED):
        found = [match.start() for match in _PLACE.finditer(text, max(target - searched, 0), target)]
        if found:
            return found[-1]
    return target if start > 0 else 0


def place_after(text: str, target: int) -> int:
    """The first place behind ``target`` where a text may be cut; its end where all behind it is near."""
    if target >= len(text):
        return len(text)
    found = _PLACE.search(text, target, target + SEARCHED)
    if found:
        return found.start()
    return target if target + SEARCHED < len(text) else len(text)


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces that together have its tokens, but for some at the places where they meet."""
    begin = 0
    while begin < len(text):
        end = place_after(text, begin + PIECE)
        yield text[begin:end]
        begin = end
