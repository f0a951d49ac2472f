"""Views: what is shown of the stores and of the metrics."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import stockrt
from stockrt import LATENCY, METRICS, PANELS, dashboard

# ------------------------------------------------------------------------------------------------------
# The dashboard
# ------------------------------------------------------------------------------------------------------

# A histogram is three kinds of series.
SERIES = {metric.name for metric in METRICS} | {f"{LATENCY}_{part}" for part in ("bucket", "sum", "count")}


def expressions() -> list[str]:
    """Return the queries of the dashboard as Grafana gets them."""
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def test_no_panel_is_without_its_metric_and_no_metric_without_a_panel() -> None:
    used = {name for text in expressions() for name in re.findall(r"stockrt_\w+", text)}
    assert used - SERIES == set()
    assert SERIES - used == set()


def test_every_series_is_that_of_the_instances_chosen_and_every_label_is_one_of_its_metric() -> None:
    labels = {metric.name: metric.label for metric in METRICS} | {f"{LATENCY}_bucket": "le"}
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            found = re.findall(r"(stockrt_\w+)(\{instance=~\"\$instance\"\})?", target["expr"])
            assert all(chosen for _, chosen in found), target["expr"]
            named = set(re.findall(r"by \((\w+)\)", target["expr"]))
            named |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) - {
                "instance",
                "exported_instance",
            }
            assert named <= {labels.get(name, "") for name, _ in found}, (target["expr"], named)


def test_counters_are_shown_as_what_was_counted_lately() -> None:
    """Since a counter begins anew with every start of the daemon, its number says nothing."""
    counters = {metric.name for metric in METRICS if metric.kind == "counter"}
    for text in expressions():
        for name in re.findall(r"stockrt_\w+", text):
            lately = re.search(rf"(?:increase|rate)\({name}\{{[^}}]*}}\[", text) is not None
            assert lately == (name in counters or name.startswith(LATENCY)), text


def overlaps(one: dict[str, int], other: dict[str, int]) -> bool:
    """Return whether two places of the grid share a cell."""
    return all(
        one[at] < other[at] + other[size] and other[at] < one[at] + one[size] for at, size in ("xw", "yh")
    )


def test_it_is_json_that_grafana_imports() -> None:
    """A data source to choose, a known model, panels that stand beside each other on 24 columns."""
    model: dict[str, Any] = json.loads(json.dumps(dashboard()))
    assert "id" not in model  # which only a dashboard has that is there already
    variables = {one["name"]: one for one in model["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    panels = model["panels"]
    assert len(panels) == len(PANELS) == len({panel["id"] for panel in panels})
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    pairs = [(a, b) for n, a in enumerate(places) for b in places[:n]]
    assert not [pair for pair in pairs if overlaps(*pair)]
    for panel in panels:
        assert panel["description"]
        assert {panel["datasource"]["uid"], *(one["datasource"]["uid"] for one in panel["targets"])} == {
            "${datasource}"
        }
        assert max(Counter(one["refId"] for one in panel["targets"]).values()) == 1
    states = next(panel for panel in panels if panel["title"] == "State of each key")
    options = states["fieldConfig"]["defaults"]["mappings"][0]["options"]
    assert [options[str(number)]["text"] for number in range(3)] == list(stockrt.KEY_STATES)
