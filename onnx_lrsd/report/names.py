"""Names of layers as tables have room for them: cut in the middle, and still one name for one layer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import count

GAP = "..."
LEAST_WIDTH = 12
"""Characters that a shortened name may always take."""


def shortened(names: Iterable[str], width: int) -> dict[str, str]:
    """Each of ``names`` in at most ``width`` characters, but no fewer than LEAST_WIDTH; no two alike.

    Names that fit stay as they are. The others are all cut in one way: of the cuts that tell most of them
    apart the one nearest the middle. Names that it does not tell apart show where they differ between two
    gaps, or end in a number where that is too little. The order of ``names`` does not matter.

    >>> list(shortened(["/model.22/cv2.0/conv/Conv", "/model.22/cv2.1/conv/Conv"], 20).values())
    ['/model...0/conv/Conv', '/model...1/conv/Conv']
    """
    width = max(width, LEAST_WIDTH)
    unique = sorted({*names})
    found = {name: name for name in unique if len(name) <= width}
    alike = defaultdict[str, list[str]](list)
    for name, cut in _cut_alike([name for name in unique if name not in found], width, found).items():
        alike[cut].append(name)
    for cut, group in alike.items():
        if len(group) == 1 and cut not in found:
            found[group[0]] = cut
    taken = {*found.values()}
    for group in alike.values():
        for name in group:
            if name in found:
                continue
            text = _around(name, len(_common_head(group)), width)
            found[name] = text if text not in taken else _numbered(name, width, taken)
            taken.add(found[name])
    return found


def common_pattern(names: Sequence[str]) -> str:
    """What ``names`` have in common at both ends, with * for what differs between.

    >>> common_pattern(["block1/conv", "block2/conv", "block12/conv"])
    'block*/conv'
    """
    head = _common_head(names)
    tail = _common_head([name[len(head) :][::-1] for name in names])[::-1]
    same = all(len(name) == len(head) + len(tail) for name in names)
    return head + tail if same else f"{head}*{tail}"


def _common_head(names: Sequence[str]) -> str:
    """The longest string that all ``names`` begin with: what the first and the last in order share."""
    low, high = min(names), max(names)
    differing = (place for place, (one, other) in enumerate(zip(low, high, strict=False)) if one != other)
    return low[: next(differing, len(low))]


def _cut_alike(names: Sequence[str], width: int, taken: Iterable[str]) -> dict[str, str]:
    """``names``, which are longer than ``width``, cut with one length of head and tail for all."""
    room = width - len(GAP)
    kept = {*taken}
    best: dict[str, str] = {}
    most = -1
    for head in sorted(range(room + 1), key=lambda head: abs(2 * head - room)):
        cuts = {name: name[:head] + GAP + name[len(name) - (room - head) :] for name in names}
        times = Counter(cuts.values())
        apart = sum(times[cut] == 1 and cut not in kept for cut in cuts.values())
        if apart > most:
            best, most = cuts, apart
        if apart == len(names):
            break
    return best


def _around(name: str, place: int, width: int) -> str:
    """``name`` cut to its ends and what stands around the column ``place``."""
    room = width - 2 * len(GAP)
    window, head = room // 2, room // 4
    tail = room - window - head
    start = min(max(place - window // 2, head), len(name) - tail - window)
    return f"{name[:head]}{GAP}{name[start : start + window]}{GAP}{name[len(name) - tail :]}"


def _numbered(name: str, width: int, taken: set[str]) -> str:
    marks = (f"{GAP}#{number}" for number in count(1))
    texts = (name[: width - len(mark)] + mark for mark in marks)
    return next(text for text in texts if text not in taken)
