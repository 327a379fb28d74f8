"""The report page: one file that loads nothing, tells the whole report, and needs no mouse."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onnx_lrsd.errors import DataError
from onnx_lrsd.report.html import report_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
EVIL = '</script><img src="http://example.com/x" onerror="document.title=1">'
PICTURE = {"kind": "entries", "shape": [64, 576], "cells": ["0129" * 16] * 32}


def layer(index: int, changed: bool = True) -> dict[str, Any]:
    """A row of the report, for a convolution of 64 channels."""
    less = 2 if changed else 1
    return {
        "name": f"/body/block.{index}/conv/Conv",
        "output": f"y{index}",
        "op": "Conv",
        "shape": [64, 64, 3, 3],
        "form": "spatial" if changed else "dense",
        "rank": 16 + index if changed else 0,
        "nonzeros": 900 if changed else 0,
        "pattern": "unstructured" if changed else "none",
        "macs_before": 10**6 * (index + 1),
        "macs_after": 10**6 * (index + 1) // less,
        "bytes_before": 147_456,
        "bytes_after": 147_456 // less,
        "parameters_before": 36_864,
        "parameters_after": 36_864 // less,
        "error": 0.01 / (index + 1) if changed else 0.0,
        "reason": "" if changed else "no smaller form is predicted to be faster",
        "kept": 0,
        "of": 0,
        "weights": {},
        "entries": "",
    }


def layer_details(index: int, points: int = 40) -> dict[str, Any]:
    shares = [(i + 1) / points for i in range(points)]
    bins = [math.exp(-(((i - 20) / 8) ** 2)) / 14 for i in range(40)]
    return {
        "output": f"y{index}",
        "planned": "spatial 16",
        "seconds_before": 1e-4 * (index + 1),
        "seconds_after": 6e-5 * (index + 1),
        "sensitivity": 0.1 + index / 5,
        "curve": {
            "forms": [f"{'spatial' if i % 2 else 'channel'} {16 + i}" for i in range(points)],
            "groups": ["spatial" if i % 2 else "channel" for i in range(points)],
            "errors": [0.3 * (1 - share) ** 2 + 1e-6 * (index + 1) for share in shares],
            "macs": [int(1e6 * (index + 1) * share) for share in shares],
            "parameters": [int(36_864 * share) for share in shares],
            "bytes": [int(147_456 * share) for share in shares],
            "seconds": [1e-4 * (index + 1) * share for share in shares],
        },
        "spectrum": {
            "ranks": list(range(1, 65)),
            "values": [1 / rank for rank in range(1, 65)],
            "left": [0.5**rank for rank in range(1, 65)],
        },
        "picture": PICTURE,
        "histogram": {"low": -2.0, "high": 2.0, "before": bins, "after": bins[::-1]},
    }


def a_report(layers: int = 4) -> dict[str, Any]:
    """A report with every part that the page draws; its last layer was left as it was."""
    cost = {"bytes": 3_000_000, "parameters": 750_000, "macs": 60_000_000, "latency_ms": 1.5}
    less = {"bytes": 1_800_000, "parameters": 450_000, "macs": 30_000_000, "latency_ms": 0.9}
    return {
        "schema": 1,
        "tool": {"name": "onnx-lrsd", "version": "0.1.0"},
        "model": {"input": "models/net.onnx", "output": "models/net.lrsd.onnx"},
        "target": "onnxruntime",
        "cost": "macs",
        "calibration": {"samples": 300, "source": "calib.npz"},
        "before": cost,
        "after": less,
        "ratio": {
            "bytes": 5 / 3,
            "macs": 2.0,
            "parameters": 5 / 3,
            "latency": {"median": 1.66, "interval": [1.6, 1.7]},
        },
        "outputs": [
            {
                "name": "scores",
                "relative_error": 0.004,
                "groups": [],
                "error_interval": [0.003, 0.006],
                "largest": 0.25,
                "cosine": 0.9996,
                "agreement": 0.99,
            },
            {
                "name": "found",
                "relative_error": 0.0001,
                "groups": [
                    {
                        "name": f"found[:, {part}]",
                        "slice": f"[:, {part}]",
                        "relative_error": error,
                        "interval": [error / 2, error * 2],
                        "logits_error": None,
                    }
                    for part, error in (("0:4", 0.0001), ("4:84", 0.0035))
                ],
                "error_interval": [0.002, 0.007],
            },
        ],
        "metric": {
            "name": "top1",
            "before": 0.91,
            "after": 0.905,
            "samples": 400,
            "interval": [-0.01, 0.002],
        },
        "promise": {"kind": "ratio", "asked": 2.0, "got": 2.0, "kept": True},
        "int8": None,
        "loading": None,
        "tensorrt": None,
        "predicted": {"latency": 1.7, "table": "built in: some processor"},
        "layers": [layer(i, changed=i + 1 < layers) for i in range(layers)],
        "whole": [
            {"name": "gate", "op": "Conv", "reason": "Add /s joins", "kind": "Add joins", "node": "/s"}
        ],
        "warnings": ["Few samples: the error may be larger on others."],
        "versions": {"onnx-lrsd": "0.1.0", "numpy": "2.0"},
        "seconds": {"load": 0.1, "calibrate": 1.2, "plan": 3.4},
        "details": {
            "command": "onnx-lrsd optimize models/net.onnx --calib calib.npz --ratio 2",
            "machine": {"processor": "some processor", "cores": 2},
            "trade_off": {
                "cost": "macs",
                "predicted": [{"ratio": 1 + i / 4, "error": 0.0001 * 2**i} for i in range(8)],
                "tried": [{"ratio": 3.0, "error": 0.03}],
                "chosen": {"ratio": 2.0, "error": 0.004},
            },
            "layers": [layer_details(i) for i in range(layers)],
        },
    }


def test_a_page_of_sixty_layers_takes_less_than_a_megabyte() -> None:
    assert len(report_page(json.dumps(a_report(60))).encode()) < 10**6


def test_the_file_names_no_address_on_the_network() -> None:
    page = report_page(json.dumps(a_report())).replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in page and "https:" not in page and "//cdn" not in page


def test_names_in_a_model_cannot_end_the_data_they_stand_in() -> None:
    facts = a_report()
    facts["layers"][0]["name"] = facts["model"]["input"] = EVIL
    page = report_page(json.dumps(facts))
    assert EVIL not in page and page.count("</script>") == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "no report"),
        ('{"schema": 1, "layers": {}}', "no report"),
        ('{"schema": 1, "model": {"input": "a.onnx"}, "total": {}, "layers": []}', "no report"),
        ('{"schema": 2, "model": {"input": "a.onnx"}, "outputs": []}', "schema 2"),
    ],
)
def test_what_is_no_report_is_refused_with_the_remedy(text: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as raised:
        report_page(text)
    assert "--json" in str(raised.value)


def a_comparison() -> dict[str, Any]:
    """A comparison tensor by tensor; the third of six tensors is where the models part."""
    facts = {key: value for key, value in a_report().items() if key in ("schema", "tool", "metric")}
    facts |= {key: a_report()[key] for key in ("before", "after", "ratio", "outputs")}
    tensors = [
        {
            "name": f"t{i}",
            "node": f"node{i}",
            "op": "Conv" if i % 2 else "Relu",
            "error": 0.01 / i if i > 2 else 0.0,
            "inherited": 0.01 / (i - 1) if i > 3 else 0.0,
            "cosine": 0.999,
            "largest": 0.25,
        }
        for i in range(1, 7)
    ]
    return facts | {
        "model": {"before": "a.onnx", "after": "b.onnx"},
        "data": {"samples": 64, "source": "eval.npz"},
        "warnings": ["Few samples: give more."],
        "drift": {"first": "t3", "most": "t3"},
        "tensors": tensors,
    }


def a_sweep() -> dict[str, Any]:
    """A sweep of two ratios with and without int8, the second of which breaks the promise."""
    base = a_report()
    points = []
    for ratio, int8, speed, error in (
        (1.5, False, 1.4, 0.001),
        (3.0, False, 2.4, 0.02),
        (None, True, 2.0, 0.004),
        (1.5, True, 2.9, 0.005),
        (3.0, True, 4.4, 0.03),
    ):
        share = ratio or 1.0
        points.append(
            {key: base[key] for key in ("before", "after", "outputs", "metric")}
            | {
                "ratio_asked": ratio,
                "int8": int8,
                "output": f"out/net.{ratio}.onnx",
                "ratio": {
                    "bytes": share * (4 if int8 else 1),
                    "macs": share,
                    "parameters": share,
                    "latency": {"median": speed, "interval": [speed * 0.95, speed * 1.05]},
                },
                "error": error,
                "error_interval": [error / 2, error * 1.5],
                "samples": 400,
                "promise": {"kind": "max_error", "asked": 0.01, "got": error * 1.5, "kept": error < 0.006},
            }
        )
    return {key: base[key] for key in ("schema", "tool", "target", "cost", "calibration", "warnings")} | {
        "model": {"input": "models/net.onnx"},
        "gains": "latency",
        "points": points,
        "best": 3,
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, headless; no browser is ever downloaded."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


class Opened:
    """A page, what it said on the console, and what it asked the network for."""

    def __init__(self, browser: Any, path: Path, facts: dict[str, Any], **context: Any) -> None:
        path.write_text(report_page(json.dumps(facts)), encoding="utf-8")
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_context(**context).new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("main")

    def rows(self) -> list[str]:
        """Names of the layers in the list, from its top."""
        found = self.page.locator("tbody tr[data-name]").evaluate_all("rows => rows.map(r => r.dataset.name)")
        return [str(name) for name in found]

    def picked(self) -> str:
        return str(self.page.locator(".picked h3").inner_text())

    def curve(self) -> str:
        return str(self.page.locator(".picked .curves svg[role=img]").inner_html())

    def command(self) -> str:
        return str(self.page.locator(".command code").last.inner_text())


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Opened]:
    found = Opened(browser, tmp_path / "page.html", a_report())
    yield found
    found.page.context.close()


def test_nothing_is_said_on_the_console_and_nothing_is_fetched(opened: Opened) -> None:
    opened.page.wait_for_timeout(100)
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("file:", "data:"))] == []
    assert sum(url.startswith("file:") for url in opened.asked) == 1


@pytest.mark.slow
def test_what_is_not_counted_stands_beside_the_macs(browser: Any, tmp_path: Path) -> None:
    facts = a_report()
    facts["before"]["not_counted"] = ["2 Loop whose rounds depend on the data"]
    found = Opened(browser, tmp_path / "page.html", facts)
    figure = found.page.locator("dl.figures > div", has_text="MACs").inner_text()
    assert "not counted: 2 Loop whose rounds depend on the data" in figure
    found.page.context.close()


@pytest.mark.slow
def test_names_in_a_model_are_text_on_the_page(browser: Any, tmp_path: Path) -> None:
    facts = a_report()
    facts["layers"][0]["name"] = facts["model"]["input"] = EVIL
    found = Opened(browser, tmp_path / "page.html", facts)
    found.page.wait_for_timeout(100)
    assert found.page.locator("img").count() == 0 and EVIL in found.rows()
    assert found.said == [] and len(found.asked) == 1
    found.page.context.close()


def test_the_largest_rewritten_layer_is_picked_first_and_a_click_picks_another(opened: Opened) -> None:
    assert opened.picked() == "/body/block.2/conv/Conv"
    before = opened.curve()
    opened.page.locator("tbody tr[data-name]").first.click()
    assert opened.picked() == "/body/block.0/conv/Conv"
    assert opened.curve() != before


def test_layers_are_picked_and_excluded_from_the_keyboard(opened: Opened) -> None:
    opened.page.locator("tr[aria-selected=true]").focus()
    for key, picked in (("ArrowUp", 1), ("End", 3), ("Home", 0), ("ArrowDown", 1)):
        opened.page.keyboard.press(key)
        assert opened.picked() == f"/body/block.{picked}/conv/Conv"
    focused = opened.page.evaluate("document.activeElement.dataset.name")
    assert focused == opened.picked()
    outline = opened.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "where the focus is must be seen"
    assert "--exclude" not in opened.command()
    opened.page.keyboard.press("x")
    assert opened.command().endswith(r"--exclude '^(?:/body/block\.1/conv/Conv)$'")
    opened.page.keyboard.press("x")
    assert "--exclude" not in opened.command()


def test_the_layers_that_bring_half_of_the_error_are_excluded_at_once(opened: Opened) -> None:
    # errors of .01, .005 and .0033 with sensitivities of .1, .3 and .5 bring .001, .0015 and .0017
    opened.page.get_by_role("button", name="Exclude the 2 layers that bring half of it").click()
    assert r"--exclude '^(?:/body/block\.1/conv/Conv|/body/block\.2/conv/Conv)$'" in opened.command()
    assert opened.page.locator(".list input:checked").count() == 2


def test_layers_are_filtered_and_sorted(opened: Opened) -> None:
    every = opened.rows()
    assert len(every) == 4
    opened.page.get_by_role("searchbox").fill("block.1")
    assert opened.rows() == ["/body/block.1/conv/Conv"] and opened.picked() == opened.rows()[0]
    opened.page.get_by_role("searchbox").fill("no such layer")
    assert opened.rows() == [] and "No layer" in opened.page.locator(".list").inner_text()
    opened.page.get_by_role("searchbox").fill("")
    header = opened.page.locator(".list").get_by_role("columnheader", name="Error")
    header.get_by_role("button").click()
    assert opened.rows() == every, "the largest error stands first"
    assert header.get_attribute("aria-sort") == "descending"
    header.get_by_role("button").click()
    assert opened.rows() == [every[3], *every[2::-1]]
    opened.page.get_by_label("Which layers").select_option("left")
    assert opened.rows() == [every[3]]


def test_the_unit_of_bars_and_curves_is_switched(opened: Opened) -> None:
    before = opened.curve()
    assert "time left" in before
    opened.page.get_by_role("button", name="bytes", exact=True).click()
    assert "bytes left" in opened.curve()
    assert opened.page.get_by_role("columnheader", name="Bytes").count() == 1


def test_every_part_of_the_report_is_told(opened: Opened) -> None:
    text = opened.page.locator("main").inner_text()
    for said in (
        "net.onnx",
        "Promise kept",
        "Few samples",
        "scores",
        "found[:, 4:84]",
        "0.18\u202f% to 0.70\u202f%",
        "99.0\u202f%",
        "no smaller form is predicted to be faster",
        "All channels stay",
        "Add joins",
        "onnx-lrsd optimize models/net.onnx",
        "some processor",
        "numpy",
    ):
        assert said in text, said


def test_a_report_without_details_leaves_their_panels_out(browser: Any, tmp_path: Path) -> None:
    facts = a_report()
    del facts["details"]
    for row in facts["layers"]:
        del row["output"]
    found = Opened(browser, tmp_path / "page.html", facts)
    assert found.said == [] and len(found.rows()) == 4
    assert found.page.locator(".panel").count() == 0
    found.page.context.close()


@pytest.mark.slow
def test_a_dry_run_and_errors_that_are_not_finite_have_a_page(browser: Any, tmp_path: Path) -> None:
    facts = a_report()
    facts |= {"before": None, "after": None, "ratio": None, "outputs": [], "metric": None, "promise": None}
    found = Opened(browser, tmp_path / "plan.html", facts)
    assert found.said == [] and "A plan only" in found.page.locator("main").inner_text()
    found.page.context.close()
    facts = copy.deepcopy(a_report())
    facts["outputs"][0]["relative_error"] = None
    found = Opened(browser, tmp_path / "nan.html", facts)
    assert found.said == [] and "not finite" in found.page.locator("main").inner_text()
    found.page.context.close()


@pytest.mark.slow
def test_int8_codes_engines_and_broken_promises_have_their_place(browser: Any, tmp_path: Path) -> None:
    facts = a_report()
    sides = {key: facts[key] for key in ("before", "after", "ratio", "outputs", "metric")}
    facts["int8"] = {
        "kept": "both",
        "nodes": 9,
        "left": [{"name": "head", "error": 0.2}],
        "steps": {"low rank": sides, "int8": sides, "both": sides},
    }
    facts["tensorrt"] = {
        "trtexec": "trtexec --onnx=a.onnx --stronglyTyped",
        "sparse": ["conv7"],
        "notes": ["Build it there."],
    }
    facts["loading"] = {
        "before": {"seconds": 0.1, "peak_bytes": 10**8},
        "after": {"seconds": 0.3, "peak_bytes": 2 * 10**8},
    }
    facts["promise"] = {"kind": "max_drop", "asked": 0.5, "got": 0.75, "kept": False}
    facts["layers"][0] |= {"weights": {"int6": 10, "int2": 6}, "entries": "uint8"}
    found = Opened(browser, tmp_path / "page.html", facts)
    text = found.page.locator("main").inner_text()
    for said in (
        "Promise not kept",
        "drop of at most 0.5 points asked, 0.75 got",
        "both, kept",
        "head (20",
        "trtexec --onnx=a.onnx --stronglyTyped",
        "conv7",
        "Opening the model",
    ):
        assert said in text, said
    assert found.said == [] and found.page.locator(".list td.form").first.inner_text().startswith(
        "spatial 16"
    )
    found.page.context.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(browser: Any, tmp_path: Path, width: int) -> None:
    found = Opened(browser, tmp_path / "page.html", a_report(), viewport={"width": width, "height": 800})
    wide = found.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0
    found.page.context.close()


@pytest.mark.slow
def test_a_print_shows_every_layer_on_white(browser: Any, tmp_path: Path) -> None:
    found = Opened(browser, tmp_path / "page.html", a_report(40), color_scheme="dark")
    found.page.emulate_media(media="print")
    hidden = found.page.evaluate("(l => l.scrollHeight - l.clientHeight)(document.querySelector('.list'))")
    assert hidden <= 1
    assert found.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    found.page.context.close()


@pytest.mark.slow
def test_the_theme_follows_the_system_until_it_is_chosen(browser: Any, tmp_path: Path) -> None:
    def paper(found: Opened) -> int:
        return int(found.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))

    for scheme, dark in (("light", False), ("dark", True)):
        found = Opened(browser, tmp_path / "page.html", a_report(), color_scheme=scheme)
        assert (paper(found) < 128) == dark
        button = found.page.get_by_role("button", name="Theme")
        button.click()
        assert paper(found) > 128
        button.click()
        assert paper(found) < 128
        found.page.context.close()


def test_a_comparison_says_where_two_models_part(browser: Any, tmp_path: Path) -> None:
    found = Opened(browser, tmp_path / "page.html", a_comparison())
    text = found.page.locator("main").inner_text()
    assert "Few samples: give more." in text
    assert "a.onnx and b.onnx" in text and "They first differ after node3 (Conv)" in text
    assert found.page.locator("svg[role=img]").count() == 1
    found.page.get_by_label("Order of the tensors").select_option("growth")
    assert found.rows()[0] == "t3"
    found.page.get_by_role("searchbox").fill("relu")
    assert sorted(found.rows()) == ["t2", "t4", "t6"]
    assert found.said == [] and len(found.asked) == 1
    found.page.context.close()


def test_the_page_of_a_sweep_names_the_last_model_within_the_promise(browser: Any, tmp_path: Path) -> None:
    found = Opened(browser, tmp_path / "page.html", a_sweep())
    assert (
        found.page.locator(".verdict").inner_text().split("\n")[0].startswith("\u2713 1.5\u202f\u00d7 + int8")
    )
    assert found.rows() == [
        "as it was",
        "1.5\u202f\u00d7",
        "3\u202f\u00d7",
        "int8 alone",
        "1.5\u202f\u00d7 + int8",
        "3\u202f\u00d7 + int8",
    ]
    charts = found.page.locator("svg[role=img]")
    assert charts.count() == 2, "errors, and the score"
    before = charts.first.inner_html()
    assert "as it was" in before and "asked: at most 1" in before
    found.page.get_by_role("button", name="bytes", exact=True).focus()
    found.page.keyboard.press("Enter")
    assert charts.first.inner_html() != before and "times smaller" in charts.first.inner_html()
    assert found.said == [] and len(found.asked) == 1
    found.page.context.close()


@pytest.mark.slow
def test_a_sweep_without_models_or_gain_has_a_page(browser: Any, tmp_path: Path) -> None:
    for points, said in ((a_sweep()["points"], "Nothing gained"), ([], "What net.onnx can gain")):
        found = Opened(browser, tmp_path / "page.html", a_sweep() | {"points": points, "best": None})
        assert found.said == [] and said in found.page.locator("main").inner_text()
        found.page.context.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "facts", [a_report(), a_comparison(), a_sweep()], ids=["report", "comparison", "sweep"]
)
def test_axe_finds_nothing_that_shuts_people_out(
    browser: Any, tmp_path: Path, facts: dict[str, Any], scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    found = Opened(browser, tmp_path / "page.html", facts, color_scheme=scheme)
    violations = axe.Axe().run(found.page).response["violations"]
    assert [(v["id"], v["impact"], v["nodes"][0]["html"][:200]) for v in violations] == []
    found.page.context.close()
