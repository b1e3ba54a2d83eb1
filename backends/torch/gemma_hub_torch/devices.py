"""Names of devices. Twin: gemma_hub_flax/devices.py."""

import torch

from gemma_hub.errors import InputError
from gemma_hub.memory import free_host_memory


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


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be taken there; None where that is not known."""
    if device.type != "cuda":
        return free_host_memory()
    free, _ = torch.cuda.mem_get_info(device)
    # What PyTorch keeps for itself and does not use can be taken too.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
