"""Turns of tools in templates that know them and in others, and turns of which nothing is to be learned."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylora.data.chat import render_chat
from raylora.data.encoding import IGNORE_INDEX, StoredEncoded, encode_each, encode_example, labels_of, supervised_counts
from raylora.data.parse_record import parse_record
from tests.helpers.formats import TEXT
from tests.helpers.templates import FORGETFUL, TEMPLATES
from tests.helpers.tiny import CHAT_TEMPLATE

HERMES = (
    "{% if tools %}<|im_start|>system\nTOOLS {% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
RECORD = {
    "messages": [
        {"role": "user", "content": "Weather in Ulm?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "tool_call_id": None},
        {"role": "tool", "content": "9 degrees"},
        {"role": "assistant", "content": "It rains."},
    ],
    "tools": '[{"name": "weather"}]',
}


def texts(tokenizer, example, train_on="answer"):
    encoded = encode_example(tokenizer, example, 4096)
    supervised = [t for t in labels_of(encoded, train_on) if t != IGNORE_INDEX]
    return tokenizer.decode(encoded.input_ids), tokenizer.decode(supervised)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (HERMES, ["TOOLS {", '<tool_call>weather {"city": "Ulm"}</tool_call>', "<|im_start|>tool\nrain<|im_end|>"]),
        (CHAT_TEMPLATE, ["Tools: [{", '"city": "Ulm"', "<|im_start|>tool\nrain<|im_end|>"]),
        (ALTERNATING, ["Tools: [{", '"city": "Ulm"', "<|im_start|>user\nrain\n\n9 degrees<|im_end|>"]),
        (None, ["System: Tools: [{", '"city": "Ulm"', "Tool: rain\n"]),
    ],
)
def test_tools_are_told_in_the_templates_own_way_or_as_text(tokenizer, monkeypatch, template, expected):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    (example,) = parse_record(RECORD).examples
    whole, supervised = texts(tokenizer, example)
    for part in expected:
        assert part in whole
    assert supervised.strip() == "It rains.<|im_end|>", "plain answers alone are learned"
    question = encode_example(tokenizer, example, 4096)
    asked = [t for t, is_asked in zip(question.input_ids, question.is_question, strict=True) if is_asked]
    assert tokenizer.decode(asked).strip() == "Weather in Ulm?"


def test_calls_of_sharegpt_are_those_of_openai(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", HERMES)
    turns = [("human", "Weather in Ulm?"), ("function_call", '{"name": "weather", "arguments": {"city": "Ulm"}}')]
    turns += [("observation", "rain"), ("observation", "9 degrees"), ("gpt", "It rains.")]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": RECORD["tools"]}
    (one,), (two,) = parse_record(RECORD).examples, parse_record(record).examples
    assert texts(tokenizer, one) == texts(tokenizer, two)
    assert one.context == "rain\n\n9 degrees"


def test_a_plain_text_is_supervised_whole_without_a_template(tokenizer):
    (example,) = parse_record({"text": "Two and two make four."}).examples
    for train_on in ("answer", "all"):
        whole, supervised = texts(tokenizer, example, train_on)
        assert whole.removeprefix("<|im_start|>") == "Two and two make four.<|im_end|>"
        assert supervised in whole
        assert len(supervised) > len("wo and two make four.")
    mixed = [example, *parse_record({"question": "Q", "answer": "A"}).examples, example]
    assert list(encode_each(tokenizer, mixed, 64)) == [encode_example(tokenizer, e, 64) for e in mixed]


def marked_conversation(contents, weights):
    turns = []
    for i, (content, weight) in enumerate(zip(contents, weights, strict=True)):
        turns.append({"role": "assistant" if i % 2 else "user", "content": content, "weight": weight})
    return {"messages": turns}


@pytest.mark.parametrize("template", [name for name, text in TEMPLATES.items() if text and name != "reasoning"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), contents=st.lists(TEXT, min_size=2, max_size=8).map(lambda c: c[: len(c) // 2 * 2]))
def test_all_learns_every_turn_but_those_marked(tokenizer, monkeypatch, template, data, contents):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[template])
    weights = [data.draw(st.sampled_from([0, 1])) if i % 2 else 1 for i in range(len(contents))]
    weights[-1] = 1
    contents = [f"W{i} {text}" for i, text in enumerate(contents)]
    examples = parse_record(marked_conversation(contents, weights)).examples
    assert [e.answer for e in examples] == [c for c, w in zip(contents[1::2], weights[1::2], strict=True) if w]
    learned = "".join(texts(tokenizer, e, "all")[1] for e in examples)
    for i, (content, weight) in enumerate(zip(contents, weights, strict=True)):
        assert (content.strip() in learned) == bool(weight), (i, learned)


@pytest.mark.parametrize("train_on", ["answer", "all"])
def test_marked_turns_of_a_forgetful_template_are_found_and_stored(tokenizer, monkeypatch, on_disk, train_on):
    monkeypatch.setattr(tokenizer, "chat_template", FORGETFUL)
    contents = [f"<think>\nT{i}\n</think>\n\nW{i}" if i % 2 else f"W{i}" for i in range(8)]
    examples = parse_record(marked_conversation(contents, [1, 0, 1, 1, 1, 0, 1, 1])).examples
    learned = "".join(texts(tokenizer, e, train_on)[1] for e in examples)
    assert [i for i in range(8) if f"W{i}" in learned] == ([0, 2, 3, 4, 6, 7] if train_on == "all" else [3, 7])
    plain = [encode_example(tokenizer, e, 4096) for e in examples]
    stored = StoredEncoded(iter(plain))
    assert list(stored) == plain
    counts = [sum(label != IGNORE_INDEX for label in labels_of(e, train_on)) for e in plain]
    assert supervised_counts(stored, train_on) == supervised_counts(plain, train_on) == counts


def test_a_template_that_refuses_all_is_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('never') }}")
    (example,) = parse_record(RECORD).examples
    with pytest.raises(ValueError, match="never"):
        render_chat(tokenizer, example.messages, False, example.tools)
