"""The documentation is true: its commands exist, its links lead somewhere, the lines and columns it names are there.

What takes a run to check is in ``tests/whole/test_docs_run.py``.
"""

from __future__ import annotations

import ast
import json
import re
import tomllib

import pytest

from raylora.commands.run_command import call_command
from raylora.config.run import Config, load_config
from raylora.data.dataset_files import KINDS
from raylora.data.datasets import read_dataset
from raylora.data.record_forms import FORMS, SPEAKERS
from raylora.errors import UserError
from raylora.planning.plan import DEMO_CHUNK, DEMO_FOLDER
from raylora.rows import FEATURE_NAMES, ROW_COLUMNS
from tests.helpers.demo import OPENING, README, put_into
from tests.helpers.docs_changes import apply_diffs, copy_of_the_code, write_question_set
from tests.helpers.docs_commands import NOT_RUN, PAGES, ROOT, RUN, Command, all_commands, blocks, commands_of_page

COMMANDS = all_commands()
RUNNABLE = {text for texts in RUN.values() for text in texts}
UNKNOWN = "--no-such-option"


# Commands


def is_mention(command: Command) -> bool:
    """Whether it only names a command that stands elsewhere with its options: `ray up`."""
    return any(other.text.startswith(f"{command.text} ") for other in COMMANDS)


def test_commands_are_found_wherever_they_stand():
    page = (
        "Text with `python -m raylora.x --y\nz`, and a `word`.\n\n    make a    # comment\n    frobnicate --b\n\n"
        "- a list\n    goes on\n\n    a layout/    of files\n\n```sh\nray c\n```\n\n```python\nray = 1\n```\n"
    )
    assert commands_of_page(page) == ["make a", "frobnicate --b", "ray c", "python -m raylora.x --y z"]
    assert len(COMMANDS) > 80
    assert {c.page for c in COMMANDS} >= {"README.md", "cluster.md", "cluster/slurm.sh", "configs/demo.yaml"}


def test_every_command_is_run_or_it_is_said_why_not():
    strangers = [
        f"{c.page}: {c.text}"
        for c in COMMANDS
        if c.text not in RUNNABLE and not c.text.startswith(tuple(NOT_RUN)) and not is_mention(c)
    ]
    assert not strangers, "put them into RUN or NOT_RUN of tests/helpers/docs_commands.py"


def test_nothing_is_accounted_for_that_no_page_shows():
    shown = {c.text for c in COMMANDS}
    assert shown >= RUNNABLE
    assert [start for start in NOT_RUN if not any(text.startswith(start) for text in shown)] == []


def run_main(words: list[str]) -> None:
    """A command of raylora within this process."""
    name, *options = words
    call_command(name.removeprefix("raylora."), options)


def refuses_only_the_unknown(words: list[str]) -> bool:
    """Whether an option that is not there is the first one that the command's own parser does not know."""
    try:
        run_main([*words, UNKNOWN])
    except UserError as error:
        return f"unknown option {UNKNOWN}" in str(error)
    return False


def test_options_are_those_that_the_commands_know(monkeypatch):
    monkeypatch.chdir(ROOT)
    checked = 0
    for command in COMMANDS:
        if (words := command.raylora) and len(words) > 1:
            assert refuses_only_the_unknown(words), f"{command.page}: {command.text}"
            checked += 1
    assert checked > 30
    assert not refuses_only_the_unknown(["raylora.batch", "--chunkk", "x"])


def test_values_are_those_that_the_batch_command_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in COMMANDS:
        if (words := command.raylora) and words[0] == "raylora.batch" and len(words) > 1:
            config = load_config(words[1:])
            assert config.chunk or config.dataset, command.text


def test_commands_of_ray_are_those_that_it_has():
    import click
    from ray.scripts.scripts import cli

    for command in (c for c in COMMANDS if c.words[0] == "ray"):
        found, words = cli, command.words[1:]
        while isinstance(found, click.Group):
            found, words = found.get_command(click.Context(found), words[0]), words[1:]
            assert found, command.text
        if words:
            found.make_context(command.text, words)  # raises where an option is unknown or missing


def test_files_and_packages_that_commands_name_are_there():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in COMMANDS:
        words = command.words
        if words[0] == "make":
            assert set(words[1:]) <= targets, command.text
        if words[0] == "pip":
            assert set(re.findall(r"\[([a-z0-9]+)\]", command.text)) <= extras, command.text
        for word in re.findall(r"(?<!raylora/)(?:cluster|configs)/[\w.-]+|constraints\.txt", command.text):
            assert (ROOT / word).is_file(), command.text


def test_options_that_pages_name_are_there():
    """Such as `--sample-size` in the middle of a sentence."""
    known = {name.replace("_", "-") for name in Config.model_fields}
    of_others = {
        "config", "help", "questions", "adapter", "price", "data-folder", "model-path", "output-csv", "single-dataset",
        "describe", "leave-out", "target", "predictor", "budget", "coverage", "group", "revision",
    }  # fmt: skip
    for page in PAGES:
        for name in re.findall(r"`--([a-z][a-z0-9_-]+)", page.read_text(encoding="utf-8")):
            assert name.replace("_", "-") in known | of_others, f"{page.name}: --{name}"


# Pages


def anchors(text: str) -> set[str]:
    """What headings are called in links, as GitHub does it."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_are_there(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:raylora|tests|cluster|configs|docs|benchmarks)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(\w+\.py)`", text):
        assert list((ROOT / "raylora").rglob(name)), name


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"(docs/{page.name})" not in readme] == []


def test_a_page_names_every_column():
    page = (ROOT / "docs" / "columns.md").read_text(encoding="utf-8")
    assert [name for name in (*ROW_COLUMNS, *FEATURE_NAMES) if f"`{name}`" not in page] == []


# Lines that raylora prints


def texts_of_the_code() -> list[str]:
    """Every string of raylora, with a line break where something is put in; what stands side by side is one."""
    texts = []
    for file in (ROOT / "raylora").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\n" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def quoted_lines() -> list[str]:
    """The first column of the tables of lines, without a label that is the terminal's."""
    lines = []
    for page in ("troubleshooting.md", "features.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        table = re.compile(r"^\| (?:line|error|note) \|.*\n\| ---.*\n((?:\|.*\n)+)", re.M)
        lines += [row.split("`")[1] for rows in table.findall(text) for row in rows.splitlines()]
    return lines


def test_quoted_lines_are_those_of_the_code():
    texts, lines = texts_of_the_code(), quoted_lines()
    assert len(lines) > 50
    for line in lines:
        fixed = [part.strip(" :;,()") for part in line.removeprefix("Note: ").split("...")]
        parts = [part for part in fixed if len(part) > 3]
        assert parts, line
        assert [part for part in parts if not any(part in text for text in texts)] == [], line


# Worked examples


def test_records_of_every_form_are_read(tmp_path):
    (example,) = blocks("docs/datasets.md", "json")
    (tmp_path / "forms.json").write_text(example)
    dataset = read_dataset(tmp_path / "forms.json")
    assert (len(dataset.examples), dataset.num_bad_records) == (6, 0)


def quoted(words):
    return ", ".join(f"`{word}`" for word in words)


def test_the_tables_of_forms_and_speakers_are_the_codes():
    page = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    forms = [f"| {quoted(f.keys)}: {f.shape} | {quoted(f.used)} | {f.known_from} |" for f in FORMS]
    speakers = [f"| {role} | {quoted(names)} |" for role, names in SPEAKERS.items()]
    for name, rows in (("forms", forms), ("speakers", speakers)):
        table = page.split(f"<!-- {name}: raylora/data/record_forms.py -->\n")[1].split("\n\n")[0]
        assert table.splitlines()[2:] == rows, "\n".join(rows)


def test_the_table_of_files_is_the_codes():
    page = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    rows = [f"| {k.name} | {quoted(k.endings)} | {k.read} | `{k.place}` |" for k in KINDS]
    table = page.split("<!-- files: raylora/data/dataset_files.py -->\n")[1].split("\n\n")[0]
    assert table.splitlines()[2:] == rows, "\n".join(rows)


def test_a_new_question_set(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYLORA_QUANTIZATION", "none")
    write_question_set(tmp_path)
    (text,) = RUN["a new question set"]
    words = ["--model", str(tiny_model_folder)]
    assert call_command("mmlu", [*Command("", text.replace("--model demo", "")).words[3:], *words]) == 0
    (summary,) = tmp_path.glob("results/mmlu/*/summary.csv")
    num_questions = len(json.loads((tmp_path / "own_test.json").read_text()))
    assert f",{num_questions}," in summary.read_text()


def test_the_changes_of_the_worked_examples_fit_the_code(tmp_path):
    root = copy_of_the_code(tmp_path)
    apply_diffs("docs/extending.md", root)
    for file in root.rglob("*.py"):
        ast.parse(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", ["docs/mmlu.md"])
def test_a_block_of_python_runs(page, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        small = block.replace("57", "4").replace('evaluate_mmlu("demo"', f"evaluate_mmlu({str(tiny_model_folder)!r}")
        assert small != block
        exec(small, {})


def test_ray_is_imported_where_the_readme_says():
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "raylora").rglob("*.py")}
    with_ray = {name for name, text in sources.items() if re.search(r"^\s*(import|from) ray\b", text, re.M)}
    assert with_ray == {"raylora/cluster/ray_run.py"}


def test_readmes_example_is_of_the_demos_datasets_and_is_replaced_as_a_block():
    page = README.read_text(encoding="utf-8")
    before, _, after = page.partition(OPENING)
    example = re.match(r"(    .*\n|\n(?=    ))*", after)[0]
    for path in (DEMO_FOLDER / DEMO_CHUNK).iterdir():
        assert f"    {path.stem} " in example
    again = put_into(page, "a line\n\nanother")
    assert again == before + OPENING + "    a line\n\n    another\n" + after.removeprefix(example)
