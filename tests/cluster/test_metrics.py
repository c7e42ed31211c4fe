"""Titles, metrics and the dashboard of Grafana: that they, and the docs, say the same."""

from __future__ import annotations

import json
import re

import pytest
import torch

from raylora.cluster.metrics import METRICS, title
from raylora.mmlu.prompts import encode_questions
from raylora.mmlu.scoring import evaluate
from raylora.records import Example, Message, Question
from raylora.work_counts import work_counts
from tests.helpers.grafana import DASHBOARD, DOCS, expressions

# Titles


def test_a_title_says_who_does_what():
    assert title("raylora-gpu-3", "dolly_07", "mmlu", 62, 100) == "raylora-gpu-3: dolly_07 · mmlu 62%"
    assert title("raylora-gpu-3", "dolly_07", "load", 0, 0) == "raylora-gpu-3: dolly_07 · load"


@pytest.mark.parametrize(
    "dataset",
    [
        "line\nbreak",
        "tab\tand\rreturn",
        "nul\0",
        "bell\a\x1b[31mred",
        "\u202eback",
        "x" * 5000,
        "字" * 5000,
        "\udcff",
        "",
    ],
)
def test_no_dataset_name_harms_a_title(dataset):
    shown = title("raylora-cpu-0", dataset, "train", 1, 3)
    assert shown.isprintable()
    assert shown.startswith("raylora-cpu-0: ")
    assert shown.endswith(" · train 33%")
    assert len(shown.encode()) < 256


# Metrics


def test_names_say_the_unit_and_labels_stay_few():
    assert len({m.name for m in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"raylora_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert set(metric.labels) <= {"worker", "stage", "state"}, "none that grows with what is run"
        unit = {"back-offs": "backoffs", "tries": "retries"}.get(metric.unit, metric.unit)
        assert metric.name.removesuffix("_total").endswith(f"_{unit}")


def test_the_tally_counts_questions_tokens_and_backoffs(loaded, tokenizer):
    from raylora.config.method import Method
    from raylora.data.encoding import encode_each
    from raylora.training.loop import train_adapter

    questions = [
        Question("anatomy", f"Which bone is number {i}?", ("w", "x", "y", "z"), 0, f"anatomy/{i}") for i in range(12)
    ]
    encoded = encode_questions(tokenizer, questions, {}, "harness", 2048)
    before = work_counts - type(work_counts)()

    def refuse(module, args, kwargs):
        if kwargs["input_ids"].numel() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
    score = evaluate(loaded, encoded, token_budget=2000)
    hook.remove()
    done = work_counts - before
    assert done.questions == len(questions)
    assert done.oom_backoffs == score.info["num_oom_backoffs"] > 0
    assert done.supervised_tokens == 0
    examples = [Example((Message("user", f"What is {i}?"),), f"It is {i}.", f"What is {i}?") for i in range(5)]
    method = Method(num_epochs=2, batch_size=2, gradient_accumulation=1)
    parameters = loaded.attach(method, 0)
    try:
        result = train_adapter(loaded, parameters, [*encode_each(tokenizer, examples, 64)], method, 0)
    finally:
        loaded.detach()
    assert (work_counts - before).supervised_tokens == result.metrics.num_supervised_tokens > 0


def test_the_dashboard_shows_every_metric_and_no_other():
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {name for expr in expressions(dashboard) for name in re.findall(r"\bray_raylora_\w+", expr)}
    assert asked == {m.exposed_name for m in METRICS}
    labels = {m.exposed_name: {*m.labels, "instance"} for m in METRICS}
    for expr in expressions(dashboard):
        (name,) = set(re.findall(r"\bray_raylora_\w+", expr))
        for group in re.findall(r"by \(([^)]*)\)", expr):
            assert set(re.split(r",\s*", group)) <= labels[name], expr
        assert ("rate(" in expr or "increase(" in expr) == name.endswith("_total"), "counters are shown as changes"


def test_prometheus_understands_what_the_dashboard_asks():
    promql = pytest.importorskip("promql_parser", reason="no promql-parser: pip install -e '.[dev]'")
    for expr in expressions(json.loads(DASHBOARD.read_text())):
        promql.parse(re.sub(r"\$__\w+", "1m", expr))


def test_the_dashboard_is_one_that_grafana_takes():
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["title"]
    assert re.fullmatch(r"[\w-]{1,40}", dashboard["uid"])
    assert "id" not in dashboard or dashboard["id"] is None, "Grafana gives it"
    assert dashboard["schemaVersion"] >= 36
    assert {"from", "to"} <= set(dashboard["time"])
    (source,) = [v for v in dashboard["templating"]["list"] if v["type"] == "datasource"]
    assert source["query"] == "prometheus"
    panels = dashboard["panels"]
    assert len({p["id"] for p in panels}) == len({p["title"] for p in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in {"timeseries", "stat", "bargauge", "table"}
        assert panel["datasource"] == {"type": "prometheus", "uid": f"${{{source['name']}}}"}
        assert panel["fieldConfig"]["defaults"]["unit"], "every panel has a unit"
        assert panel["description"]
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, "panels lie on one another"
        taken |= cells
        refs = [target["refId"] for target in panel["targets"]]
        assert refs
        assert len(set(refs)) == len(refs)
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert target["legendFormat"]


def test_the_table_of_the_docs_is_that_of_the_code():
    lines = ["| metric | kind | labels | what it counts |", "| --- | --- | --- | --- |"]
    for m in METRICS:
        labels = ", ".join(f"`{name}`" for name in m.labels)
        lines.append(f"| `{m.exposed_name}` | {m.kind}, {m.unit} | {labels} | {m.definition} |")
    assert "\n".join(lines) in DOCS.read_text()
