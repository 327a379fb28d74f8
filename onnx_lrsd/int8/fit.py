"""Low rank times int8: fits with the quantiser behind them, and what each of the two steps does alone."""

from __future__ import annotations

from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import ModelError
from onnx_lrsd.facts import Int8, Verification
from onnx_lrsd.graph.model import Model, check
from onnx_lrsd.int8.quantise import Quantised, quantise
from onnx_lrsd.measure.compare import compare
from onnx_lrsd.plan.planner import Fit, Forms
from onnx_lrsd.run import Run
from onnx_lrsd.runtime.quantiser import saturates
from onnx_lrsd.types import Factors, Progress

TOLERANCE = 0.01
"""Output error that int8 may add, where the user names none for the whole."""
LOW_RANK, INT8, BOTH = "low rank", "int8", "both"


class Int8Fit:
    """A fit whose result is quantised; ``low_rank`` and ``made`` are the last fit before and after it."""

    def __init__(self, run: Run, source: Model, fit: Fit, samples: Samples) -> None:
        self._run, self._source, self._fit, self._samples = run, source, fit, samples
        most = run.options.max_error
        self._tolerance = TOLERANCE if most is None else most / 2
        self.low_rank = source
        self.made = Quantised(source, 0, {}, 0.0)

    def __call__(self, *, forms: Forms, progress: Progress | None = None) -> tuple[Model, dict[str, Factors]]:
        """The model with ``forms`` and int8, and the factors."""
        self.low_rank, factors = self._fit(forms=forms, progress=progress)
        with self._run.clock("int8"):
            self.made = self._quantised(self.low_rank, progress)
        return self.made.model, factors

    def _quantised(self, model: Model, progress: Progress | None) -> Quantised:
        try:
            return quantise(model, self._samples, self._tolerance, progress=progress)
        except ModelError as error:  # the low rank is worth having all the same
            if str(error) not in self._run.warnings:
                self._run.warnings.append(str(error))
            return Quantised(model, 0, {}, 0.0)

    def fastest(self, both: Verification, samples: Samples) -> tuple[str, Model, Verification, Int8]:
        """The fastest of the last fit, of its low rank alone and of int8 alone, and what was measured of it.

        ``both`` is the last fit against the original on ``samples``.
        """
        run, made = self._run, {BOTH: self.made}
        models, found = {BOTH: self.made.model}, {BOTH: both}
        if self.made.nodes and self.low_rank is not self._source:
            with run.clock("int8"):
                made[INT8] = self._quantised(self._source, run.progress)
            check(made[INT8].model, self._source)
            models |= {INT8: made[INT8].model, LOW_RANK: self.low_rank}
            metric = None if run.options.max_drop is None else run.options.metric
            for name in (INT8, LOW_RANK):
                found[name] = compare(
                    self._source, models[name], samples, metric=metric, progress=run.progress
                )
        best = max(found, key=lambda name: found[name].latency_ratio or 0.0)
        kept = made.get(best)
        for reason, count in (kept.without_kernel if kept else {}).items():
            said = "1 node stays" if count == 1 else f"{count} nodes stay"
            run.warnings.append(f"{said} in float: {reason}.")
        if kept and kept.nodes and saturates():
            run.warnings.append(
                "Sums of int8 products saturate on this processor, so weights take 7 bits of their 8. "
                "The result is right on any; one made on a processor with VNNI would be a little closer."
            )
        report = Int8(best, kept.nodes if kept else 0, kept.left if kept else {}, found)
        return best, models[best], found[best], report
