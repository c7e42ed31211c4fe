"""What a chat template leaves out of an example: part of its answer, the end of a turn, the system turn."""

from __future__ import annotations

import copy

import pytest

from raylora.data.encoding import encode_each, encode_example
from raylora.data.rendered import TemplateCounts
from raylora.records import Example, Message
from tests.helpers.templates import FORGETFUL, TEMPLATES
from tests.helpers.tiny import CHAT_TEMPLATE

ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
DROPS_SYSTEM = CHAT_TEMPLATE.replace(
    "<|im_start|>{{ m['role'] }}", "{% if m['role'] == 'system' %}{% continue %}{% endif %}<|im_start|>{{ m['role'] }}"
)
SYSTEM_IN_LAST_QUESTION = (  # as Mistral's, where a conversation that ends in an answer has no last question
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.last and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}\n\n{% endif %}{{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %}"
    " {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WRITTEN_END = NO_END.replace("}}\n{% endfor", "}}</turn>{% endfor")
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% set c = m['content'] %}"
    "{% set thought = '' %}{% if '</think>' in c %}"
    "{% set thought = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ c }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = Message("system", "Speak like a pirate.")
ASKED = (Message("user", "What is ice?"),)
PLAIN = Example(ASKED, "Frozen water.", "What is ice?")
THOUGHT = Example(ASKED, "<think>\nIt is cold.\n</think>\n\nFrozen water.", "What is ice?")
TIGHT = Example(ASKED, "<think>It is cold.</think>Frozen water.", "What is ice?")


def encoded_with(tokenizer, template, example):
    """The counts, the text of all tokens, and that of the supervised ones."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    counts = TemplateCounts()
    (encoded,) = encode_each(tokenizer, [example], 512, counts)
    assert encoded == encode_example(tokenizer, example, 512)
    supervised = [t for t, is_answer in zip(encoded.input_ids, encoded.is_answer, strict=True) if is_answer]
    return counts, tokenizer.decode(encoded.input_ids), tokenizer.decode(supervised)


@pytest.mark.parametrize(
    ("template", "example", "is_cut"),
    [
        *((template, PLAIN, False) for template in TEMPLATES.values()),
        (TEMPLATES["reasoning"], THOUGHT, True),
        (TEMPLATES["reasoning"], TIGHT, True),
        (FORGETFUL, THOUGHT, False),
        (QWEN_3, THOUGHT, False),
        (QWEN_3, TIGHT, False),
        (QWEN_3, PLAIN, False),
        (TEMPLATES["llama 3"], Example(ASKED, "\n Frozen\nwater. \n", ""), False),
        (CHAT_TEMPLATE.replace("m['content']", "m['content'] | replace('\n', ' ')"), THOUGHT, False),
        (CHAT_TEMPLATE.replace("m['content']", "m['content'][:20]"), Example(ASKED, "water " * 9, ""), True),
        (CHAT_TEMPLATE.replace("m['content']", "m['content'] | upper"), PLAIN, True),
    ],
)
def test_an_answer_is_cut_where_more_than_white_space_is_missing(tokenizer, template, example, is_cut):
    counts, _, supervised = encoded_with(tokenizer, template, example)
    assert (counts.num_examples, counts.num_answers_cut) == (1, is_cut)
    assert counts.first_cut == (0 if is_cut else None)
    has_all = "".join(example.answer.split()) in "".join(supervised.split())
    assert has_all is not is_cut
    assert counts.num_without_end == 0
    assert ("a part of the answer of 1 of 1 examples" in counts.note) is is_cut


@pytest.mark.parametrize(
    ("template", "num"), [(NO_END, 1), (WRITTEN_END, 1), (NO_END.replace("\n{% endfor", "<|im_end|>\n{% endfor"), 0)]
)
def test_an_answer_that_nothing_ends_is_counted(tokenizer, template, num):
    counts, _, supervised = encoded_with(tokenizer, template, PLAIN)
    assert counts.num_without_end == num
    assert counts.note == (
        "no end-of-turn token stands behind the answer of 1 of 1 examples: the model does not learn to stop there"
        if num
        else ""
    )
    assert supervised.lstrip().startswith("Frozen water.")


def test_a_tokenizer_without_an_end_ends_no_text(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.eos_token = None
    own.chat_template = None
    counts = TemplateCounts()
    list(encode_each(own, [PLAIN, Example((), "A text.", "")], 64, counts))
    assert (counts.num_examples, counts.num_without_end) == (2, 2)


@pytest.mark.parametrize("template", [ALTERNATING, DROPS_SYSTEM, SYSTEM_IN_LAST_QUESTION, TEMPLATES["llama 2"]])
def test_a_system_turn_that_is_refused_or_dropped_begins_the_first_question(tokenizer, template):
    example = Example((SYSTEM, *ASKED), "Arr, frozen water.", "What is ice?")
    counts, text, supervised = encoded_with(tokenizer, template, example)
    assert "Speak like a pirate.\n\nWhat is ice?" in text
    assert (counts.num_systems_dropped, counts.num_answers_cut, counts.note) == (0, 0, "")
    assert supervised.strip().startswith("Arr, frozen water.")
    assert "pirate" not in supervised
    later = Example(
        (SYSTEM, *ASKED, Message("assistant", "Arr."), Message("user", "More?")), "No.", "More?", "", "c", 3
    )
    counts, text, supervised = encoded_with(tokenizer, template, later)
    assert (counts.num_systems_dropped, text.count("pirate")) == (0, 1)


def test_a_system_turn_that_stays_away_is_counted(tokenizer):
    only_answers = CHAT_TEMPLATE.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}"
    )
    counts, _, _ = encoded_with(tokenizer, only_answers, Example((SYSTEM, *ASKED), "Arr.", ""))
    assert counts.num_systems_dropped == 1
    assert counts.note == "the chat template leaves out the system turn of 1 of 1 examples"


def test_tools_are_told_where_a_template_drops_the_system_turn(tokenizer):
    example = Example(ASKED, "Frozen water.", "What is ice?", tools='[{"name": "look"}]')
    for template in (DROPS_SYSTEM, ALTERNATING, CHAT_TEMPLATE):
        counts, text, _ = encoded_with(tokenizer, template, example)
        assert '"look"' in text
        assert counts.note == ""


def test_what_a_tool_returns_and_the_question_behind_it_are_one_turn_where_turns_must_alternate(tokenizer):
    call = Message(
        "assistant", "", '{"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}'
    )
    turns = (SYSTEM, *ASKED, call, Message("tool", "cold"), Message("user", "So?"))
    counts, text, _ = encoded_with(tokenizer, ALTERNATING, Example(turns, "Frozen water.", "So?", "cold"))
    assert "[user]cold\n\nSo?<|im_end|>[assistant]Frozen water." in text
    assert not counts.refused


def test_refused_examples_are_left_out_and_named(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% if 'red' in messages[0]['content'] %}{{ raise_exception('no\nred') }}{% endif %}" + CHAT_TEMPLATE
    )
    examples = [Example((Message("user", f"{c} {i}"),), "Yes.", "") for i, c in enumerate(["red", "blue"] * 150)]
    counts = TemplateCounts()
    encoded = list(encode_each(own, examples, 64, counts))
    assert encoded == [encode_example(own, e, 64) for e in examples[1::2]]
    assert (counts.num_examples, list(counts.refused)) == (150, list(range(0, 300, 2)))
    assert "refuses the conversation that ends in 'user: red 0 / assistant: Yes.': no red" in counts.refused[0] or (
        "refuses the conversation that ends in 'user: red 0': no red" in counts.refused[0]
    )
    assert sum(map(bool, counts.refused.values())) == 100, "the reasons of the first ones are kept"
    assert counts.note_on_sample == "the chat template refuses 150 of the first 300 examples"
