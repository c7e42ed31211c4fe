"""The report's page in a real browser."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest

from raylora.report.page import write_report
from raylora.report.read_run import load_run
from tests.helpers.chromium import CHROMIUM, FLAGS
from tests.helpers.odd import NASTY
from tests.helpers.runs import dataset_names, write_run, write_transfer


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


def test_the_ranking_goes_by_any_outcome(open_page, forty):
    page = open_page(forty)
    table = load_run(forty).table
    for title, column in (
        ("probability of the right choice", "correct_probability"),
        ("balanced accuracy", "balanced_accuracy"),
    ):
        page.get_by_label("Rank by").select_option(label=f"by {title}")
        ranked = table.dropna(subset=[f"{column}_change"]).sort_values(f"{column}_change", ascending=False)
        assert names_of(page, "ranking") == list(ranked["dataset"])
        assert f"Change in {title}" in page.locator("#ranking").inner_text()
    page.get_by_label("Rank by").select_option(label="by accuracy")
    assert "McNemar's exact test" in page.locator("#ranking").inner_text()


def test_the_ranking_goes_by_a_further_set(open_page, tmp_path):
    write_run(tmp_path / "run", ["a", "b", "c"])
    table = pd.read_parquet(tmp_path / "run" / "results.parquet")
    further = ("accuracy_", "balanced_", "correct_probability", "mcnemar", "num_", "total_questions")
    for name in [name for name in table if name.startswith(further)]:
        table[f"{name}[arc]"] = -table[name] if name.endswith("_change") else table[name]
    table.to_parquet(tmp_path / "run" / "results.parquet")
    write_report(tmp_path / "run")
    page = open_page(tmp_path / "run")
    first = names_of(page, "ranking")
    page.get_by_label("Rank by").select_option(label="by accuracy, arc")
    assert names_of(page, "ranking") == first[::-1]
    text = page.locator("#ranking").inner_text()
    assert "Change in accuracy, arc in percentage points" in text
    assert "questions can show changes of accuracy from" in text


def test_shrunk_changes_and_what_the_questions_can_show_are_on_the_page(open_page, forty, letters_run):
    page = open_page(forty)
    titles = page.locator("#ranking thead").inner_text()
    assert "Shrunk" in titles
    assert "FDR p" in titles
    notes = page.locator("#ranking .note").all_inner_texts()
    assert any(
        re.match(r"[\d,]+ questions can show changes of accuracy from \d\.\d points on; from ", n) for n in notes
    )
    assert any("the greatest of 37 noisy changes is partly luck" in n for n in notes)
    assert "for other questions and subjects like these" in page.locator("#tiles").inner_text()
    of_two = open_page(letters_run)
    assert "Shrunk" not in of_two.locator("#ranking thead").inner_text()
    assert "null" not in of_two.locator("#ranking").inner_text()


def test_a_favourite_letter_that_moved_is_not_called_significant(open_page, letters_run):
    page = open_page(letters_run)
    assert names_of(page, "ranking") == ["knowledge", "only_letters"]
    rows = page.locator("#ranking tbody tr.row")
    assert "its favourite letter moved" in rows.nth(1).inner_text()
    assert "gain" in rows.nth(0).inner_text().split()
    about = page.locator("#ranking .note", has_text="95% intervals").inner_text()
    assert "1 of 2 changes is significant" in about
    assert "In 1, only McNemar's passes" in about
    assert "only_letters: the model answers D to 600 of 600 questions" in page.locator("#ranking").inner_text()
    assert "answers A to 100%" in page.locator("#tiles").inner_text()
    assert "A 100% to 0%" in page.locator("#failures table[aria-label=oddities]").inner_text()


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
    page.locator("#subjects tbody tr.row").nth(19).wait_for(state="attached")


def test_the_map_of_adapters_by_datasets_tells_its_cells(open_page, tmp_path):
    rows = write_run(tmp_path / "chunk", dataset_names(9), sizes={"anatomy": 20, "virology": 20})
    write_transfer(tmp_path / "chunk", rows)
    write_report(tmp_path / "chunk")
    page = open_page(tmp_path / "chunk")
    assert "Helped most: " in page.locator("#transfer").inner_text()
    # All of the canvas, not its edge alone; and the tooltip, which a scroll hides, only when that is over.
    page.locator("#transfer canvas").evaluate("node => node.scrollIntoView({ block: 'center' })")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    box = page.locator("#transfer canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.9)
    assert re.search(
        r"adapter of .*\non .* \(50 examples, .*\n.* nats per token, .* to ", page.locator("#tip").inner_text()
    )
    page.locator("#transfer summary").click()
    page.locator("#transfer tbody tr.row").nth(8).wait_for(state="attached")
    page.get_by_label("Order of the adapters").select_option("name")
    box = page.locator("#transfer canvas").bounding_box()
    page.mouse.click(box["x"] + 10, box["y"] + box["height"] - 9)
    assert page.locator("#chosen .name").inner_text() == max(row.values["dataset"] for row in rows)
    assert page.locator("header a", has_text="Transfer").count() == 1
    narrow = open_page(tmp_path / "chunk", 320, 844, "dark")
    assert narrow.evaluate("document.documentElement.scrollWidth") == 320


def test_every_feature_can_be_looked_at(open_page, forty):
    page = open_page(forty)
    page.get_by_label("Search features").fill("gradient_consistency")
    page.locator("#features tbody tr.row").first.click()
    assert page.locator("#features h3").inner_text() == "gradient_consistency"
    assert page.locator("#features circle").count() == 37


@pytest.mark.parametrize(
    ("width", "scheme"),
    [(390, "dark"), *(pytest.param(*kind, marks=pytest.mark.slow) for kind in ((1280, "light"), (320, "light")))],
)
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


def test_several_seeds_are_a_line_with_a_dot_each(open_page, tmp_path):
    write_run(tmp_path / "seeds", ["a", "b"], sizes={"anatomy": 40, "virology": 30}, grid={"seed": [0, 1, 2]})
    write_report(tmp_path / "seeds")
    page = open_page(tmp_path / "seeds")
    assert sorted(names_of(page, "ranking")) == ["a", "b"]
    assert page.locator("#ranking tbody tr.row").first.locator(".plot .seed").count() == 3
    assert "two trainings on the same data with other seeds" in page.locator("#ranking").inner_text()
    assert "one seed" not in page.locator("#ranking").inner_text().replace("as for one seed", "")
    assert page.locator("#subjects canvas").count() == 1
    assert page.locator("#table .name[title='a · seed 2']").count() == 1


def test_the_page_of_forty_does_not_scroll_sideways(open_page, forty):
    page = open_page(forty, 390, 844)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator("#ranking tbody tr.row").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.slow
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
