"""Whether a model and its layers fit into the memory that a run may take, and what goes to a file if not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx_lrsd.errors import OptionError
from onnx_lrsd.fit.sampling import Sampling
from onnx_lrsd.graph.model import Model
from onnx_lrsd.memory_limit import Need, kept_bytes, working_bytes
from onnx_lrsd.run import Run
from onnx_lrsd.scratch import Scratch
from onnx_lrsd.types import Layer
from onnx_lrsd.wording import bytes_in_words


def ensure_fits(run: Run, model: Model) -> None:
    """Raise OptionError where what is read of ``model`` at once takes more than the memory."""
    loaded, nothing = _loaded_bytes(model), run.memory.least_for((), 1)[0]
    if run.memory.bytes >= nothing + loaded:
        return
    least = bytes_in_words(nothing + loaded)
    why = f"any run takes: give at least {least}"
    if loaded > nothing:
        why = f"the model takes as one file ({least}): give more, or save it with external data"
    raise OptionError(f"{{memory}} is less than what {why}.", memory=run.options.memory)


def _loaded_bytes(model: Model) -> int:
    """Bytes of a model that are read at once; external data is read as it is needed."""
    return 0 if model.external else int(model.proto.ByteSize())


def rows_of(sampling: Sampling, constants: Sequence[Layer]) -> list[tuple[Layer, int]]:
    """The layers of a calibration with the rows taken of each, and constants, of which none are."""
    layers = [(layer, sampling.quotas[layer.output].wanted) for layer in sampling.watched]
    return [*layers, *((constant, 0) for constant in constants)]


def scratch_for(run: Run, model: Model, layers: Sequence[tuple[Layer, int]]) -> Scratch | None:
    """A place for what is kept of ``layers``, with so many rows; None where it fits in memory.

    From here on the run works on no more layers at a time than the memory has room for. Raises OptionError
    where the largest of them cannot be worked on within the memory.
    """
    memory, options = run.memory, run.options
    if not memory.limited:
        return None
    needs = [
        Need(
            layer.name,
            0 if layer.constant else working_bytes(layer.n, layer.m, rows),
            kept_bytes(layer.n, layer.m, rows),
        )
        for layer, rows in layers
    ]
    loaded = _loaded_bytes(model)
    least, name = memory.least_for(needs, options.jobs)
    if memory.bytes < least + loaded:
        each = "" if options.jobs == 1 else f" in each of {options.jobs} processes"
        raise OptionError(
            f"{{memory}} is less than what the largest layer, {name}, takes while it is worked on{each}: "
            f"give at least {bytes_in_words(least + loaded)}, or leave it out with {{exclude}}.",
            memory=options.memory,
        )
    memory.aside = memory.spills(needs, options.jobs, loaded)
    run.workers.at_once = max(options.jobs, min(memory.at_once(needs, loaded), run.workers.count))
    if not memory.aside:
        return None
    return Scratch(None if options.work_dir is None else Path(options.work_dir))
