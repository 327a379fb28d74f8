"""How a number of a weight is stored: as a code of few bits, packed into bytes, or as fp16.

A code k of L levels and a step s stand for (k - (L - 1) / 2) s. ``digits`` codes make one word in base
L, and a word has ``planes`` bytes: what is below 2^24 a runtime can take apart in float32 without error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Storage:
    """``levels`` is 0 where values are kept as fp16. ``noise`` is what coding a unit normal loses.

    It is the mean squared error with the best step (Max, IRE Trans. IT-6, 1960, table II: uniform).
    """

    name: str
    levels: int
    digits: int
    planes: int
    noise: float

    @property
    def bits(self) -> float:
        """Of one number."""
        return 8 * self.planes / self.digits

    def bytes(self, count: int) -> int:
        """Of ``count`` numbers: whole words."""
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


def pack_codes(codes: Codes, storage: Storage) -> Codes:
    """Codes (count,) as bytes (planes, words): plane p holds bits 8 p to 8 p + 7 of every word.

    Word j holds the codes j, j + words, j + 2 words ...; what is missing at the end is zero.
    """
    words = -(-codes.size // storage.digits)
    padded = np.zeros(words * storage.digits, dtype=np.int64)
    padded[: codes.size] = codes
    powers = storage.levels ** np.arange(storage.digits)
    word = powers @ padded.reshape(storage.digits, words)
    planes = word[None, :] >> (8 * np.arange(storage.planes)[:, None])
    packed: Codes = (planes & 255).astype(np.uint8)
    return packed


NEAR, FAR = 16, 256
"""How far apart two entries of S may be, where distances take half a byte and a byte."""


def gaps(reach: int) -> Storage:
    """What distances of 1 to ``reach`` are stored in, less one."""
    return INT4 if reach == NEAR else UINT8


def entry_bytes(count: int, size: int, storage: Storage) -> int:
    """Bytes that ``count`` entries, strewn over ``size`` places, take with their distances."""
    return min(with_bridges(count, size, storage, reach) for reach in (NEAR, FAR))


def with_bridges(count: int, size: int, storage: Storage, reach: int) -> int:
    """The same for one ``reach``: longer gaps need more entries, of which geometric gaps tell the number."""
    beyond = (1 - min(count / size, 1.0)) ** reach
    stored = min(round(count * (1 + beyond / max(1 - beyond, 1e-9))), size)
    return storage.bytes(stored) + gaps(reach).bytes(stored)
