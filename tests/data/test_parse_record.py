"""Every format, and every kind of bad record."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylora.data.datasets import read_dataset, survey
from tests.helpers.formats import FORMATS, TEXT, conversation, write_data


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("lines", [False, True])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), bom=st.booleans())
def test_every_format_comes_back_as_it_was(tmp_path, form, lines, pairs, bom):
    records = [FORMATS[form](q, a) for q, a in pairs]
    text = "\n".join(json.dumps(r) for r in records) if lines else json.dumps(records)
    path = tmp_path / ("data.jsonl" if lines else "data.json")
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    dataset = read_dataset(path)
    assert [(e.messages[-1].content, e.answer) for e in dataset.examples] == pairs
    assert (dataset.num_items, dataset.num_bad_records) == (len(pairs), 0)


def test_contexts_and_inputs_are_known_apart_from_the_question(tmp_path):
    records = [
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        {"context_text": "Cats purr.", "qa_pairs": [{"question": "Who?", "output": "Cats"}]},
        FORMATS["messages"]("背景: 猫会叫。\n\n问题: 谁会叫?", "猫"),
        FORMATS["messages"]("Context: Dogs bark.\n\nQuestion: Who barks?", "Dogs"),
        FORMATS["messages"]("Sort these\n\n输入: 3, 1, 2", "1, 2, 3"),
        {"question": "Who?", "answer": "Owls", "context": "Owls hoot.", "system": "Be brief."},
    ]
    dataset = read_dataset(write_data(tmp_path, records))
    assert [(e.context, e.question) for e in dataset.examples] == [
        ("1 and 2", "Add"),
        ("Cats purr.", "Who?"),
        ("猫会叫。", "谁会叫?"),
        ("Dogs bark.", "Who barks?"),
        ("3, 1, 2", "Sort these"),
        ("Owls hoot.", "Who?"),
    ]
    assert dataset.examples[0].messages[-1].content == "Add\n\n1 and 2"
    assert dataset.examples[1].messages[-1].content == "Context: Cats purr.\n\nQuestion: Who?"
    assert dataset.examples[5].messages[0].role == "system"


def test_several_turns_make_an_example_for_each_answer(tmp_path):
    turns = [("system", "S"), ("human", "Q1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "A2"), ("human", "bye")]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    examples = read_dataset(write_data(tmp_path, [record])).examples
    assert [e.answer for e in examples] == ["A1", "A2"]
    assert [m.content for m in examples[1].messages] == ["S", "Q1", "A1", "Q2"]


def test_bad_records_are_counted_with_place_and_reason(tmp_path):
    good = {"question": "Q", "answer": "A"}
    bad = {
        "an object": 7,
        "its keys are foo": {"foo": 1},
        "answer is empty": {"question": "Q", "answer": " "},
        "answer: expected text, found a list": {"question": "Q", "answer": [3]},
        "its keys are answer (null: question)": {"question": None, "answer": "A"},
        "half a character": {"question": "Q", "answer": "\ud800"},
        "role narrator": {"messages": [{"role": "narrator", "content": "x"}]},
        "no user turn": {"messages": [{"role": "assistant", "content": "x"}]},
        "there is no assistant turn": {"messages": [{"role": "user", "content": "x"}]},
        "its conversation is empty": {"messages": []},
        "no text": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "qa_pairs is empty": {"context_text": "c", "qa_pairs": []},
    }
    path = tmp_path / "data.json"
    path.write_text(json.dumps([good, *bad.values(), good]))
    dataset = read_dataset(path)
    assert (len(dataset.examples), dataset.num_items, dataset.num_bad_records) == (2, 2 + len(bad), len(bad))
    for number, (expected, found) in enumerate(zip(bad, dataset.bad_records, strict=True), 2):
        assert found.place == f"record {number}"
        assert expected in found.reason


def test_a_bad_pair_costs_only_itself(tmp_path):
    record = {"context_text": "c", "qa_pairs": [{"question": "Q", "output": "A"}, {"question": "Q"}]}
    dataset = read_dataset(write_data(tmp_path, [record]))
    assert len(dataset.examples) == 1
    assert dataset.bad_records[0].place == "record 1, qa_pairs[2]"


@pytest.mark.parametrize("text", ["\n" * 500_000 + "x", "Context:" + " " * 500_000, "Context: a\n\n" * 50_000])
def test_long_questions_take_no_longer_than_they_are(tmp_path, text):
    started = time.thread_time()
    read_dataset(write_data(tmp_path, [FORMATS["messages"](text, "A")]))
    assert time.thread_time() - started < 20  # quadratic: minutes


def test_examples_of_a_conversation_know_it_and_what_earlier_ones_hold(tmp_path):
    contents = ["Q1", "A1", "Q2", "A2", "Q3", "A3", "bye"]
    other = [*contents[:4], "Q4", "A4"]
    records = [conversation(contents), conversation(other), conversation(contents), conversation(["Q1", "A1"])]
    records += [FORMATS["question/answer"]("Q1", "A1")]
    examples = read_dataset(write_data(tmp_path, records)).examples
    assert [e.num_repeated for e in examples] == [0, 2, 4, 0, 2, 4, 0, 2, 4, 0, 0]
    identities = [e.conversation for e in examples]
    assert len(set(identities[:3])) == len(set(identities[3:6])) == 1
    assert identities[:3] == identities[6:9] != identities[3:6]
    assert identities[9:] == ["", ""], "a record of one answer is a conversation of its own"
    assert examples[9].digest == examples[10].digest != examples[0].digest
    assert examples[0].digest == examples[6].digest != examples[3].digest, "two that begin alike are not the same"


# What carries meaning


def read(tmp_path, *records):
    return read_dataset(write_data(tmp_path, list(records)))


def told(example):
    """The turns before the answer, and the answer."""
    return [*((m.role, m.content) for m in example.messages), example.answer]


ASKED = {"from": "human", "value": "2+2?"}
ANSWERED = {"from": "gpt", "value": "4"}
SAID = [("user", "2+2?"), "4"]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [ASKED, ANSWERED]},
        {"question": "2+2?", "answer": "4"},
        {"prompt": [{"role": "user", "content": "2+2?"}], "completion": "4"},
        {"qa_pairs": [{"question": "2+2?", "output": 4}]},
        {"conversation": [{"human": "2+2?", "assistant": "4"}]},
        {"prompt": "2+2?", "chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
    ],
)
def test_a_system_text_beside_the_conversation_is_its_first_turn(tmp_path, record, key):
    (example,) = read(tmp_path, {key: "Be brief.", **record}).examples
    assert told(example) == [("system", "Be brief."), *SAID]


def test_a_system_key_and_a_system_turn_are_one_or_a_reason(tmp_path):
    turns = [{"from": "system", "value": "Be brief."}, ASKED, ANSWERED]
    same, other = {"system": "Be brief.", "conversations": turns}, {"system": "Rhyme.", "conversations": turns}
    dataset = read(tmp_path, same, other, {"system": "A", "system_prompt": "B", "question": "Q", "answer": "A"})
    assert told(dataset.examples[0]) == [("system", "Be brief."), *SAID]
    assert "another system text" in dataset.bad_records[0].reason
    assert "system_prompt has no use" in dataset.bad_records[1].reason


@pytest.mark.parametrize(
    "history",
    [
        [["1+1?", "2"]],
        [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}],
        '[["1+1?", 2]]',  # a list in a table's cell
    ],
)
@pytest.mark.parametrize("keys", [("instruction", "output"), ("query", "response"), ("prompt", "completion")])
def test_a_history_stands_before_the_question(tmp_path, history, keys):
    (example,) = read(tmp_path, {keys[0]: "2+2?", keys[1]: "4", "history": history}).examples
    assert told(example) == [("user", "1+1?"), ("assistant", "2"), *SAID]
    assert read(tmp_path, {keys[0]: "2+2?", keys[1]: "4", "history": []}).examples[0].messages == example.messages[-1:]


@pytest.mark.parametrize(
    ("record", "user"),
    [
        ({"instruction": "Translate.", "question": "cat", "answer": "chat"}, "Translate.\n\ncat"),
        ({"instruction": "Translate.", "question": "cat", "output": "chat"}, "Translate.\n\ncat"),
        ({"question": "Translate.", "input": "cat", "answer": "chat"}, "Translate.\n\ncat"),
        ({"instruction": "Translate.", "prompt": "cat", "completion": "chat"}, "Translate.\n\ncat"),
        ({"prompt": "Translate.", "input": "cat", "completion": "chat"}, "Translate.\n\ncat"),
        ({"instruction": "Translate.", "prompt": "Translate. cat", "completion": "chat"}, "Translate. cat"),
        ({"question": "2+2?", "input": None, "answer": 4}, "2+2?"),
        ({"instruction": "Square it.", "input": 4, "output": True}, "Square it.\n\n4"),
        ({"question": "Which? A) cat B) dog", "options": ["cat", "dog"], "answer": "A"}, "Which? A) cat B) dog"),
    ],
)
def test_instructions_and_inputs_beside_a_question_are_in_it(tmp_path, record, user):
    (example,) = read(tmp_path, record).examples
    assert told(example)[0] == ("user", user)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": [ASKED, ANSWERED], "instruction": "Rhyme."}, "instruction has no use beside conversations"),
        ({"conversations": [ASKED, ANSWERED], "history": [["a", "b"]]}, "history has no use"),
        ({"text": "Four.", "system": "Rhyme."}, "system has no use beside text"),
        ({"question": "Which?", "options": ["cat", "dog"], "answer": "A"}, "options has no use"),
        ({"question": "Which?", "choices": [3, 4], "answer": 1}, "choices has no use"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b", "input": "c"}, "input has no use"),
        ({"question": "Q", "answer": "A", "history": "once"}, "history: expected a list"),
        ({"question": "Q", "answer": "A", "history": [["a", ""]]}, "history: turn 2"),
        ({"question": "Q", "answer": "A", "tools": "a hammer"}, "tools: expected a list"),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]},
            "not its",
        ),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "gpt", "content": "b", "weight": 0.5}]}, "weight"),
    ],
)
def test_what_no_form_uses_is_a_reason_that_names_the_key(tmp_path, record, reason):
    dataset = read(tmp_path, record, {"question": "Q", "answer": "A"})
    assert reason in dataset.bad_records[0].reason
    assert dataset.num_bad_records == len(dataset.examples) == 1


def test_keys_of_null_are_not_there(tmp_path):
    part = {"type": "text", "text": "2+2?", "image": None}
    turns = [
        {"role": "user", "from": None, "content": [part], "tool_calls": None, "weight": None},
        {"role": None, "from": "gpt", "value": "4", "function_call": None, "train": None},
    ]
    record = {"messages": turns, "instruction": None, "output": None, "tools": None, "history": None, "system": None}
    pair = {"messages": None, "instruction": None, "output": None, "question": "2+2?", "answer": "4", "input": None}
    dataset = read(tmp_path, record, pair, {**record, "system": float("nan")})
    assert [told(e) for e in dataset.examples] == [SAID] * 3
    assert dataset.ignored_keys == ""


@pytest.mark.parametrize(("answer", "text"), [(4, "4"), (True, "true"), (3.5, "3.5"), (-2, "-2"), (False, "false")])
def test_numbers_and_booleans_are_their_texts(tmp_path, answer, text):
    turns = {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": answer}]}
    assert [e.answer for e in read(tmp_path, {"question": 3, "answer": answer}, turns).examples] == [text, text]


@pytest.mark.parametrize(("key", "no", "yes"), [("weight", 0, 1), ("train", False, True), ("loss", False, None)])
def test_turns_not_to_be_learned_are_context_and_no_answers(tmp_path, key, no, yes):
    turns = [ASKED, {"from": "gpt", "value": "5", key: no}, {"from": "human", "value": "Sure?"}]
    (example,) = read(tmp_path, {"conversations": [*turns, {**ANSWERED, key: yes}]}).examples
    assert told(example) == [("user", "2+2?"), ("assistant", "5"), ("user", "Sure?"), "4"]
    assert [m.is_trained for m in example.messages] == [True, False, True]
    good = {"question": "Q", "answer": "A"}
    dataset = read(tmp_path, {"conversations": turns}, good)
    assert "no answer is to be learned" in dataset.bad_records[0].reason
    trained = read(tmp_path, {"conversations": [ASKED, ANSWERED, turns[2], ANSWERED]}).examples
    assert example.digest not in {e.digest for e in trained}


def test_forms_and_keys_left_aside_are_said_in_any_order(tmp_path):
    records = [{"question": f"{i}?", "answer": "A", "id": i, f"key{i:02}": 1} for i in range(30)]
    records += [{"messages": [{"role": "user", "content": "Q", "at": 5}, {"role": "gpt", "content": "A"}]}]
    records += [{"prompt": "P", "chosen": "C", "rejected": "R", "score": None, "tags": []}]
    one, two = read(tmp_path, *records), read(tmp_path, *records[::-1])
    assert one.record_form == two.record_form == "question/answer (30), messages (1), prompt/chosen (1)"
    assert one.ignored_keys == two.ignored_keys
    assert one.ignored_keys.startswith("id, key00, key01")
    assert one.ignored_keys.endswith("and 13 more")
    found = survey(write_data(tmp_path, records[-2:]))
    assert (found.record_form, found.ignored_keys) == ("messages (1), prompt/chosen (1)", "messages[].at, rejected")


# Conversations of the wild


def test_lists_of_turns_are_prompts_completions_and_chosen_answers(tmp_path):
    first = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
    ]
    answer = [{"role": "assistant", "content": "4"}]
    dataset = read(
        tmp_path,
        {"prompt": first, "completion": answer},
        {"prompt": first, "chosen": answer, "rejected": [{"role": "assistant", "content": "5"}]},
        {"prompt": first, "chosen": [*first, *answer]},
        {"chosen": [*first, *answer], "rejected": first},
    )
    assert [told(e) for e in dataset.examples] == [[("user", "1+1?"), ("assistant", "2"), *SAID]] * 4
    assert dataset.num_bad_records == 0


@pytest.mark.parametrize(
    ("turns", "answers", "bad"),
    [
        ("gpt:Hello! human:2+2? gpt:4", ["4"], [(1, "no user turn")]),
        ("human:Hi gpt:Hello. gpt:Who? human:2+2? gpt:4", ["Hello.\n\nWho?", "4"], []),
        ("human:Hi human:2+2? gpt:4", ["4"], []),
        ("human:Hi gpt: human:2+2? gpt:4", ["4"], [(2, "empty")]),
        ("human:2+2? gpt:4 human: gpt:Hm. human:3+3? gpt:6", ["4"], [(3, "content is empty; the turns behind it, 3")]),
        ("human:2+2? bing:4", ["4"], []),
        ("human:2+2? Bard:4", ["4"], []),
        ("developer:Brief. human:2+2? ChatGPT:4", ["4"], []),
        ("system:Be. developer:Brief. human:2+2? gpt:4", ["4"], []),
        ("system: human:2+2? gpt:4", ["4"], []),
        ("human:2+2? gpt:4 system:Rhyme. human:3+3? gpt:6", ["4"], [(3, "system turn")]),
        ("human:2+2? gpt:4 narrator:They_part. human:3+3? gpt:6", ["4"], [(3, "role narrator")]),
        ("human:2+2? gpt:4 human:bye", ["4"], []),
        ("human:2+2? function_call:calc() observation:4 gpt:4", ["4"], []),
    ],
)
def test_what_is_good_of_a_conversation_is_kept(tmp_path, turns, answers, bad):
    values = [dict(zip(("from", "value"), turn.split(":"), strict=True)) for turn in turns.split(" ")]
    dataset = read(tmp_path, {"conversations": values})
    assert [e.answer for e in dataset.examples] == answers
    assert [b.place for b in dataset.bad_records] == [f"record 1, turn {number}" for number, _ in bad]
    for record, (_, reason) in zip(dataset.bad_records, bad, strict=True):
        assert reason in record.reason


def test_a_conversation_without_any_good_answer_is_one_bad_record(tmp_path):
    turns = [{"from": "gpt", "value": "Hello!"}, ASKED, {"from": "narrator", "value": "They part."}, ANSWERED]
    dataset = read(tmp_path, {"conversations": turns}, {"question": "Q", "answer": "A"})
    assert [(b.place, b.reason[:22]) for b in dataset.bad_records] == [("record 1", "turn 3: role narrator;")]


@pytest.mark.parametrize("num_turns", [50_000])
def test_long_runs_of_one_speaker_take_no_longer_than_they_are(tmp_path, num_turns):
    started = time.thread_time()
    runs = [[{**ASKED, "value": f"{i}"} for i in range(num_turns)], [{**ANSWERED, "value": ""}] * num_turns]
    dataset = read(tmp_path, {"conversations": [*runs[0], *runs[1], ANSWERED]})
    assert len(dataset.examples) == 1
    hard = {"conversations": [{**ASKED, "value": "a" * num_turns}, ANSWERED], "input": "a" * (num_turns // 2) + "b"}
    read(tmp_path, hard, {**hard, "input": "a" * (num_turns // 2)}, {"question": "Q", "answer": "A"})
    assert time.thread_time() - started < 20  # quadratic: minutes
