"""Words that every message writes alike."""

from __future__ import annotations


def counted(count: int, one: str, many: str = "") -> str:
    """``count`` with its noun, and what agrees with it; ``many`` is the noun with an s unless it is given.

    >>> counted(1, "sample"), counted(1200, "sample")
    ('1 sample', '1,200 samples')
    >>> counted(1, "node left as it is", "nodes left as they are")
    '1 node left as it is'
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"
