"""Words of a text, in any script."""

from __future__ import annotations

import regex

WORD = regex.compile(r"[\p{Han}\p{Hiragana}]|(?:(?![\p{Han}\p{Hiragana}])[\w\p{M}])+")
_ASCII_WORD = regex.compile(r"\w+", regex.ASCII)  # says the same of ASCII


def words_of(text: str) -> list[str]:
    """Unicode words, case-folded: runs of letters, marks, digits and underscores.

    Marks belong to their letter: vowels of Indic scripts are such. Where a script writes no spaces, each ideograph is a
    word, as in Unicode's rules (UAX 29).
    """
    folded = text.casefold()
    words: list[str] = (_ASCII_WORD if folded.isascii() else WORD).findall(folded)
    return words
