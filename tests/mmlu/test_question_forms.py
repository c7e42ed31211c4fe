"""The forms in which sets are published: the original files, and the Parquet files of the Hugging Face hub."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.errors import UserError
from raylora.mmlu.question_forms import FORMS
from raylora.mmlu.questions import LETTERS, NO_SUBJECT, load_questions
from raylora.records import Question
from tests.helpers.questions import ARC, LABELLED, TEXTS, write_hub, write_lines

TEXT, INT64 = pa.string(), pa.int64()


def both(tmp_path, schema, hub_rows, original_rows):
    """The questions that both forms of the same set give."""
    write_hub(tmp_path / "hub.parquet", schema, hub_rows)
    write_lines(tmp_path / "original.jsonl", original_rows)
    found = load_questions(tmp_path / "hub.parquet")
    assert load_questions(tmp_path / "original.jsonl") == found
    return found


MMLU_PRO = [
    ("question_id", INT64), ("question", TEXT), ("options", TEXTS), ("answer", TEXT), ("answer_index", INT64),
    ("cot_content", TEXT), ("category", TEXT), ("src", TEXT),
]  # fmt: skip


def pro_row(number, options, index, category="computer science"):
    return {
        "question_id": number, "question": f"What is {number}?", "options": options, "answer": LETTERS[index],
        "answer_index": index, "cot_content": "", "category": category, "src": "ori_mmlu-machine_learning",
    }  # fmt: skip


def test_mmlu_pro_has_up_to_ten_options_and_its_own_categories(tmp_path):
    options = ["a", "N/A", "b", "N/A", "c", "d", "N/A", "N/A", "N/A", "N/A"]
    rows = [pro_row(70, list("abcdefghij"), 9), pro_row(71, options, 4), pro_row(80, ["x", "N/A", "y"], 1, "law")]
    assert both(tmp_path, MMLU_PRO, rows, rows) == [
        Question("computer_science", "What is 70?", tuple("abcdefghij"), 9, "computer_science/0", "70"),
        Question("computer_science", "What is 71?", tuple("abcd"), 2, "computer_science/1", "71"),
        Question("law", "What is 80?", ("x", "N/A", "y"), 1, "law/0", "80"),
    ], "paddings go, and N/A stays where it is the answer"


def test_arc_has_labels_of_letters_or_numbers(tmp_path):
    hub, original, expected = [], [], []
    for name, labels, key in (
        ("Mercury_7175875", "ABCD", "C"),
        ("NYSEDREGENTS_2013", "1234", "4"),
        ("X", "ABCDE", "E"),
    ):
        texts = [f"choice {label}" for label in labels]
        stem, choices = f"Which of {name}?", [{"text": t, "label": x} for t, x in zip(texts, labels, strict=True)]
        hub.append({"id": name, "question": stem, "choices": {"text": texts, "label": list(labels)}, "answerKey": key})
        original.append({"id": name, "question": {"stem": stem, "choices": choices}, "answerKey": key})
        expected.append(Question(NO_SUBJECT, stem, tuple(texts), labels.index(key), f"all/{len(expected)}", name))
    assert both(tmp_path, ARC, hub, original) == expected


COMMONSENSE_QA = [
    ("id", TEXT), ("question", TEXT), ("question_concept", TEXT),
    ("choices", pa.struct([("label", TEXTS), ("text", TEXTS)])), ("answerKey", TEXT),
]  # fmt: skip


def commonsense_rows(answer):
    texts, labels = ["ignore", "enforce", "authoritarian", "yell at", "avoid"], list("ABCDE")
    stem = "The sanctions seemed to what the efforts the school had made to change?"
    hub = {"id": "075e", "question": stem, "question_concept": "punishing",
           "choices": {"label": labels, "text": texts}, "answerKey": answer}  # fmt: skip
    choices = [{"label": x, "text": t} for x, t in zip(labels, texts, strict=True)]
    nested = {"question_concept": "punishing", "choices": choices, "stem": stem}
    return hub, {"answerKey": answer, "id": "075e", "question": nested}


def test_commonsense_qa_and_its_test_split_without_answers(tmp_path):
    hub, original = commonsense_rows("A")
    (question,) = both(tmp_path, COMMONSENSE_QA, [hub], [original])
    assert question.choices == ("ignore", "enforce", "authoritarian", "yell at", "avoid")
    assert (question.answer, question.subject, question.own_id) == (0, NO_SUBJECT, "075e")
    hub, original = commonsense_rows("")
    original.pop("answerKey")  # as in test_rand_split_no_answers.jsonl
    write_hub(tmp_path / "test.parquet", COMMONSENSE_QA, [hub])
    write_lines(tmp_path / "test.jsonl", [original])
    for name in ("test.parquet", "test.jsonl"):
        with pytest.raises(UserError) as raised:
            load_questions(tmp_path / name)
        assert str(raised.value) == f"{tmp_path / name}: question 1: has no answer: use the validation split"


OPENBOOK_QA = [("id", TEXT), ("question_stem", TEXT), ("choices", LABELLED), ("answerKey", TEXT)]


def test_openbook_qa(tmp_path):
    texts, labels = ["puppies learning new tricks", "children growing up", "soup", "fish"], list("ABCD")
    hub = {"id": "8-376", "question_stem": "The sun is responsible for",
           "choices": {"text": texts, "label": labels}, "answerKey": "D"}  # fmt: skip
    choices = [{"text": t, "label": x} for t, x in zip(texts, labels, strict=True)]
    original = {"id": "8-376", "question": {"stem": hub["question_stem"], "choices": choices}, "answerKey": "D"}
    expected = Question(NO_SUBJECT, "The sun is responsible for", tuple(texts), 3, "all/0", "8-376")
    assert both(tmp_path, OPENBOOK_QA, [hub], [original]) == [expected]


HELLASWAG = [
    ("ind", pa.int32()), ("activity_label", TEXT), ("ctx_a", TEXT), ("ctx_b", TEXT), ("ctx", TEXT), ("endings", TEXTS),
    ("source_id", TEXT), ("split", TEXT), ("split_type", TEXT), ("label", TEXT),
]  # fmt: skip


def hellaswag_row(label, second="then, the man"):
    return {
        "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man sits. [title] A roof [step] ladder.",
        "ctx_b": second, "ctx": "", "endings": ["is using wrap. [substeps] Go.", "rips  tiles.", "holds.", "starts."],
        "source_id": "activitynet~v_-JhWjGDPHMY", "split": "val", "split_type": "indomain", "label": label,
    }  # fmt: skip


def test_hellaswag_is_cleaned_as_the_harness_does(tmp_path):
    (question,) = both(tmp_path, HELLASWAG, [hellaswag_row("3")], [hellaswag_row(3)])
    assert question.question == "Roof shingle removal: A man sits.. A roof ladder. Then, the man"
    assert question.choices == ("is using wrap. Go.", "rips tiles.", "holds.", "starts.")
    assert (question.answer, question.own_id) == (3, "24")
    write_hub(tmp_path / "test.parquet", HELLASWAG, [hellaswag_row("")])
    with pytest.raises(UserError, match=r"test\.parquet: question 1: has no answer: use the validation split"):
        load_questions(tmp_path / "test.parquet")


@pytest.fixture(scope="module")
def process_docs():
    """The harness's own reading of HellaSwag."""
    return pytest.importorskip("lm_eval.tasks.hellaswag.utils").process_docs


PARTS = st.text("a. [](){}titlesp  \n") | st.sampled_from([" [title]", "[step] ", " "])


@given(texts=st.lists(PARTS, min_size=7, max_size=7))
def test_hellaswag_reads_any_text_as_the_harness_does(tmp_path_factory, process_docs, texts):
    class Docs(list):  # ``map`` is all that the harness needs of its dataset
        def map(self, function):
            return [function(doc) for doc in self]

    row = hellaswag_row("2") | {"activity_label": "x" + texts[0], "ctx_a": texts[1], "ctx_b": texts[2]}
    row["endings"] = texts[3:]
    path = tmp_path_factory.mktemp("h") / "val.jsonl"
    write_lines(path, [row])
    (theirs,), (ours,) = process_docs(Docs([row])), load_questions(path)
    assert (ours.question, list(ours.choices), ours.answer) == (theirs["query"], theirs["choices"], theirs["gold"])


def test_boolq_is_asked_behind_its_passage(tmp_path):
    text, passage = "do iran and afghanistan speak the same language", "Persian -- is spoken in both."
    hub = [("question", TEXT), ("answer", pa.bool_()), ("passage", TEXT)]
    rows = [{"question": text, "answer": answer, "passage": passage} for answer in (True, False)]
    found = both(tmp_path, hub, rows, [{**row, "title": "Persian language"} for row in rows])
    assert [q.answer for q in found] == [1, 0]
    assert found[0].choices == ("no", "yes")
    assert found[0].question == f"{passage}\n{text}?"
    glue = [("question", TEXT), ("passage", TEXT), ("idx", pa.int32()), ("label", INT64)]
    rows = [{"question": text, "passage": passage, "idx": i, "label": 1 - i} for i in range(2)]
    in_glue = both(tmp_path, glue, rows, [{**row, "label": bool(row["label"])} for row in rows])
    assert [(q.question, q.answer) for q in in_glue] == [(q.question, q.answer) for q in found]
    assert [q.own_id for q in in_glue] == ["0", "1"]
    write_hub(tmp_path / "t.parquet", glue, [{**row, "label": -1} for row in rows])
    with pytest.raises(UserError, match="question 1: has no answer: use the validation split"):
        load_questions(tmp_path / "t.parquet")


def test_piqa_winogrande_and_race(tmp_path):
    piqa = [("goal", TEXT), ("sol1", TEXT), ("sol2", TEXT), ("label", INT64)]
    row = {"goal": "Open a jar", "sol1": "Twist.", "sol2": "Sing.", "label": 0}
    assert both(tmp_path, piqa, [row], [row]) == [Question("all", "Open a jar", ("Twist.", "Sing."), 0, "all/0")]
    wino = [("sentence", TEXT), ("option1", TEXT), ("option2", TEXT), ("answer", TEXT)]
    row = {"sentence": "Ann helped Eve, as _ was ill.", "option1": "Ann", "option2": "Eve", "answer": "2"}
    assert both(tmp_path, wino, [row], [row])[0].answer == 1
    race = [("example_id", TEXT), ("article", TEXT), ("answer", TEXT), ("question", TEXT), ("options", TEXTS)]
    row = {"example_id": "high1.txt", "article": "Ants.", "answer": "B", "question": "On what?", "options": ["a", "b"]}
    assert both(tmp_path, race, [row], [row]) == [
        Question("all", "Ants.\nOn what?", ("a", "b"), 1, "all/0", "high1.txt")
    ]


def test_mmlu_as_on_the_hub(tmp_path):
    schema = [("question", TEXT), ("subject", TEXT), ("choices", TEXTS), ("answer", INT64)]
    row = {"question": "What?", "subject": "anatomy", "choices": list("wxyz"), "answer": 2}
    assert both(tmp_path, schema, [row], [row]) == [Question("anatomy", "What?", tuple("wxyz"), 2, "anatomy/0")]


def test_choices_may_be_an_object_and_the_answer_the_right_text(tmp_path):
    row = {"question": "What?", "options": {"A": "ear", "B": "nose"}, "answer": "nose"}
    write_lines(tmp_path / "q.jsonl", [row])
    assert load_questions(tmp_path / "q.jsonl")[0].answer == 1


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "1", "question": {"stem": "x", "choices": "none"}, "answerKey": "A"}, "found none"),
        ({"id": "1", "question": {"stem": "x", "choices": []}, "answerKey": "A"}, "choices, found 0"),
        ({"question": "x", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}, "and 1 labels"),
        ({"question": "x", "choices": {"text": ["a", "b"], "label": None}, "answerKey": "A"}, "found none"),
        ({"question": "x", "choices": {"text": ["a", "b"], "label": list("AB")}, "answerKey": "C"}, "labels, A, B"),
        ({"question": "x", "choices": [{"text": 1, "label": "A"}, {}], "answerKey": "A"}, "must be text"),
        ({"question": "x", "options": "abc", "answer_index": 0}, "found none"),
        ({"question": "x", "options": list("ab"), "answer_index": 2}, "expected 0 to 1 or A to B"),
        ({**hellaswag_row("1"), "ctx_b": None}, "has no question text"),
        ({**hellaswag_row("1"), "endings": "x"}, "has no question text"),
        ({**hellaswag_row("4")}, "expected 0 to 3"),
        ({"question": None, "passage": "x", "answer": True}, "has no question text"),
        ({"goal": 1, "sol1": 2, "sol2": 3, "label": 0}, "has no question text"),
        ({"sentence": "a _", "option1": "b", "option2": None, "answer": "1"}, "must be text"),
        ({"query": "x", "gold": 1}, "a question of no known form; its fields: 'query', 'gold'"),
        ({}, "its fields: none"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_form_is_one_line(tmp_path, row, expected):
    write_lines(tmp_path / "bad.jsonl", [row])
    with pytest.raises(UserError) as raised:
        load_questions(tmp_path / "bad.jsonl")
    assert str(raised.value).startswith(f"{tmp_path / 'bad.jsonl'}: question 1: ")
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


VALUES = [
    None, True, False, -1, 0, 1, 9, 1.5, "", "A", "b", "-1", [], ["a"], ["a", "b"], list("abcdefghijk"), {}, [{}],
    {"text": ["a", "b"], "label": ["A", "B"]}, {"stem": "x", "choices": [{"text": "a", "label": "1"}]}, {"text": 1},
    {"stem": "x"},
]  # fmt: skip
NAMES = sorted({name.partition(".")[0] for form in FORMS for name in form.fields} | {"answer", "label", "answerKey"})


@given(st.dictionaries(st.sampled_from([*NAMES, "subject", "id", "context"]), st.sampled_from(VALUES)))
def test_any_record_is_a_question_or_one_line(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    write_lines(path, [row])
    try:
        (question,) = load_questions(path)
    except UserError as error:
        line = str(error)
    else:
        line = ""
        assert 0 <= question.answer < len(question.choices) <= len(LETTERS)
    assert "\n" not in line
