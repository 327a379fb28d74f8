"""What a work dir holds, and how it is emptied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from onnx_lrsd.errors import OptionError
from onnx_lrsd.wording import bytes_of, counted
from onnx_lrsd.work_dir import Entry, open_work_dir


def listed(folder: Path) -> str:
    """What the work dir ``folder`` holds, by model and kind. Raises LrsdError for another folder."""
    work_dir = open_work_dir(folder, make=False)
    entries = work_dir.entries()
    if not entries:
        return f"{folder} is empty."
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.model, entry.kind), []).append(entry)
    rows = [("model", "kind", "entries", "bytes", "last used")]
    for (model, kind), members in sorted(groups.items()):
        used = datetime.fromtimestamp(members[-1].used, UTC).strftime("%Y-%m-%d %H:%M")
        rows.append((model, kind, str(len(members)), f"{sum(one.bytes for one in members):,}", used))
    return "\n".join([*_aligned(rows), f"{_total(entries)} in {folder}."])


def clear(folder: Path, keep: str | int = 0) -> str:
    """Remove what was used least recently until ``keep`` bytes are left; says what is gone and what is left.

    Files that are no entries stay. Raises OptionError for what is no size, LrsdError for a folder that is no
    work dir.
    """
    most = bytes_of(keep)
    if most is None:
        raise OptionError("{keep} is no size: write 4GB or 512MB.", keep=keep)
    work_dir = open_work_dir(folder, make=False)
    before = Counter(entry.path for entry in work_dir.entries())
    removed = work_dir.shrink(most)
    left = work_dir.entries()
    gone = counted(len(before) - len(left), "entry", "entries")
    return f"{gone} of {removed:,} bytes removed, {_total(left)} left in {folder}."


def _total(entries: Sequence[Entry]) -> str:
    return f"{counted(len(entries), 'entry', 'entries')} of {sum(one.bytes for one in entries):,} bytes"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = (2, 3)
    return [
        "  ".join(
            cell.rjust(width) if at in numbers else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
