"""MLflow's UI in a real browser: two strategies' runs are found by their tags and compared, with the paper's table."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from helpers import Freezer, chromium, free_port, serving

from layerlab import Study
from layerlab.runs import tracking

# `LAYERLAB_SHOTS=docs` keeps the pictures that the docs show.
SHOTS = os.environ.get("LAYERLAB_SHOTS")


@pytest.fixture
def finished(fake, digits, residual) -> tuple[str, str, list[str]]:
    """A finished study: (experiment, its notebook's run, the runs of its two strategies)."""
    fake()
    study = Study("fake")
    study.compare("main", residual, digits, {"plain": (), "frozen": Freezer()}, table="I", epochs=4, batch_size=256,
                  progress=False)
    study.table("table-1", pd.DataFrame({"paper": [43.5], "measured": [42.5]}, index=["top-1 of the paper"]))
    study.claim("gain", 1.0, seeds=[0], conditions={"dataset": "digits"})
    study.finish()
    number = tracking.experiment_id("fake")
    runs = tracking.client().search_runs([number], "tags.`table` = 'I'", order_by=["tags.`arm`"])
    return number, study.run_id, [run.info.run_id for run in runs]


@pytest.fixture
def page(finished) -> Iterator:
    """A browser, and MLflow's UI on the workbook's database: (driver, address)."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", tracking.tracking_uri(), "--host",
               "127.0.0.1", "--port", str(port), "--workers", "1"]
    with chromium(1600, 1000) as browser, serving(command, f"http://127.0.0.1:{port}/health"):
        yield browser, f"http://127.0.0.1:{port}/#"


def _shows(browser, *parts: str, shot: str = "") -> str:
    """The page's text, once it shows all of the parts."""
    from selenium.webdriver.common.by import By

    deadline = time.monotonic() + 60
    while True:
        text = browser.find_element(By.TAG_NAME, "body").text
        missing = [part for part in parts if part not in text]
        if not missing:
            break
        assert time.monotonic() < deadline, f"the page does not show {missing}: {text[:2000]}"
        time.sleep(0.3)
    if SHOTS and shot:
        time.sleep(2)  # what is still being drawn
        browser.save_screenshot(str(Path(SHOTS) / f"{shot}.png"))
    return text


@pytest.mark.skipif(importlib.util.find_spec("selenium") is None, reason="needs selenium: pip install selenium")
def test_two_strategies_are_found_by_their_tags_and_compared(page, finished):
    browser, address = page
    number, notebook, runs = finished
    search = urllib.parse.quote("tags.`paper` = 'fake' and tags.`table` = 'I'")
    browser.get(f"{address}/experiments/{number}/runs?searchFilter={search}&compareRunsMode=TABLE")
    text = _shows(browser, "frozen · digits · seed 0", "plain · digits · seed 0", shot="mlflow-runs")
    assert "notebook" not in text.split("Run Name")[-1]

    wanted = urllib.parse.urlencode({"runs": json.dumps(runs), "experiments": json.dumps([number])})
    browser.get(f"{address}/compare-runs?{wanted}")
    _shows(browser, "Comparing 2 Runs", "test/top1", "cost/backward_flops", "freezer/seconds", shot="mlflow-compare")

    metrics = urllib.parse.urlencode({
        "runs": json.dumps(runs), "experiments": json.dumps([number]), "metric": json.dumps("test/top1"),
        "plot_metric_keys": json.dumps(["test/top1"]), "plot_layout": json.dumps({"autosize": True}),
        "x_axis": "step", "y_axis_scale": "linear", "line_smoothness": 1, "show_point": "true",
        "deselected_curves": "[]", "last_linear_y_axis_range": "[]",
    })
    browser.get(f"{address}/metric?{metrics}")
    _shows(browser, "test/top1", "frozen", "plain", shot="mlflow-metric")

    browser.get(f"{address}/experiments/{number}/runs/{notebook}/artifacts/tables/table-1.csv")
    _shows(browser, "top-1 of the paper", "43.5", "42.5", shot="mlflow-table")
