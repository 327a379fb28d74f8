"""One shard of a calibration: its share of the samples is run, and what it taught is written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from onnx_lrsd.commands.prepare import asked_for, find
from onnx_lrsd.fit.sampling import gather, sampling_of
from onnx_lrsd.fit.shards import facts_of, shard_of, write_part
from onnx_lrsd.run import Options, start
from onnx_lrsd.types import Progress


def calibrate_shard(
    model: str | Path | onnx.ModelProto,
    calibration: Any,
    output: Path,
    *,
    shard: str = "1/1",
    evaluation: Any = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> int:
    """Run the ``shard`` ('3/16') of ``calibration`` and write what it gave to ``output``; counts its rows.

    ``evaluation`` and ``options`` are those that ``optimize`` will be given with ``moments``: they decide
    which samples are kept apart and which layers are worked on. Raises OptionError for a shard that is none,
    another LrsdError for anything that is wrong with the input.
    """
    which = shard_of(shard)
    run = start((options or Options()).with_goal(), progress=progress)
    found = find(run, model, calibration, evaluation)
    assert found.fit_on is not None, "calibration is given"
    asked = asked_for(run, found.layers, found.pairs, None)
    sampling = sampling_of(found.source, found.layers, found.fit_on, asked, run.options.seed)
    rows = gather(found.source, sampling, which.number, which.of, progress)
    write_part(output, which, facts_of(found.original, sampling), sampling, rows)
    return sum(len(inputs) for _, inputs, _ in rows)
