"""Whether a cache fits into memory, asked before it is made."""

from collections.abc import Callable
from pathlib import Path

from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CapacityError

SMALL = 64 * 2**20
"""Bytes up to which a cache is made without asking."""

_MEMINFO = Path("/proc/meminfo")


def check_cache_fits(
    config: GemmaConfig,
    batch_size: int,
    max_length: int,
    itemsize: int,
    free: Callable[[], int | None],
) -> None:
    """Refuse a cache of keys and values that needs more memory than is free.

    Call it before the memory is taken: an operating system may end the process instead of refusing.

    Args:
        config: the model's.
        batch_size: rows of the cache.
        max_length: slots of each row.
        itemsize: bytes of one number.
        free: gives the bytes that are free on the device, or None where that is unknown. Asked
            only for caches above `SMALL`.

    Raises:
        CapacityError: with what is needed, what is free and what to do.
    """
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    needed = batch_size * max_length * slot
    if needed <= SMALL:
        return
    available = free()
    if available is not None and needed > available:
        fits = available // slot
        raise CapacityError(
            f"A cache for {batch_size} rows of {max_length} tokens needs {_gigabytes(needed)}, and "
            f"{_gigabytes(available)} of memory are free, enough for {fits} tokens in all. Run "
            "fewer rows at once, or ask for fewer tokens."
        )


def free_host_memory() -> int | None:
    """Bytes that the machine can give without swapping; None where that is not known."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None  # not Linux
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
