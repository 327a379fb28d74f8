"""Run one study: `python -m benchmarks NAME ...`; without a name, or with --help, list them."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

STUDIES = {
    "models": "real models through the whole tool: MACs, latency, score; --int8, --baselines, --drop",
    "rules": "what each part and each rule of plans and fits is worth",
    "solvers": "the solver beside published ones, layer by layer",
    "paper": "the comparison of the paper that the tool follows, and spectra of trained layers",
    "peers": "targets size and onnxruntime beside other tools at the same bytes or time",
    "next_tools": "quantisers, float16, onnxslim, onnxsim and others, before and after the tool",
    "corpus": "any model at all: a model that holds what was promised, or one sentence; --engines",
    "gpu": "the solver on a GPU beside the CPU",
    "honesty": "whether what is said holds on samples never seen: errors, --max-drop, scatter, detections",
    "mutate": "mutated model files: a valid model or one sentence each",
    "resources": "time and memory: of each stage of a run; over layer size, layers, samples and processes",
    "large_model": "writes a model of some gigabytes, for results/scale.md",
    "replay": "plans replayed by two checkouts give the same bytes",
}
"""Name -> what it shows. Each is a module of this package with OPTIONS, add_arguments and run."""
ONE_THREAD = ("solvers", "paper")
"""Studies that compare seconds of single solvers."""


def parser_of(study: str) -> argparse.ArgumentParser:
    """The command line of a study."""
    module = importlib.import_module(f"benchmarks.{study}")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {study}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=module.OPTIONS,
    )
    module.add_arguments(parser)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the study that the first argument names."""
    if not arguments or arguments[0] not in STUDIES:
        width = max(map(len, STUDIES))
        print("usage: python -m benchmarks NAME ...    (NAME --help has its options)\n")
        print("\n".join(f"  {name:{width}}  {shows}" for name, shows in STUDIES.items()))
        sys.exit(0 if arguments in ([], ["--help"], ["-h"]) else 2)
    study, *rest = arguments
    if study in ONE_THREAD:  # before NumPy is loaded
        names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
        os.environ.update(dict.fromkeys(names, "1"))
    given = parser_of(study).parse_args(rest)
    importlib.import_module(f"benchmarks.{study}").run(given)


if __name__ == "__main__":
    main(sys.argv[1:])
