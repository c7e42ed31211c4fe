"""Split a text in any script into words."""

from __future__ import annotations

import regex

WORD = regex.compile(r"[\p{Han}\p{Hiragana}]|(?:(?![\p{Han}\p{Hiragana}])[\w\p{M}])+")
_ASCII_WORD = regex.compile(r"\w+", regex.ASCII)  # the same words of an ASCII text, by a simpler pattern


WORDS_WITHIN = 1_000_000
"""Characters of a text whose words are looked at: each word takes some 60 bytes, and as much again in its n-grams."""


def first_words(text: str) -> list[str]:
    """The words of a text, of a long one those of its first ``WORDS_WITHIN`` characters."""
    return words_of(text[:WORDS_WITHIN])


def words_of(text: str) -> list[str]:
    """Unicode words, case-folded: runs of letters, combining marks, digits and underscores.

    A combining mark is part of its word: without that, Indic words would be cut at their vowel signs. Chinese and
    Japanese write no spaces: each ideograph or hiragana is a word, as in Unicode's rules (UAX 29).
    """
    folded = text.casefold()
    words: list[str] = (_ASCII_WORD if folded.isascii() else WORD).findall(folded)
    return words
