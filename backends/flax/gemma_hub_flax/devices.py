"""Names of devices. Twin: gemma_hub_torch/devices.py."""

import jax

from gemma_hub.errors import InputError
from gemma_hub.memory import free_host_memory


def device_names() -> list[str]:
    """The default first: JAX's own default platform."""
    default = jax.default_backend()
    platforms = [default] if default == "cpu" else [default, "cpu"]
    return [name_of(device) for name in platforms for device in jax.local_devices(backend=name)]


def find_device(name: str) -> jax.Device:
    """The device that `device_names` calls `name`; "auto" is the default.

    Raises:
        InputError: there is no such device.
    """
    known = device_names()
    full = known[0] if name == "auto" else name if ":" in name else f"{name}:0"
    if full not in known:
        raise InputError(f"device is {name!r}; this machine has {', '.join(known)}.")
    platform, _, index = full.partition(":")
    return next(d for d in jax.local_devices(backend=platform) if d.id == int(index))


def device_of(array: jax.Array) -> jax.Device:
    """Where an array is."""
    return next(iter(array.devices()))


def name_of(device: jax.Device) -> str:
    """Such as "cpu:0"."""
    return f"{device.platform}:{device.id}"


def free_memory(device: jax.Device) -> int | None:
    """Bytes that can be taken there; None where that is not known."""
    if device.platform == "cpu":
        return free_host_memory()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
