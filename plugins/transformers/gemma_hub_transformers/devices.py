"""Names of devices."""

import torch

from gemma_hub.errors import InputError


def device_names() -> list[str]:
    """The default first: the first GPU where there is one."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [*gpus, "cpu"]


def find_device(name: str) -> str:
    """The full name of a device; "auto" is the default.

    Raises:
        InputError: there is no such device.
    """
    known = device_names()
    device = known[0] if name == "auto" else "cuda:0" if name == "cuda" else name
    if device not in known:
        raise InputError(f"device is {name!r}; this machine has {', '.join(known)}.")
    return device
