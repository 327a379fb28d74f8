"""The targets beside other tools, at the same bytes or the same time, on the same model and data.

    python -m benchmarks peers FOLDER... --target size|onnxruntime [--ratios 4,8,12] [--samples N]
        [--pruners NAMES]

``--target size``: bytes of the file beside "quantised only" (the same solver without low rank and sparse
parts, and ONNX Runtime's quantisers at the size that they give) and "pruned only" (onnxsim's, the entries
that are left stored in the best coding), then the scores over the bytes. ``--target onnxruntime``: MACs and
latency beside onnxsim's structured pruning at the same MACs and at the same measured latency. ``--samples``
counts for all alike, and ``--pruners`` names some of SparseGPT,Wanda,magnitude,magnitude everywhere.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import onnx_lrsd
from benchmarks import other_tools
from benchmarks.options import FOLDERS, JSON, LIMIT, comma_separated
from benchmarks.prepared import TOP1, Prepared, read
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.facts import LoadCost, Verification
from onnx_lrsd.graph.model import Model, model_bytes
from onnx_lrsd.measure.compare import compare, time_pair, total_price
from onnx_lrsd.measure.load_cost import opening_cost
from onnx_lrsd.types import DENSE

OPTIONS = (FOLDERS, LIMIT, JSON)
OURS, QUANTISED, PRUNED = "ours", "quantised only", "pruned only"
MOST_CUT, SHARES, SPEED_SECONDS = 0.98, 16, 1.0
"""Structured pruning ends here. Shares of the channels that are tried for a latency, seconds for each."""


@dataclass(frozen=True)
class Row:
    """One result, of a ``group``. Ratios are of the original to it; ``says`` tells why there are none.

    ``points`` are hundredths of the score; ``error`` is the squared change of the outputs over their
    variance. Opening is in milliseconds and MB of the process.
    """

    model: str
    ratio: float | None
    group: str
    method: str
    bytes: float = float("nan")
    macs: float | None = None
    latency: float | None = None
    interval: tuple[float, float] | None = None
    opening_ms: float | None = None
    peak_mb: float | None = None
    before: float = float("nan")
    after: float = float("nan")
    points: tuple[float, float] | None = None
    error: float = 0.0
    says: str = ""

    def line(self, target: str) -> str:
        """Its line in the table of a target."""
        asked = "" if self.ratio is None else f"{self.ratio:g} x"
        start = f"| {self.model} | {asked} | {self.group}: {self.method} |"
        if self.says:
            return f"{start} {self.says} | | | | | | |"
        macs = "" if self.macs is None else f"{self.macs:.2f} x"
        speed = "" if self.latency is None else f"{self.latency:.2f} x"
        if self.interval is not None:
            speed += " ({:.2f} to {:.2f})".format(*self.interval)
        opening = "" if self.opening_ms is None else f"{self.opening_ms:.0f} ms, {self.peak_mb:.0f} MB"
        cost = f"{speed} | {opening}" if target == "size" else f"{macs} | {speed}"
        lost = f"{100 * (self.after - self.before):+.2f}"
        if self.points is not None:
            lost += " ({:+.2f} to {:+.2f})".format(*(100 * p for p in self.points))
        scores = f"{100 * self.before:.2f} | {100 * self.after:.2f} | {lost} | {self.error:.2g}"
        return f"{start} {self.bytes:.2f} x | {cost} | {scores} |"


COLUMNS = {"size": "latency (95 %) | opening, peak", "onnxruntime": "MACs | latency (95 %)"}


def header(target: str) -> str:
    """Of the table of a target: what decoding does not change is left out, MACs or opening."""
    columns = f"model | asked | method | bytes | {COLUMNS[target]} | score before | after | points (95 %)"
    return f"| {columns} | output error |\n" + 10 * "|---" + "|"


@dataclass(frozen=True)
class Case:
    """A prepared model, and how many calibration samples all may use."""

    given: Prepared
    limit: int | None

    @cached_property
    def opened(self) -> LoadCost:
        """What it takes to open the original."""
        return opening_cost(self.given.source)

    def judged(
        self,
        model: Model,
        group: str,
        method: str,
        ratio: float | None = None,
        counted: int | None = None,
        opens: bool = False,
    ) -> Row:
        """The row of ``model``. With ``counted`` bytes it is no file of its own: nothing of it is timed."""
        found = compare(
            self.given.source, model, self.given.evaluation, bytes_after=counted, latency=counted is None
        )
        opened = opening_cost(model) if opens else None
        macs = counted is None and not opens
        return self._row(model, found, opened, macs, ratio=ratio, group=group, method=method)

    def _row(
        self, model: Model, found: Verification, opened: LoadCost | None, macs: bool, **names: Any
    ) -> Row:
        """What was measured of ``model``; with ``macs``, those too."""
        metric = found.metric if self.given.scored_by == TOP1 else None
        return Row(
            self.given.name,
            **names,
            bytes=found.before.bytes / found.after.bytes,
            macs=found.before.macs / found.after.macs if macs else None,
            latency=found.latency_ratio,
            interval=found.latency_interval,
            opening_ms=1e3 * opened.seconds if opened else None,
            peak_mb=opened.peak_bytes / 1e6 if opened else None,
            before=metric.before if metric else self.given.score_before,
            after=metric.after if metric else self.given.score(model),
            points=metric.interval if metric else None,
            error=found.error,
        )

    def ours(
        self, target: str, ratio: float, group: str, forms: tuple[str, ...] | None = None
    ) -> tuple[Row, Model | None]:
        """The package's own row and model."""
        try:
            model, report, _ = onnx_lrsd.optimize(
                self.given.model,
                self.given.folder / "calib.npz",
                evaluation=self.given.evaluation,
                target=target,
                ratio=ratio,
                samples=self.limit,
                forms=forms,
            )
        except LrsdError as error:
            return Row(self.given.name, ratio, group, "onnx-lrsd", says=str(error)), None
        found = report.verification
        assert found is not None
        opened = None if report.loading is None else report.loading.after
        names = {"ratio": ratio, "group": group, "method": "onnx-lrsd"}
        return self._row(model, found, opened, target != "size", **names), model

    def original(self) -> Row:
        """What all others are measured by."""
        opened = self.opened
        return Row(
            self.given.name, None, "original", "as it is", 1.0, None, None, None,
            1e3 * opened.seconds, opened.peak_bytes / 1e6, self.given.score_before, self.given.score_before,
        )  # fmt: skip


def size_rows(case: Case, ratios: list[float], tool: ModuleType | None, methods: list[str]) -> Iterator[Row]:
    """Ours, quantised only and pruned only at each ratio of bytes; ONNX Runtime's quantisers first."""
    yield case.original()
    for method, model in other_tools.quantisers(case.given.source, case.given.calibration):
        name = f"ONNX Runtime, {method}"
        if isinstance(model, str):
            yield Row(case.given.name, None, QUANTISED, name, says=model)
        else:
            yield case.judged(model, QUANTISED, name, opens=True)
    for ratio in ratios:
        yield case.ours("size", ratio, OURS)[0]
        yield case.ours("size", ratio, QUANTISED, forms=(DENSE,))[0]
        for method in methods:
            yield pruned(case, ratio, method, tool)


def pruned(case: Case, ratio: float, method: str, tool: ModuleType | None) -> Row:
    """onnxsim's pruning at this ratio of bytes.

    Of the storages of its values that which scores best on the evaluation samples: a choice that ours,
    which sees none of them, is not given.
    """
    name = f"onnxsim, {method}"
    if tool is None:
        return Row(case.given.name, ratio, PRUNED, name, says="onnxsim is not installed")
    wanted, best = round(model_bytes(case.given.source) / ratio), None
    for storage in other_tools.VALUES:
        found = other_tools.at_bytes(tool, method, case.given.source, wanted, storage, case.given.calibration)
        if found is not None:
            row = case.judged(found[0], PRUNED, f"{name}, {storage.name}", ratio, found[1])
            if best is None or (row.after, -row.error) > (best.after, -best.error):
                best = row
    return best or Row(case.given.name, ratio, PRUNED, name, says="no storage of its values needs zeros")


def speed_rows(case: Case, ratios: list[float], tool: ModuleType | None, methods: list[str]) -> Iterator[Row]:
    """Ours and structured pruning at the same MACs, and at the same latency."""
    for ratio in ratios:
        row, model = case.ours("onnxruntime", ratio, OURS)
        yield row
        if model is None:
            continue
        for method in (m for m in methods if m in other_tools.STRUCTURED):
            name = f"onnxsim, structured, {method}"
            if tool is None:
                yield Row(case.given.name, ratio, PRUNED, name, says="onnxsim is not installed")
                continue
            try:
                yield from structured(case, tool, method, row, model)
            except Exception as error:  # of another tool: it raises what it likes
                said = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                yield Row(case.given.name, ratio, PRUNED, name, says=said)


def structured(case: Case, tool: ModuleType, method: str, ours: Row, model: Model) -> Iterator[Row]:
    """onnxsim's structured pruning with as few MACs as ``ours``, and as fast as ``model``."""
    ready = other_tools.folded(case.given.source)

    def cut(sparsity: float) -> Model:
        return other_tools.structured(tool, method, ready, sparsity, case.given.calibration)

    judge = case.given.evaluation
    most, total = total_price(model, judge).macs, total_price(case.given.source, judge).macs
    feed = next(iter(judge.batches(1)))
    name = f"onnxsim, structured, {method}"

    def too_many(sparsity: float) -> bool:
        return total_price(cut(sparsity), judge).macs > most

    def fast_enough(sparsity: float) -> bool:
        return time_pair(model.proto, cut(sparsity).proto, feed, seconds=SPEED_SECONDS).ratio >= 1

    def fewest() -> float:  # kernels work on blocks of channels: fewer are not always faster
        shares = (share / SHARES for share in range(1, SHARES))
        return next((share for share in shares if fast_enough(share)), 1.0)

    searches: dict[str, Callable[[], float]] = {
        "same MACs": partial(other_tools.bisect, too_many, 10),
        "same latency": fewest,
    }
    for says, search in searches.items():
        sparsity = search()
        if sparsity > MOST_CUT:
            least = total / total_price(cut(MOST_CUT), judge).macs
            text = f"{says}: out of reach, {least:.2f} x MACs with {MOST_CUT:.0%} of the channels cut"
            yield Row(case.given.name, ours.ratio, PRUNED, name, says=text)
        else:
            yield case.judged(cut(sparsity), PRUNED, f"{name}, {says}", ours.ratio)


def frontier(rows: list[Row], ratios: list[float]) -> Iterator[str]:
    """Scores over bytes, in brackets output errors: ours, quantised only, and the best of pruned only."""
    yield "| model | bytes | ours | quantised only | pruned only, best of all |\n|---|---|---|---|---|"
    for name in dict.fromkeys(row.model for row in rows):
        for ratio in ratios:
            cells = []
            for group in (OURS, QUANTISED, PRUNED):
                found = [r for r in rows if (r.model, r.ratio, r.group, r.says) == (name, ratio, group, "")]
                best = max(found, key=lambda row: (row.after, -row.error), default=None)
                cells.append(f"{100 * best.after:.2f} ({best.error:.2g})" if best else "")
            yield f"| {name} | {ratio:g} x | {' | '.join(cells)} |"


def versions() -> str:
    """Of what takes part."""
    found = [f"Python {platform.python_version()}"]
    for name in ("onnx", "onnxruntime", "numpy", "onnxsim"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} missing")
    return ", ".join(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("--target", choices=tuple(COLUMNS), required=True)
    parser.add_argument("--ratios", type=comma_separated, default=[4.0, 8.0, 12.0])
    parser.add_argument("--pruners", default=",".join(other_tools.PRUNERS))


def run(given: argparse.Namespace) -> None:
    """Print the tables of the models given."""
    tool, methods, rows = other_tools.onnxsim(), given.pruners.split(","), []
    print(f"{versions()}\n\n{header(given.target)}", flush=True)
    for folder in given.folders:
        case = Case(read(folder, given.samples), given.samples)
        found = size_rows if given.target == "size" else speed_rows
        for row in found(case, given.ratios, tool, methods):
            rows.append(row)
            print(row.line(given.target), flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if given.target == "size":
        print("\n" + "\n".join(frontier(rows, given.ratios)))
