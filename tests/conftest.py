"""What every test stands on."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from onnx_lrsd.runtime.timing import pair_latency

# No deadline: a busy machine is no failure. .ci/run asks for the thorough profile.
settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=100)
settings.load_profile("quick")


def pytest_configure() -> None:
    """Give each of the workers, which share the cores, one thread of BLAS: more would wait for each other."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def brief_timings() -> Iterator[None]:
    """Whatever is timed is timed for a moment: what these tests promise holds at any speed."""

    def for_a_moment(*runs: Any, **options: Any) -> Any:
        return pair_latency(*runs, **{**options, "seconds": 0.02})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnx_lrsd.measure.compare.pair_latency", for_a_moment)
        patch.setattr("onnx_lrsd.measure.layer_times.SECONDS", 0.02)
        patch.setattr("onnx_lrsd.measure.layer_times.SESSIONS", 1)
        yield


@pytest.fixture(autouse=True)
def no_table_of_this_machine(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty folder for caches: plans come from the built-in table, whatever the user has measured."""
    folder = tmp_path_factory.mktemp("caches")
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(folder))
    return folder
