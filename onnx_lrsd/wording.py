"""Words that every message writes alike, and sizes as users write them."""

from __future__ import annotations

import re

SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def counted(count: int, one: str, many: str = "") -> str:
    """``count`` with its noun, and what agrees with it; ``many`` is the noun with an s unless it is given.

    >>> counted(1, "sample"), counted(1200, "sample")
    ('1 sample', '1,200 samples')
    >>> counted(1, "node left as it is", "nodes left as they are")
    '1 node left as it is'
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def percent(share: float) -> str:
    """``share`` in per cent, of two digits.

    >>> percent(0.00921), percent(2.13), percent(1e9)
    ('0.92 %', '210 %', '1e+11 %')
    """
    return f"{float(f'{100 * share:.2g}'):g} %"


def bytes_in_words(size: int) -> str:
    """``size`` as ``bytes_of`` reads it, rounded up to three digits.

    >>> bytes_in_words(268_435_456), bytes_in_words(3_999_000_000)
    ('269MB', '4GB')
    """
    unit = "GB" if size > 999 * SIZE_UNITS["MB"] else "MB"
    step = SIZE_UNITS[unit] // 100 if unit == "GB" else SIZE_UNITS[unit]
    return f"{-(-size // step) * step / SIZE_UNITS[unit]:g}{unit}"


def bytes_of(text: str | int) -> int | None:
    """How many bytes ``text`` names: 4GB, 512MiB, or a number; None for what is no size.

    >>> bytes_of("4GB"), bytes_of("1.5 MiB"), bytes_of(300), bytes_of("much")
    (4000000000, 1572864, 300, None)
    """
    found = _SIZE.fullmatch(str(text))
    if isinstance(text, bool) or found is None or found[2].upper() not in SIZE_UNITS:
        return None
    return round(float(found[1]) * SIZE_UNITS[found[2].upper()])
