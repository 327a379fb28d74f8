"""Files that are written whole or not at all, however the process ends.

On Linux a file is written without a name and gets one when it is complete, so that nothing is left beside it
even after ``kill -9``. Elsewhere it is written in a folder of its own, which only a kill leaves behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes that one message of protobuf may take."""
TEMPORARY_PREFIX = ".onnx-lrsd-"
"""How names begin that are only there while a file is put in place."""
_UNNAMED = getattr(os, "O_TMPFILE", 0)


@contextlib.contextmanager
def written_whole(*paths: Path) -> Iterator[tuple[BinaryIO, ...]]:
    """Open files, which lie under ``paths``, all in one folder, once the block has ended without an error.

    They are put in place in this order, whether or not there were others of their names. Raises OSError.
    """
    with contextlib.ExitStack() as stack:
        files = [_unnamed(path.parent) for path in paths]
        if all(file is not None for file in files):
            unnamed = tuple(stack.enter_context(file) for file in files if file is not None)
            yield unnamed
            for file in unnamed:
                file.flush()
            new = [path for path in paths if not path.exists()]
            try:
                for file, path in zip(unnamed, paths, strict=True):
                    _name(file, path)
            except OSError:
                for path in new:
                    path.unlink(missing_ok=True)
                raise
            return
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=paths[0].parent, prefix=TEMPORARY_PREFIX))
        )
        named = [folder / path.name for path in paths]
        with contextlib.ExitStack() as opened:
            yield tuple(opened.enter_context(path.open("wb")) for path in named)
        for written, path in zip(named, paths, strict=True):
            os.replace(written, path)


def try_folder(folder: Path) -> None:
    """Find out whether files can be written whole in ``folder``. Raises OSError where they cannot."""
    file = _unnamed(folder)
    if file is not None:
        file.close()
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY_PREFIX):
        pass


def _unnamed(folder: Path) -> BinaryIO | None:
    """A file without a name in ``folder``; None where the system or the file system has none."""
    if not _UNNAMED or not Path("/proc/self/fd").is_dir():
        return None
    try:
        return os.fdopen(os.open(folder, _UNNAMED | os.O_RDWR, 0o666), "w+b")
    except OSError:  # what else is wrong with the folder, a named file meets as well
        return None


def _name(file: BinaryIO, path: Path) -> None:
    """Put the unnamed ``file`` in place of ``path``."""
    try:
        _link(file, path)
    except FileExistsError:
        beside = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
        _link(file, beside)
        try:
            os.replace(beside, path)
        except OSError:
            beside.unlink()
            raise


def _link(file: BinaryIO, path: Path) -> None:
    """Give an unnamed file a name; the descriptor of a folder, which goes unused, has Python follow links."""
    os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=file.fileno())
