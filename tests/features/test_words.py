"""Words of every script."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raylora.features import words
from raylora.features.words import words_of


def test_words_of_every_script():
    for said, expected in {
        "The CAT's 3 straße_1!": ["the", "cat", "s", "3", "strasse_1"],
        "हिन्दी भाषा": ["हिन्दी", "भाषा"],
        "مُحَمَّد كتب": ["مُحَمَّد", "كتب"],
        "我喜欢ABC茶": ["我", "喜", "欢", "abc", "茶"],
        "ひらがな カタカナ": ["ひ", "ら", "が", "な", "カタカナ"],
        "🎉 ... —": [],
    }.items():
        assert words_of(said) == expected


@given(st.text(max_size=60))
def test_words_of_ascii_are_those_of_the_rule_for_all(said):
    assert [w for w in words_of(said) if w.isascii()] == [w for w in words.WORD.findall(said.casefold()) if w.isascii()]
