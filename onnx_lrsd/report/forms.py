"""How the form of a layer is told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from onnx_lrsd.facts import (
    LayerReport,
)
from onnx_lrsd.report.grid import (
    range_text,
)
from onnx_lrsd.storage import STORAGES

FORMS_SHOWN = 2
"""Kinds of forms shown of the layers in one row."""


def form_of(layer: LayerReport) -> str:
    """The form of the weight, and how many channels are left where some were cut."""
    kept = layer.gives or layer.reads
    width = f"width {kept[0]} of {kept[1]}" if kept is not None else ""
    if layer.gives is not None and layer.reads is not None:
        width += f", reads {layer.reads[0]} of {layer.reads[1]}"
    if not width:
        return _written(layer)
    narrow = replace(layer, gives=None, reads=None).left
    return width if narrow else f"{_written(layer)}, {width}"


def forms_in_words(group: Sequence[LayerReport]) -> str:
    """The form of all, or the kinds with the ranges of their ranks or widths; of dense codes the storages."""
    forms = {*map(form_of, group)}
    if len(forms) == 1:
        return forms.pop()
    counts = defaultdict[str, list[int]](list)
    for layer in group:
        kind, count = _kind(layer)
        counts[kind].append(count)
    said = []
    for kind, found in counts.items():
        if any(found):
            said.append(f"{kind} {range_text([str(count) for count in sorted(found)])}")
        else:
            own = [layer for layer in group if _kind(layer) == (kind, 0)]
            said += [name for name in STORAGES if any(name in layer.weights for layer in own)] or [kind]
    sparse = " + S" if any(layer.nonzeros for layer in group) else ""
    return ", ".join(said[:FORMS_SHOWN]) + (", ..." if len(said) > FORMS_SHOWN else "") + sparse


def _kind(layer: LayerReport) -> tuple[str, int]:
    """The kind of a form, and the rank or width that says how small it is; 0 where neither does."""
    kept = layer.gives or layer.reads
    return (layer.form, layer.rank) if layer.rank or kept is None else ("width", kept[0])


def _written(layer: LayerReport) -> str:
    """The form of the weight."""
    if layer.weights or layer.entries:
        return _in_codes(layer)
    rank = f" {layer.rank}" if layer.rank else ""
    pattern = f"{layer.kept}:{layer.of}" if layer.of else f"S {layer.nonzeros:,}"
    if layer.of and not layer.rank:
        return pattern
    return f"{layer.form}{rank}" + (f" + {pattern}" if layer.nonzeros else "")


def _in_codes(layer: LayerReport) -> str:
    """The storage of a dense weight, or the mean bits of the ranks; and the storage of S."""
    low = next(iter(layer.weights), "")
    if layer.rank:
        bits = sum(STORAGES[name].bits * count for name, count in layer.weights.items()) / layer.rank
        low = f"{layer.form} {layer.rank} in {bits:.1f} bits"
    sparse = f"S {layer.nonzeros:,} {layer.entries}" if layer.nonzeros else ""
    return " + ".join(part for part in (low, sparse) if part)
