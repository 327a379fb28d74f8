"""Parts of tables for a terminal of 100 columns: columns, emphasis, and numbers as people read them.

Ratios are rounded down and errors up, so rounding never makes a result look better.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, TypeVar

from onnx_lrsd.report.names import LEAST_WIDTH, shortened
from onnx_lrsd.types import Declined
from onnx_lrsd.wording import counted

TABLE_WIDTH = 100
NAMES_SHOWN = 3
"""Names shown of the layers that share a reason."""
NAME_WIDTH = 40
"""Columns of a name in running text."""
MANY = 4
"""Layers of one shape that share a row unless all are asked for."""
REASONS_SHOWN = 4
"""Kinds of reasons why channels stay that are listed unless all are asked for."""
ROWS_SHOWN = 60
"""Rows of layers shown unless all are asked for."""
Row: TypeAlias = Sequence[str]
_Item = TypeVar("_Item")


class Ink:
    """ANSI emphasis, or none."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def _wrap(self, code: int, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour and text else text

    def strong(self, text: str) -> str:
        """Bold."""
        return self._wrap(1, text)

    def faint(self, text: str) -> str:
        """Grey."""
        return self._wrap(2, text)

    def verdict(self, text: str, good: bool) -> str:
        """Green where it is good, else red."""
        return self._wrap(32 if good else 31, text)


def grid_of(header: Row, rows: Sequence[Row], align: str, ink: Ink) -> str:
    """Columns as wide as their cells, the first cut to the space left; ``align`` has l or r for each."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    widths[0] = min(widths[0], max(TABLE_WIDTH - sum(widths[1:]) - 2 * len(widths[1:]), LEAST_WIDTH))
    first = shortened((row[0] for row in (header, *rows)), widths[0])

    def line(row: Row) -> str:
        cells = (
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip((first[row[0]], *row[1:]), widths, align, strict=True)
        )
        return "  ".join(cells).rstrip()

    return "\n".join([ink.faint(line(header)), *map(line, rows)])


def more_rows(count: int, columns: int) -> list[Row]:
    """A row that says how many are not shown; none where all are."""
    return [(f"and {count} more (-v lists them)", *[""] * (columns - 1))] if count > 0 else []


def paragraph(text: str) -> str:
    """Running text in lines as wide as tables."""
    return textwrap.fill(
        text, TABLE_WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def names_by_reason(groups: dict[str, list[str]], every: bool) -> Iterable[str]:
    """A line for each reason, the most frequent one first, with the names of its layers."""
    short = shortened((name for names in groups.values() for name in names), NAME_WIDTH)
    for reason, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        listed = names if every else names[:NAMES_SHOWN]
        more = f" and {len(names) - len(listed)} more" if len(names) > len(listed) else ""
        text = f"{reason}: {', '.join(short[name] for name in listed)}{more}"
        yield textwrap.fill(
            text,
            TABLE_WIDTH,
            initial_indent=f"{len(names):5} x ",
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
        )


def kept_channels(whole: Sequence[Declined], every: bool) -> str:
    """Why all channels stay that layers give: how often for which kind of reason, or each if ``every``."""
    title = f"All channels stay that {counted(len(whole), 'layer gives', 'layers give')}:"
    if every:
        groups = defaultdict(list)
        for entry in whole:
            groups[entry.reason].append(entry.name)
        return "\n".join([title, *names_by_reason(groups, every)])
    kinds = Counter(entry.kind for entry in whole).most_common()
    said = [f"{count} x {kind}" for kind, count in kinds[:REASONS_SHOWN]]
    rest = sum(count for _, count in kinds[REASONS_SHOWN:])
    said += [f"{rest} for other reasons"] if rest else []
    return paragraph(f"{title} {'; '.join(said)} (-v names them)")


def grouped_alike(entries: Sequence[_Item], key: Callable[[_Item], object], every: bool) -> list[list[_Item]]:
    """``entries`` in groups of equal ``key`` where that are MANY, in the order of their first; else alone."""
    alike = defaultdict[object, list[_Item]](list)
    for entry in entries:
        alike[key(entry)].append(entry)
    groups = []
    for entry in entries:
        members = alike[key(entry)]
        if every or len(members) < MANY:
            groups.append([entry])
        elif entry is members[0]:
            groups.append(members)
    return groups


def sums_note(groups: Sequence[Sequence[object]]) -> list[str]:
    """What rows of several layers mean, if there are any."""
    several = any(len(group) > 1 for group in groups)
    return ["Layers of one shape stand in one row, with their sums; -v lists each."] if several else []


def range_text(sorted_texts: Sequence[str]) -> str:
    """The first and the last, or one where they read the same; a unit is written once."""
    first, last = sorted_texts[0], sorted_texts[-1]
    if first == last:
        return first
    unit = last.rpartition(" ")[2]
    return f"{first.removesuffix(f' {unit}')} to {last}"


def shape_text(shape: Sequence[int]) -> str:
    """A shape, as 64x3x7x7."""
    return "x".join(map(str, shape))


def bytes_text(count: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def count_text(count: int) -> str:
    """A large number in thousands, millions or more."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def time_text(milliseconds: float) -> str:
    """Milliseconds."""
    return f"{milliseconds:.3f} ms" if milliseconds < 10 else f"{milliseconds:,.1f} ms"


def ratio_text(before: int, after: int) -> str:
    """How many times smaller ``after`` is, rounded down."""
    return f"{rounded_down(before / after):.2f} x" if after else ""


def share_text(part: int, whole: int) -> str:
    """A share in per cent."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def rounded_down(ratio: float) -> float:
    """A ratio to hundredths, never better than it is."""
    # A ratio such as 2.3 is a hair less than 2.3 in binary and would lose a hundredth.
    return math.floor(ratio * 100 + 1e-9) / 100 if math.isfinite(ratio) else ratio


def error_text(error: float) -> str:
    """An error in per cent, rounded up to two significant digits."""
    if not math.isfinite(error):
        return "not finite"
    if error <= 0:
        return "0 %"
    percent = 100 * error
    if percent > 1e6:
        return f"{percent:.1e} %"
    digits = max(1 - math.floor(math.log10(percent)), 0)
    if digits > 6:
        return "< 0.00001 %"
    up = math.ceil(percent * 10**digits - 1e-9) / 10**digits
    return f"{up:.{digits}f} %"
