"""The random bits: Threefry-2x32 with 20 rounds, a function of (seed, row, step) and nothing else.

A counter-based generator has no state, so every framework draws the same bits on its own device,
whatever the order, the batch or the padding. Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC11); the constants are those of the Random123 library.
"""

from typing import Any

import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_UINT32 = 0xFFFFFFFF


def threefry2x32(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Two random 32-bit words for each counter.

    Args:
        key: two words, integers from 0 to 2**32 - 1 or uint32 arrays.
        counter: two words, likewise; all four broadcast together.

    Returns:
        Two uint32 arrays of the broadcast shape.
    """
    k0, k1, x0, x1 = np.broadcast_arrays(*(np.asarray(word, np.uint32) for word in key + counter))
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    with np.errstate(over="ignore"):  # words wrap; NumPy warns about it for scalars only
        x0, x1 = x0 + schedule[0], x1 + schedule[1]
        for block in range(1, 6):
            for distance in _ROTATIONS[(block - 1) % 2]:
                x0 = x0 + x1
                x1 = (x1 << np.uint32(distance)) | (x1 >> np.uint32(32 - distance))
                x1 = x1 ^ x0
            x0 = x0 + schedule[block % 3]
            x1 = x1 + schedule[(block + 1) % 3] + np.uint32(block)
    return np.asarray(x0), np.asarray(x1)


def uniform(seed: int, row: Any, step: Any) -> np.ndarray:
    """One uniform number per (row, step): (top 23 bits of the first word + 0.5) / 2**23.

    The numbers are the middles of 2**23 equal intervals: never 0 or 1, and exact in float32.

    Args:
        seed: 0 to 2**64 - 1; its high and low words are the key, as in jax.random.
        row: index of the prompt in its request, an integer or an array of them.
        step: index of the new token in its row, likewise.

    Returns:
        float64 array of the broadcast shape of `row` and `step`.
    """
    first, _ = threefry2x32((seed >> 32, seed & _UINT32), (row, step))
    return ((first >> np.uint32(9)).astype(np.float64) + 0.5) * 2.0**-23
