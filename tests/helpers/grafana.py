"""The dashboard of Grafana, and the page that describes it."""

from __future__ import annotations

from tests.helpers import ROOT

DASHBOARD = ROOT / "cluster" / "grafana-dashboard.json"
DOCS = ROOT / "docs" / "monitoring.md"


def expressions(dashboard: dict) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
