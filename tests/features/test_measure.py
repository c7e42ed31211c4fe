"""Where sentences begin and end."""

from __future__ import annotations

from raylora.features.measure import sentence_slices


def test_sentences_are_found_in_other_scripts(tokenizer):
    for answer, expected in {
        "One two. Three four! Five six?": 3,
        'It costs 3.50 dollars, says www.example.com today. "Too much!" said he.': 3,
        "वह आया। वह गया।": 2,
        "हل هذا كتاب؟ هذه مدرسة.": 2,
        "今天下雨。明天晴天。": 2,
        "هذا كتاب. هذه مدرسة.": 2,
        "First line\nSecond line": 2,
        "Ok. Yes.": 0,
        "...": 0,
    }.items():
        offsets = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert len(sentence_slices(answer, offsets)) == expected, answer
