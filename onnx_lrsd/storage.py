"""How a number of a weight is stored: as a code of few bits, packed into bytes, or as fp16.

A code k of L levels and a step s stand for the value (k - (L - 1) / 2) s. ``digits`` codes make one word in
base L, of ``planes`` bytes. Words are below 2^24, so a runtime can take them apart in float32 without error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Storage:
    """One way to store numbers; ``levels`` is 0 for fp16, which has no codes.

    ``noise`` is the mean squared error of coding a unit normal with the best step (Max, IRE Trans. IT-6,
    1960, table II: uniform).
    """

    name: str
    levels: int
    digits: int
    planes: int
    noise: float

    @property
    def bits(self) -> float:
        """Bits of one number."""
        return 8 * self.planes / self.digits

    def bytes(self, count: int) -> int:
        """Bytes of ``count`` numbers, in whole words."""
        return -(-count // self.digits) * self.planes


FP16 = Storage("fp16", 0, 1, 2, 1e-7)
UINT8 = Storage("uint8", 256, 1, 1, 1.2e-4)
INT6 = Storage("int6", 64, 4, 3, 1.04e-3)
INT4 = Storage("int4", 16, 2, 1, 0.01154)
INT3 = Storage("int3", 8, 8, 3, 0.03744)
INT2 = Storage("int2", 4, 4, 1, 0.1188)
TERNARY = Storage("ternary", 3, 5, 1, 0.1902)
STORAGES = {s.name: s for s in (FP16, UINT8, INT6, INT4, INT3, INT2, TERNARY)}
"""Best first."""


def pack_codes(codes: _Bytes, storage: Storage) -> _Bytes:
    """Codes (count,) as bytes (planes, words): plane p holds bits 8 p to 8 p + 7 of every word.

    Word j holds the codes j, j + words, j + 2 words ...; what is missing at the end is zero.
    """
    words = -(-codes.size // storage.digits)
    padded = np.zeros(words * storage.digits, dtype=np.int64)
    padded[: codes.size] = codes
    powers = storage.levels ** np.arange(storage.digits)
    word = powers @ padded.reshape(storage.digits, words)
    planes = word[None, :] >> (8 * np.arange(storage.planes)[:, None])
    packed: _Bytes = (planes & 255).astype(np.uint8)
    return packed


NEAR_REACH, FAR_REACH = 16, 256
"""Greatest distance of two entries of S whose distances are stored in half a byte, and in a byte."""


def gaps(reach: int) -> Storage:
    """The storage of distances of 1 to ``reach``, which are stored less one."""
    return INT4 if reach == NEAR_REACH else UINT8


def entry_bytes(count: int, size: int, storage: Storage) -> int:
    """Bytes of ``count`` entries at random among ``size`` places, with their distances."""
    return min(with_bridges(count, size, storage, reach) for reach in (NEAR_REACH, FAR_REACH))


def with_bridges(count: int, size: int, storage: Storage, reach: int) -> int:
    """``entry_bytes`` for one ``reach``.

    Gaps above ``reach`` need entries of value zero in between; their number is that for geometric gaps.
    """
    beyond = (1 - min(count / size, 1.0)) ** reach
    stored = min(round(count * (1 + beyond / max(1 - beyond, 1e-9))), size)
    return storage.bytes(stored) + gaps(reach).bytes(stored)
