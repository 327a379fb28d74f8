"""What is known of nodes, as node data that Model Explorer reads: one file for each kind of value.

Source: GraphNodeData in node_data_builder.py of ai-edge-model-explorer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any

from onnx_lrsd.facts import NodeData
from onnx_lrsd.types import DENSE

GRADIENT = [{"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#4a8fe0"}]
"""From the least value to the largest."""
FORM_COLOURS = ("#cfe3fb", "#d8f0d3", "#fbe3c0", "#e9d8f4", "#fbd3d9", "#cdeeee", "#eeeec0")
"""Backgrounds of nodes by the kind of their form; layers that stayed dense have none."""


def node_data_files(found: NodeData) -> dict[str, str]:
    """JSON by the name of what is in it: 'time' in milliseconds, 'error' in per cent, and 'form' in words.

    >>> files = node_data_files(NodeData(seconds={"conv": 0.002}, errors={}, forms={"conv": "spatial 8"}))
    >>> json.loads(files["time"])["results"], list(files)
    ({'conv': {'value': 2.0}}, ['time', 'form'])
    """
    times = _numbers({name: 1e3 * value for name, value in found.seconds.items()})
    errors = _numbers({name: 100 * value for name, value in found.errors.items()})
    kinds = dict.fromkeys(form.split()[0].rstrip(",") for form in found.forms.values())
    colours = {
        kind: FORM_COLOURS[i % len(FORM_COLOURS)] for i, kind in enumerate(k for k in kinds if k != DENSE)
    }
    forms = {}
    for name, form in found.forms.items():
        colour = colours.get(form.split()[0].rstrip(","))
        forms[name] = {"value": form} | ({"bgColor": colour} if colour else {})
    data: dict[str, dict[str, Any]] = {
        "time": {"name": "time (ms)", "results": times, "gradient": GRADIENT},
        "error": {"name": "error (%)", "results": errors, "gradient": GRADIENT},
        "form": {"name": "form", "results": forms},
    }
    return {name: json.dumps(part, indent=2) for name, part in data.items() if part["results"]}


def _numbers(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Each value to four digits; those that are not finite are left out."""
    return {name: {"value": float(f"{value:.4g}")} for name, value in values.items() if isfinite(value)}
