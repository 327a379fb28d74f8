"""Int8 after the rewrite: ONNX Runtime's own static quantiser, kept off the layers that it would spoil.

Weights become int8 per channel and activations uint8 per tensor, by QuantizeLinear and DequantizeLinear
around the nodes (QDQ). Which layers bear it is measured as sensitivities are: each is quantised alone, and
the final outputs are compared; those that lose most for the work they save stay in float.

Ranges of activations are wider than those of the samples by as much as more samples would make them: what
exceeds its range is cut off, which a few samples would bear in place of all.

Where sums of products saturate, weights take 7 bits of their 8.
Source: ONNX Runtime's documentation, Quantize ONNX models, section When and why do I need to try U8U8.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_lrsd.data.samples import Samples, batch_to_run
from onnx_lrsd.errors import LrsdError, ModelError
from onnx_lrsd.fit.sensitivity import Reference
from onnx_lrsd.graph.external_data import dense_values
from onnx_lrsd.graph.model import Model, in_memory, model_bytes, raised
from onnx_lrsd.int8.balance import balanced
from onnx_lrsd.passes.count import compute_tensors, node_macs
from onnx_lrsd.passes.nodes import attribute, domain_of
from onnx_lrsd.passes.operators import OPERATORS
from onnx_lrsd.runtime.quantiser import quantization, saturates
from onnx_lrsd.runtime.session import shapes, simplified, typed
from onnx_lrsd.types import Feed, Progress
from onnx_lrsd.whole_files import PROTOBUF_LIMIT

_WEIGHTED = tuple(op for (_, op), operator in OPERATORS.items() if not operator.NOT_INT8)
_QUANTISED = (*_WEIGHTED, "Relu", "Clip", "MaxPool")
"""What stands between convolutions and takes int8 as it is goes with them."""
_QUANTISING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_OPSET = 13
"""The first with scales per channel."""
RANGE_SAMPLES, ERROR_SAMPLES = 128, 16
"""Samples, at most, that ranges are taken from, and others that errors are measured on."""
_GROUPS = 8
"""Groups of samples, at least, that ranges are averaged over."""
_LARGEST = float(np.finfo(np.float32).max)
AVERAGED_BELOW = 0.5
"""Share of the error with wide ranges below which averaged ones are taken: they cut off what is rare."""


class Quantised(NamedTuple):
    """A quantised model: how many Conv, Gemm and MatMul are int8 in it, and the ones that stay in float.

    ``left`` is by node name: the relative error of the outputs with that node alone in int8. ``error`` is
    that of the whole, measured on calibration samples that gave no ranges. ``without_kernel`` counts the
    nodes that no int8 kernel runs, by the reason.
    """

    model: Model
    nodes: int
    left: dict[str, float]
    error: float
    without_kernel: Mapping[str, int] = {}


def quantise(
    model: Model, samples: Samples, tolerance: float, *, progress: Progress | None = None
) -> Quantised:
    """Make ``model`` int8 where its outputs move by at most ``tolerance``, relative to their variance.

    ``tolerance`` is what int8 may add, whatever the model lost before. With no layer that bears it the
    model comes back as it is. Raises ModelError where ONNX Runtime's quantiser does not take the model.
    """
    ready = balanced(_ready(model), samples)
    measured_on = min(ERROR_SAMPLES, samples.count // 4)
    ranged, measured = samples, samples
    if measured_on >= samples.smallest_batch:
        ranged, measured = samples.split(measured_on, 0)
    layers = _weighted(ready)
    if not layers:
        return Quantised(model, 0, {}, 0.0)
    reference = Reference(Model(ready), measured)

    def error(proto: onnx.ModelProto) -> float:
        return reference.movement(Model(proto))

    if progress is not None:
        progress("int8", 0, len(layers) + 1)
    ranged = ranged.some(RANGE_SAMPLES)
    robust = _ranges(ready, ranged, averaged=True)
    ranges = _widened(_ranges(ready, ranged, averaged=False), robust, _groups_of(ranged))
    whole = _quantised(ready, ranges, layers)
    lost = error(whole)
    other = _quantised(ready, robust, layers)
    if (less := error(other)) < AVERAGED_BELOW * lost:
        ranges, whole, lost = robust, other, less
    if lost <= tolerance:
        return Quantised(_finished(whole, model), len(layers), {}, lost, _without_kernel(ready))
    alone = {}
    for done, name in enumerate(layers):
        alone[name] = error(_quantised(ready, ranges, [name]))
        if progress is not None:
            progress("int8", done + 2, len(layers) + 1)
    work = _work(ready, samples.example())
    worst_first = sorted(layers, key=lambda name: -alone[name] / max(work[name], 1))
    best, lost, count = model, 0.0, len(layers)  # what stays in float so far: all of them
    fewest, tried, rounds = 1, 0, max(count - 1, 1).bit_length()
    while fewest < count:
        middle = (fewest + count) // 2
        proto = _quantised(ready, ranges, worst_first[middle:])
        found = error(proto)
        if found <= tolerance:
            best, lost, count = _finished(proto, model), found, middle
        else:
            fewest = middle + 1
        tried += 1
        if progress is not None:
            progress("int8 mix", tried, rounds)
    left = {name: alone[name] for name in worst_first[:count]}
    return Quantised(best, len(layers) - count, left, lost, _without_kernel(ready))


def already_quantised(proto: onnx.ModelProto) -> bool:
    """Whether a model is quantised already, which the quantiser does not take."""
    return any(node.op_type in _QUANTISING for node in proto.graph.node)


def _ready(model: Model) -> onnx.ModelProto:
    """A copy that the quantiser takes: simplified, every node named, the opset new enough."""
    if model_bytes(model) > PROTOBUF_LIMIT:
        raise ModelError("ONNX Runtime quantises models below 2 GB: leave out --int8 for this one.")
    if already_quantised(model.proto):
        raise ModelError("The model is quantised already: leave out --int8.")
    proto = simplified(in_memory(raised(model, _OPSET, "Int8")))
    taken = {node.name for node in proto.graph.node}
    for index, node in enumerate(proto.graph.node):
        if not node.name:
            node.name = next(
                name for name in (node.output[0], f"{node.output[0]}_{index}") if name not in taken
            )
            taken.add(node.name)
    _make_dense(proto)
    _part_biases(proto)
    return typed(proto)


def _make_dense(proto: onnx.ModelProto) -> None:
    """Write sparse initializers in full: the quantiser sees no others."""
    for sparse in proto.graph.sparse_initializer:
        whole = numpy_helper.from_array(dense_values(sparse, None), sparse.values.name)
        proto.graph.initializer.append(whole)
    del proto.graph.sparse_initializer[:]


def _part_biases(proto: onnx.ModelProto) -> None:
    """Make every constant C of a Gemm a vector with beta within, or add it behind.

    The quantiser fails with others.
    """
    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    for index, node in reversed([*enumerate(proto.graph.node)]):
        if node.op_type != "Gemm" or len(node.input) < 3 or not {*node.input[1:3]} <= values.keys():
            continue
        outputs = values[node.input[1]].dims[0 if attribute(node, "transB") else 1]
        c = numpy_helper.to_array(values[node.input[2]])
        beta = next((a for a in node.attribute if a.name == "beta"), None)
        if c.shape == (outputs,) and (beta is None or beta.f == 1):
            continue
        if beta is not None:
            c = c * c.dtype.type(beta.f)
            node.attribute.remove(beta)
        name = f"{node.name} bias for int8"
        if c.size in (1, outputs) and c.shape[:-1] in ((), (1,)):
            c = np.ascontiguousarray(np.broadcast_to(c.reshape(-1), (outputs,)))
            node.input[2] = name
        else:
            del node.input[2]
            given, product = node.output[0], f"{node.name} product for int8"
            node.output[0] = product
            proto.graph.node.insert(index + 1, helper.make_node("Add", [product, name], [given], name))
        proto.graph.initializer.append(numpy_helper.from_array(c, name))


def _without_kernel(proto: onnx.ModelProto) -> Counter[str]:
    """How many nodes there are for which ONNX Runtime has no int8 kernel, by what is to be said of them."""
    operators = (OPERATORS.get((domain_of(node.domain), node.op_type)) for node in proto.graph.node)
    return Counter(operator.NOT_INT8 for operator in operators if operator is not None and operator.NOT_INT8)


def _weighted(proto: onnx.ModelProto) -> list[str]:
    """Names of the nodes with a constant weight in float32; one that is an output must stay what it is."""
    constants = {t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    constants -= {output.name for output in proto.graph.output}
    return [n.name for n in proto.graph.node if n.op_type in _WEIGHTED and n.input[1] in constants]


def _work(proto: onnx.ModelProto, feed: Feed) -> dict[str, int]:
    """MACs by node name."""
    counted = node_macs(proto, shapes(proto, feed, compute_tensors(proto)))
    return {node.name: counted.get(node.output[0], 0) for node in proto.graph.node if node.output}


class _Reader:
    """Feeds, one after the other, as ONNX Runtime's calibrators ask for them."""

    def __init__(self, samples: Samples, size: int) -> None:
        self._feeds = samples.batches(size)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def _groups_of(samples: Samples) -> int:
    """Groups of samples that ranges are averaged over."""
    return -(-samples.count // _group_size(samples))


def _group_size(samples: Samples) -> int:
    return min(batch_to_run(samples), max(samples.count // _GROUPS, 1))


def _ranges(proto: onnx.ModelProto, samples: Samples, averaged: bool) -> Any:
    """Least and greatest value of every tensor, as the quantiser wants them.

    Those of all samples, or ``averaged`` over groups of them, so that one odd sample does not set the scale
    for all others.
    """
    size = _group_size(samples) if averaged else batch_to_run(samples)
    with quantization() as ort, tempfile.TemporaryDirectory() as folder:
        source, augmented = (str(Path(folder) / name) for name in ("model.onnx", "augmented.onnx"))
        onnx.save(proto, source)
        try:
            calibrator = ort.create_calibrator(
                source,
                list(_QUANTISED),
                augmented_model_path=augmented,
                calibrate_method=ort.CalibrationMethod.MinMax,
                extra_options={"moving_average": averaged},
            )
            calibrator.collect_data(_Reader(samples, size))
            return calibrator.compute_data()
        except Exception as error:  # it raises what its parts raise
            raise _refusal(error) from error


def _widened(ranges: Any, averaged: Any, groups: int) -> Any:
    """``ranges`` with ends beyond their own by as much as _GROUPS times the samples would move them.

    Extremes move alike each time that samples double, so those of all samples beside those of ``groups`` of
    them, ``averaged``, tell by how much. Where values are bounded, as behind a Sigmoid, they do not move.
    Source: Gumbel, Statistics of Extremes (1958), section 1.2.
    """
    if groups < 2:
        return ranges
    share = log(_GROUPS) / log(groups)
    for name, found in ranges.data.items():
        for end in ("lowest", "highest"):
            own, mean = (np.asarray(getattr(each, end), np.float64) for each in (found, averaged.data[name]))
            setattr(found, end, np.clip(own + share * (own - mean), -_LARGEST, _LARGEST).astype(np.float32))
    return ranges


def _quantised(proto: onnx.ModelProto, ranges: Any, layers: Collection[str]) -> onnx.ModelProto:
    """``proto`` with these of its weighted nodes in int8, and what lies between them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    products = [n.name for n in proto.graph.node if n.op_type in _WEIGHTED and n.name not in set(layers)]
    with quantization() as ort:
        try:
            quantiser = ort.QDQQuantizer(
                copy,
                True,  # per channel
                saturates(),  # weights of 7 bits, whose products do not
                ort.QuantType.QInt8,
                ort.QuantType.QUInt8,
                ranges,
                [],
                products,
                list(_QUANTISED),
                {},
            )
            quantiser.quantize_model()
            quantiser.model.clean_initializers()
            quantiser.model.topological_sort()
        except Exception as error:  # it raises what its parts raise
            raise _refusal(error) from error
        found: onnx.ModelProto = quantiser.model.model
        return found


def _refusal(error: Exception) -> LrsdError:
    said = " ".join(str(error).split())[:200]
    return ModelError(f"ONNX Runtime cannot quantise the model ({said}): leave out --int8.")


def _finished(proto: onnx.ModelProto, model: Model) -> Model:
    """The quantised model with everything the original says about itself."""
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(proto, field, getattr(model.proto, field))
    del proto.metadata_props[:]
    proto.metadata_props.extend(model.proto.metadata_props)
    proto.graph.doc_string = model.proto.graph.doc_string
    stored = {tensor.name for tensor in model.proto.graph.initializer}
    gone = stored - {tensor.name for tensor in proto.graph.initializer}  # defaults of old models, now int8
    inputs = [value for value in model.proto.graph.input if value.name not in gone]
    for ends, originals in ((proto.graph.input, inputs), (proto.graph.output, model.proto.graph.output)):
        del ends[:]
        ends.extend(originals)
    return replace(model, proto=proto)
