"""The report: its figures as numbers, and the page in a real browser."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import permutation_test, spearmanr

from raylora.mmlu import SUBJECT_GROUPS, compare_subjects
from raylora.mmlu.statistics import compare
from raylora.records import Score
from raylora.report import findings, try_write_report, write_report
from raylora.report.gather import Answers, Run, load_run, loss_curve
from raylora.store import Store
from tests.runs import dataset_names, make_score, write_run

NASTY = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "a & b \"quoted\" 'single' {{ 7*7 }}",
    "Ünïcode 数据集 \u202e \u2028",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def forty(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "chunk_042"
    write_run(root, dataset_names(40), sizes=dict.fromkeys(SUBJECT_GROUPS, 30), num_failed=3)
    write_report(root)
    return root


# What the figures say


def test_a_subjects_p_values_are_those_of_mmlu():
    sizes = {"anatomy": 40, "virology": 25, "philosophy": 60, "sociology": 1}
    base = make_score(1, sizes, None, 0.0)
    score = make_score(2, sizes, base, 0.4)
    expected = compare_subjects(score, base).set_index("subject")
    names, codes = np.unique(base.questions["subject"], return_inverse=True)
    ours, theirs = (s.questions["correct"].to_numpy() for s in (score, base))
    found = findings._by_subject(ours, theirs, codes, len(names))
    for k, name in enumerate(names):
        assert found["gained"][k] == expected.loc[name, "num_gained"]
        assert found["lost"][k] == expected.loc[name, "num_lost"]
        assert found["holm"][k] == pytest.approx(expected.loc[name, "holm_p_value"], rel=1e-9)
    assert expected["num_gained"].sum() > expected["num_lost"].sum()


def test_changes_are_marked_over_all_datasets_together(forty):
    run = load_run(forty)
    found = findings.ranking(run)
    raw = run.table["mcnemar_p_value"].dropna().sort_values()
    assert len(found["rows"]) == 37
    first = raw.index[0]
    assert found["holm"][first] == pytest.approx(min(1.0, 37 * raw.iloc[0]))
    marked = [i for i in found["rows"] if found["holm"][i] < 0.05]
    assert found["num_gains"] + found["num_losses"] == len(marked) <= found["num_raw"]
    assert all(np.isnan(found["holm"][i]) for i in np.flatnonzero(~run.ok))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=4, max_size=6))
def test_few_datasets_have_an_exact_p_value(pairs):
    x, y = np.array(pairs, dtype=float).T
    rho, p_value = findings.spearman(x, y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert rho is None
        assert p_value is None
        return
    exact = permutation_test(
        (x,), lambda a: spearmanr(a, y).statistic, permutation_type="pairings", n_resamples=10_000, vectorized=False
    )
    # Two-sided there: twice the smaller tail. Here: all orders as far from zero; the same where the null is symmetric.
    orders = exact.null_distribution
    assert p_value == pytest.approx((np.abs(orders) >= abs(rho) - 1e-9).mean())
    assert rho == pytest.approx(spearmanr(x, y).statistic)


def test_features_that_have_to_do_with_the_change_are_found(forty):
    found = findings.features(load_run(forty))
    by_name = {f["name"]: f for f in found["columns"]}
    assert by_name["approximate_duplicates"]["rho"] < -0.4
    assert by_name["approximate_duplicates"]["q_value"] < 0.05
    assert found["num_datasets"] == 37
    assert found["num_expected"] == pytest.approx(0.05 * found["num_tested"])
    assert found["num_adjusted"] <= found["num_raw"] < found["num_tested"]
    assert all(f["q_value"] >= f["p_value"] for f in found["columns"] if f["p_value"] is not None)


def test_experiments_of_one_dataset_are_named_by_what_varies_and_count_once(tmp_path):
    write_run(tmp_path / "grid", ["one", "two", "three", "four", "five"], grid={"lora_r": [8, 16], "num_epochs": [1]})
    run = load_run(tmp_path / "grid")
    assert sorted(run.labels)[:2] == ["five · lora_r 16", "five · lora_r 8"]
    assert len(set(run.labels)) == 10
    found = findings.features(run)
    assert found["grouped"]
    assert {f["num"] for f in found["columns"]} == {5}


@given(st.lists(st.text(max_size=4), min_size=1, max_size=12))
def test_every_experiment_has_a_name_of_its_own(names):
    table = pd.DataFrame({"dataset": names, "experiment_id": [f"x-{i:08d}" for i in range(len(names))]})
    assert len(set(Run(Path("nowhere"), table, {}).labels)) == len(names)


def test_scores_of_another_run_are_left_out(forty, tmp_path):
    root = shutil.copytree(forty, tmp_path / "chunk_042")
    run = load_run(root)
    assert findings.subjects(run)["num_left_out"] == 0
    folder = run.folder(0)
    shutil.copy(run.folder(1) / "scores.parquet", folder / "scores.parquet")
    (run.folder(2) / "scores.parquet").write_bytes(b"no parquet")
    (run.folder(3) / "scores.parquet").unlink()
    found = findings.subjects(run)
    assert found["num_left_out"] == 3
    assert not {0, 2, 3} & set(found["rows"])
    row = found["rows"][5]
    sizes = np.array(found["sizes"])
    change = (np.array(row["gained"]) - np.array(row["lost"])).sum() / sizes.sum()
    assert change == pytest.approx(run.table["accuracy_change"][5])


def test_of_several_bases_the_runs_own_is_taken(tmp_path):
    root = tmp_path / "run"
    write_run(root, ["one"])
    run = load_run(root)
    (key,) = [p.name for p in (root / "base").iterdir()]
    shutil.copytree(root / "base" / key, root / "base" / ("0" * 64))
    assert findings.subjects(run)["rows"]
    (root / "run.json").unlink()
    assert findings.subjects(load_run(root)) is None, "two bases fit, and nothing says which one it was"


def test_an_experiment_id_never_leads_out_of_the_folder(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "run" / "experiments").mkdir(parents=True)
    ids = ["../../secret", "..", ".", "", "/etc"]
    run = Run(tmp_path / "run", pd.DataFrame({"experiment_id": ids}), {})
    assert [run.folder(i) for i in range(len(ids))] == [None] * len(ids)


def test_answers_of_the_same_questions_only():
    first = Answers(pa.chunked_array([["a/0", "a/1"]]), pa.chunked_array([["a", "a"]]), np.array([True, False]))
    assert not first.same_questions(Answers(pa.chunked_array([["a/0"]]), pa.chunked_array([["a"]]), np.array([True])))
    assert first.same_questions(Answers(pa.chunked_array([["a/0"], ["a/1"]]), first.subjects, ~first.correct))


def test_a_long_loss_curve_becomes_means(tmp_path):
    folder = tmp_path / "experiments" / "one"
    folder.mkdir(parents=True)
    run = Run(tmp_path, pd.DataFrame({"experiment_id": ["one"]}), {})
    pd.DataFrame({"step": range(1, 801), "loss": [3.0, 1.0] * 400}).to_csv(folder / "loss_curve.csv")
    steps, losses = loss_curve(run, 0)
    assert len(steps) == 80
    assert steps[0] == 5.5
    assert losses == [2.0] * 80
    pd.DataFrame({"step": [1, 2, 3], "loss": [2.0, float("nan"), 1.0]}).to_csv(folder / "loss_curve.csv")
    assert loss_curve(run, 0) == ([1.0, 3.0], [2.0, 1.0])
    (folder / "loss_curve.csv").write_text("step,loss\n")
    assert loss_curve(run, 0) is None


def test_every_failure_has_a_cause_and_a_mend(forty):
    found = findings.failures(load_run(forty))
    assert len(found) == 3
    assert all(f["cause"] and f["mend"] for f in found)
    assert "--retry-failed" in findings.mend_of("x: its worker process died (killed, or out of memory); tried 2 times")
    assert "--learning-rate" in findings.mend_of("x: the loss became nan at step 3: lower --learning-rate")
    assert "--timeout" in findings.mend_of("x: gave up after --timeout 5 s; tried 2 times, see log.txt")
    assert "file" in findings.mend_of("x.json: line 1: empty")


# The page, without a browser


def break_nothing(root: Path) -> None:
    pass


def remove_everything_but_the_table(root: Path) -> None:
    for name in ("experiments", "base"):
        shutil.rmtree(root / name)
    (root / "run.json").unlink()
    (root / "results.parquet").unlink()


def break_every_file(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file() and path.name not in {"results.csv", "report.html"}:
            path.write_bytes(b"\x00\xffgarbage")


def empty_the_table(root: Path) -> None:
    table = pd.read_parquet(root / "results.parquet").iloc[:0]
    table.to_parquet(root / "results.parquet")


def strip_the_table(root: Path) -> None:
    (root / "results.parquet").unlink()
    (root / "results.csv").write_text("name,score\nx,1\ny,\n")


ODD_RUNS = {
    "no good row": (["a", "b", "c"], {"num_failed": 3}, break_nothing),
    "no mmlu": (["a", "b", "c", "d", "e"], {"stages": ("features", "train")}, break_nothing),
    "features only": (["a", "b", "c", "d", "e"], {"stages": ("features",)}, break_nothing),
    "grid": (["a", "b"], {"grid": {"lora_r": [8, 16], "learning_rate": [1e-4, 2e-4]}}, break_nothing),
    "one dataset": (["a"], {}, break_nothing),
    "few questions": (["a", "b", "c", "d"], {"sizes": {"anatomy": 1, "virology": 1}}, break_nothing),
    "nasty names": (NASTY, {}, break_nothing),
    "nasty failures": (NASTY, {"num_failed": 4}, break_nothing),
    "table alone": (["a", "b", "c", "d", "e"], {}, remove_everything_but_the_table),
    "broken files": (["a", "b", "c", "d", "e"], {}, break_every_file),
    "no row": (["a"], {}, empty_the_table),
    "another table": (["a"], {}, strip_the_table),
}


@pytest.fixture(scope="module", params=ODD_RUNS)
def odd_run(request, tmp_path_factory) -> tuple[str, Path]:
    names, options, spoil = ODD_RUNS[request.param]
    root = tmp_path_factory.mktemp("odd") / "chunk_<odd>"
    write_run(root, names, **options)
    spoil(root)
    write_report(root)
    return request.param, root


def test_names_are_escaped(odd_run):
    _, root = odd_run
    page = (root / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2
    assert "<img" not in page
    assert "chunk_<odd>" not in page
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page), "the page asks for something from elsewhere"


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "raylora.report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_command_writes_the_page_anew(forty, tmp_path):
    root = shutil.copytree(forty, tmp_path / "chunk_042")
    (root / "report.html").unlink()
    result = run_command(str(root), "--price", "2.5")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(root / "report.html")
    assert '"price":2.5' in (root / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["nowhere"], "nowhere: no results.csv in it"), ([".", "--price", "-1"], "--price: expected a price")],
)
def test_wrong_use_of_the_command_is_one_line(arguments, expected):
    result = run_command(*arguments)
    assert result.returncode == 2
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_report_that_fails_is_one_line_and_no_more(tmp_path):
    out = io.StringIO()
    (tmp_path / "results.csv").write_text("dataset\nx\n")
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "file").touch()
    try_write_report(Store(tmp_path), Console(file=out, width=300))
    assert out.getvalue().startswith("Warning: no report.html (")
    assert len(out.getvalue().splitlines()) == 1
    assert not list(tmp_path.glob(".partial-*"))


# The page, in a browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Opens a run's page; at the end, nothing has gone wrong in it, and it asked for nothing but itself."""
    troubles: list[str] = []
    contexts = []

    def opened(root: Path, width: int = 1280, height: int = 900, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((root / "report.html").as_uri())
        page.wait_for_selector("html[data-drawn]")
        return page

    asked: list[str] = []
    yield opened
    for context in contexts:
        context.close()
    assert troubles == []
    assert [url for url in asked if not unquote(url).endswith(("report.html", "data:,")) and "blob:" not in url] == []


def names_of(page, section: str) -> list[str]:
    cells = page.locator(f"#{section} tbody tr.row .name[title]")
    return [cell.get_attribute("title") for cell in cells.all()]


def test_the_ranking_sorts_and_searches(open_page, forty):
    page = open_page(forty)
    table = load_run(forty).table
    ranked = table[table["status"] == "ok"].sort_values("accuracy_change", ascending=False, kind="stable")
    assert names_of(page, "ranking") == list(ranked["dataset"])
    heading = page.locator("#ranking thead button", has_text="Dataset")
    heading.click()
    assert names_of(page, "ranking") == sorted(ranked["dataset"])
    assert page.locator("#ranking th[aria-sort=ascending]").inner_text().startswith("Dataset")
    heading.click()
    assert names_of(page, "ranking") == sorted(ranked["dataset"], reverse=True)
    page.get_by_label("Search ranking").fill("MATH filtered")
    assert names_of(page, "ranking") == ["math_steps_filtered"]
    assert page.locator("#ranking [role=status]").inner_text() == "1 of 37"
    page.get_by_label("Search ranking").fill("no such name")
    assert "Nothing fits" in page.locator("#ranking tbody").inner_text()


def test_a_click_marks_an_experiment_in_every_figure(open_page, forty):
    page = open_page(forty)
    page.locator("#ranking tbody tr.row").nth(7).click()
    name = names_of(page, "ranking")[7]
    assert page.locator("#chosen .name").inner_text() == name
    assert page.locator("#losses .curve.on").count() == 1
    assert page.locator("#features circle.on").count() == 1
    log = page.locator("#chosen a").get_attribute("href")
    assert (forty / unquote(log)).is_file()
    page.locator("#chosen button").click()
    assert page.locator("#chosen").is_hidden()


def test_light_and_dark(open_page, forty):
    page = open_page(forty, scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.locator("#theme").click()
    light = page.evaluate(ground)
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 150 < 600 < sum(map(int, re.findall(r"\d+", light)[:3]))
    page.reload()
    page.wait_for_selector("html[data-drawn]")
    assert page.evaluate(ground) == light, "the choice is not kept"


def test_the_table_can_be_saved_as_it_is(open_page, forty):
    page = open_page(forty)
    with page.expect_download() as download:
        page.locator("#csv").click()
    saved = pd.read_csv(download.value.path())
    pd.testing.assert_frame_equal(saved, pd.read_csv(forty / "results.csv"), check_dtype=False)
    assert (forty / page.locator("#table a", has_text="results.csv").get_attribute("href")).is_file()


def test_a_price_becomes_costs(open_page, forty):
    page = open_page(forty)
    page.get_by_label("Price of a GPU-hour").fill("3")
    table = load_run(forty).table
    cells = page.locator("#time table[aria-label=stages] tr", has_text="all").locator("td").all_inner_texts()
    assert float(cells[-1]) == pytest.approx(3 * table["total_seconds"].sum() / 3600, abs=0.01)


def test_the_heat_map_tells_its_cells(open_page, forty):
    page = open_page(forty)
    page.locator("#subjects").scroll_into_view_if_needed()
    box = page.locator("#subjects canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    assert re.search(r"points: \d+ gained, \d+ lost", page.locator("#tip").inner_text())
    page.locator("#subjects summary").click()
    assert page.locator("#subjects tbody tr.row").count() >= 20


def test_every_feature_can_be_looked_at(open_page, forty):
    page = open_page(forty)
    page.get_by_label("Search features").fill("gradient_consistency")
    page.locator("#features tbody tr.row").first.click()
    assert page.locator("#features h3").inner_text() == "gradient_consistency"
    assert page.locator("#features circle").count() == 37


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark"), (320, "light")])
def test_an_odd_run_has_its_page(open_page, odd_run, width, scheme):
    name, root = odd_run
    page = open_page(root, width, 844, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert "could not be drawn" not in page.locator("main").inner_text()
    assert page.title() == ("chunk_<odd> · raylora")
    if name.startswith("nasty"):
        shown = page.locator("#table .name[title]").evaluate_all("cells => cells.map(cell => cell.title)")
        assert sorted(shown) == sorted(NASTY)
    elif name == "features only":
        assert "without the mmlu stage" in page.locator("#ranking").inner_text()
        assert page.locator("#features circle").count() == 5
    elif name == "grid":
        assert "a · lora_r 8, learning_rate 0.0001" in names_of(page, "ranking")
    elif name == "no good row":
        assert page.locator("#failures table[aria-label=failures] tr.row").count() == 3


def test_the_page_of_forty_does_not_scroll_sideways(open_page, forty):
    page = open_page(forty, 390, 844)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator("#ranking tbody tr.row").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_five_hundred_datasets_stay_few_in_the_page(open_page, tmp_path):
    write_run(tmp_path / "large", dataset_names(500), sizes={"anatomy": 20, "virology": 20}, num_failed=100)
    write_report(tmp_path / "large")
    page = open_page(tmp_path / "large")
    for section in ("ranking", "failures", "table"):
        assert 0 < page.locator(f"#{section} table").first.locator("tr.row").count() <= 60, section
    assert page.evaluate("document.querySelectorAll('*').length") < 12_000
    scroller = page.locator("#ranking .vt")
    scroller.evaluate("node => { node.scrollTop = node.scrollHeight; }")
    page.wait_for_function("document.querySelector('#ranking tbody').innerText.includes('400')")
    last = page.locator("#ranking tbody tr.row").last.locator("td").first.inner_text()
    assert last == "400"
    page.locator("#ranking thead button", has_text="Dataset").click()
    assert names_of(page, "ranking")[:2] == ["alpaca_1k_01", "alpaca_1k_02"]
    assert page.evaluate("document.querySelectorAll('*').length") < 12_000


@pytest.mark.slow
def test_a_run_of_the_demo_chunk_ends_with_its_page(open_page, tiny_model_folder, tmp_path):
    command = [
        sys.executable, "-m", "raylora.batch", "--config", "configs/demo.yaml", "--model", str(tiny_model_folder),
        "--quantization", "none", "--output", str(tmp_path), "--threads", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "chunk_demo"
    assert "report.html" in done.stdout
    page = open_page(root)
    datasets = load_run(root).table["dataset"]
    assert sorted(names_of(page, "ranking")) == sorted(datasets)
    assert page.locator("#losses .curve").count() == len(datasets)
    assert page.locator("#subjects canvas").count() == 1
    assert page.locator("#settings .changed dt").count() > 3


def test_two_scores_are_compared_as_a_run_compares_them():
    """The helper that writes these runs makes real differences: the paired test sees them."""
    sizes = {"anatomy": 300, "virology": 300}
    base = make_score(1, sizes, None, 0.0)
    up, same = make_score(2, sizes, base, 0.12), Score(base.questions)
    assert compare(up, base)["mcnemar_p_value"] < 0.05
    assert compare(same, base)["difference"] == 0
