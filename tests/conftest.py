"""What every test stands on."""

from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: a busy machine is no failure. .ci/run asks for the thorough profile.
settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=100)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def no_table_of_this_machine(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty folder for caches: plans come from the built-in table, whatever the user has measured."""
    folder = tmp_path_factory.mktemp("caches")
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(folder))
    return folder
