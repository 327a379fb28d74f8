"""Go on training from the factors that onnx-lrsd found, and put them back into the model that it wrote.

    onnx-lrsd optimize net.onnx --calib calib.npz --ratio 3 --forms dense,channel,channel-in,spatial,tucker \
        -o small.onnx --export-factors factors
    python examples/fine_tuning.py net.onnx small.onnx factors --calib calib.npz --eval eval.npz -o tuned.onnx

The outputs of the original are what is learned, so no labels are needed; those of --eval say what it gained.
Needs PyTorch and safetensors. Pictures are turned left to right and moved by up to 2 pixels without --plain.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file
from torch.nn import functional

STARTS = "factors", "random", "pruned"


class Network(torch.nn.Module):
    """An ONNX model as a module; ``trained`` are its weights that are learned, by name."""

    def __init__(self, model: onnx.ModelProto, trained: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.graph = model.graph
        self.names = list(trained)
        self.learned = torch.nn.ParameterList(
            [torch.nn.Parameter(values.clone()) for values in trained.values()]
        )
        self.fixed = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
            for tensor in model.graph.initializer
            if tensor.name not in trained
        }
        inputs = [value.name for value in model.graph.input if value.name not in {*self.fixed, *trained}]
        (self.source,) = inputs  # models with one input

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The first output of the model for the batch ``x``."""
        known = {**self.fixed, **dict(zip(self.names, self.learned, strict=True)), self.source: x}
        for node in self.graph.node:
            given = [known[name] for name in node.input if name]
            settings = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
            known[node.output[0]] = OPERATORS[node.op_type](settings, *given)
        return known[self.graph.output[0].name]


def convolve(settings: dict[str, Any], x: Any, weight: Any, bias: Any = None) -> torch.Tensor:
    """A Conv of two axes, whose padding may differ from side to side."""
    top, left, bottom, right = settings.get("pads", [0, 0, 0, 0])
    return functional.conv2d(
        functional.pad(x, (left, right, top, bottom)),
        weight,
        bias,
        stride=settings.get("strides", [1, 1]),
        dilation=settings.get("dilations", [1, 1]),
        groups=settings.get("group", 1),
    )


def multiply(settings: dict[str, Any], a: Any, b: Any, c: Any = 0) -> torch.Tensor:
    """A Gemm."""
    a = a.mT if settings.get("transA") else a
    b = b.mT if settings.get("transB") else b
    product = settings.get("alpha", 1.0) * (a @ b) + settings.get("beta", 1.0) * c
    return torch.as_tensor(product)


def enlarge(settings: dict[str, Any], x: Any, scales: Any) -> torch.Tensor:
    """A linear Resize of two axes by ``scales`` of all four."""
    factors = [float(scale) for scale in scales[2:]]
    return functional.interpolate(x, scale_factor=factors, mode="bilinear", align_corners=False)


OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    "Add": lambda settings, a, b: a + b,
    "Constant": lambda settings: torch.from_numpy(numpy_helper.to_array(settings["value"]).copy()),
    "Conv": convolve,
    "Flatten": lambda settings, x: x.flatten(settings.get("axis", 1)),
    "Gather": lambda settings, x, index: x.index_select(settings.get("axis", 0), index.flatten()),
    "Gemm": multiply,
    "GlobalAveragePool": lambda settings, x: x.mean((2, 3), keepdim=True),
    "MatMul": lambda settings, a, b: a @ b,
    "MaxPool": lambda settings, x: functional.max_pool2d(
        x, settings["kernel_shape"], settings.get("strides")
    ),
    "Mul": lambda settings, a, b: a * b,
    "Relu": lambda settings, x: torch.relu(x),
    "Resize": enlarge,
    "Reshape": lambda settings, x, shape: x.reshape([len(x), *map(int, shape[1:])]),  # of a batch
}
"""What this example knows of ONNX; add an operator here where a network has more."""


def batches(x: torch.Tensor, size: int, steps: int, *, moved: bool) -> Iterator[torch.Tensor]:
    """``steps`` batches of ``size`` drawn at random; pictures are turned and ``moved``."""
    for _ in range(steps):
        batch = x[torch.randint(len(x), (size,))]
        if moved:
            turned = torch.rand(size) < 0.5
            batch[turned] = batch[turned].flip(-1)
            shifts = torch.randint(-2, 3, (2,)).tolist()
            batch = functional.pad(batch, (2, 2, 2, 2)).roll(shifts, (2, 3))[:, :, 2:-2, 2:-2]
        yield batch


def tune(
    network: Network,
    original: Network,
    x: torch.Tensor,
    *,
    steps: int,
    size: int,
    rate: float,
    moved: bool = True,
    kept: list[torch.Tensor] | None = None,
) -> list[float]:
    """Teach ``network`` the outputs of ``original``; the relative squared errors of the batches.

    ``kept`` are masks of the learned weights: what they hide stays zero.
    """
    optimiser = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    errors = []
    for batch in batches(x, size, steps, moved=moved):
        with torch.no_grad():
            wanted = original(batch)
        loss = (network(batch) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if kept is not None:
            with torch.no_grad():
                for weight, mask in zip(network.learned, kept, strict=True):
                    weight.mul_(mask)
        errors.append(loss.item())
    return errors


def score(network: Network, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Per cent of ``labels`` that the largest output names."""
    with torch.no_grad():
        found = torch.cat([network(part).argmax(1) for part in x.split(128)])
    return 100 * (found == labels).float().mean().item()


def drawn(shape: torch.Size) -> torch.Tensor:
    """A weight as a network has it before it is trained. Source: He et al., ICCV 2015."""
    inputs = math.prod(shape[1:])
    return torch.randn(shape) * math.sqrt(2 / inputs) if len(shape) > 1 else torch.zeros(shape)


def pruned(model: onnx.ModelProto, left: int) -> tuple[Network, list[torch.Tensor]]:
    """The original with the ``left`` largest of the numbers in its weights, and masks of what is left."""
    weights = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in model.graph.initializer
        if len(tensor.dims) > 1
    }
    sizes = torch.cat([values.abs().flatten() for values in weights.values()])
    least = sizes.sort(descending=True).values[min(left, len(sizes)) - 1]
    masks = [(values.abs() >= least).float() for values in weights.values()]
    kept = {name: values * mask for (name, values), mask in zip(weights.items(), masks, strict=True)}
    return Network(model, kept), masks


def main() -> None:
    """Tune, say what it gained, and write the model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("original", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("factors", type=Path, help="what --export-factors wrote")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--start", choices=STARTS, default="factors", help="what to compare with")
    parser.add_argument("--plain", action="store_true", help="leave pictures as they are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    torch.manual_seed(given.seed)

    model, small = onnx.load(given.original), onnx.load(given.small)
    index = json.loads((given.factors / "index.json").read_text(encoding="utf-8"))
    found = load_file(given.factors / index["tensors"])
    learned = {name: values for name, values in found.items() if values.is_floating_point()}
    masks = None
    if given.start == "pruned":
        weights = [t for t in small.graph.initializer if len(t.dims) > 1]
        network, masks = pruned(model, sum(math.prod(t.dims) for t in weights))
    else:
        if given.start == "random":
            learned = {name: drawn(values.shape) for name, values in learned.items()}
        network = Network(small, learned)
    original = Network(model, {})

    (calibration,) = np.load(given.calib).values()
    with np.load(given.eval) as archive:
        labels = torch.from_numpy(archive["labels"])
        x = torch.from_numpy(next(archive[name] for name in archive if name != "labels"))
    start = time.perf_counter()
    print(f"original {score(original, x, labels):.2f} %")
    print(f"start ({given.start}) {score(network, x, labels):.2f} %")
    errors = tune(
        network,
        original,
        torch.from_numpy(calibration),
        steps=given.steps,
        size=given.batch,
        rate=given.rate,
        moved=not given.plain and calibration.ndim == 4,
        kept=masks,
    )
    print(f"error {np.mean(errors[:10]):.3g} in the first batches, {np.mean(errors[-10:]):.3g} at the end")
    print(f"after {given.steps} steps {score(network, x, labels):.2f} %, {time.perf_counter() - start:.0f} s")
    if given.output is not None and given.start == "factors":
        put_back(network, small)
        onnx.save(small, given.output)


def put_back(network: Network, model: onnx.ModelProto) -> None:
    """What ``network`` has learned, in the place of the initializers of ``model``."""
    learned = dict(zip(network.names, network.learned, strict=True))
    for tensor in model.graph.initializer:
        if tensor.name in learned:
            values = learned[tensor.name].detach().numpy()
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


if __name__ == "__main__":
    main()
