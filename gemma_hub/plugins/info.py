"""What the registry says of a plug-in, of a backend and of a checkpoint format."""

from dataclasses import dataclass
from typing import Literal

from gemma_hub.backend import Backend
from gemma_hub.plugins.spec import BackendSpec

PluginState = Literal["ready", "quarantined", "disabled"]
BackendState = Literal["ready", "unavailable", "incompatible", "quarantined", "conflict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """One entry point.

    Attributes:
        distribution: name of the distribution it comes from.
        version: the distribution's version.
        entry_point: its name.
        module: what it names, as "module" or "module:object".
        state: "ready"; "quarantined" (it failed a check); "disabled" (by GEMMA_HUB_PLUGINS).
        problem: what is wrong; empty if nothing.
        remedy: what to do about it.
    """

    distribution: str
    version: str
    entry_point: str
    module: str
    state: PluginState
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendInfo:
    """One backend of one distribution.

    Attributes:
        spec: what the plug-in says of it; None if the plug-in failed before it could.
        name: the name users type; where `spec` is None, the entry point's name.
        distribution: name of the distribution it comes from.
        version: the distribution's version.
        state: "ready"; "unavailable" (something it requires is missing); "incompatible" (another
            version of the plug-in contract); "quarantined" (the plug-in or the factory failed);
            "conflict" (two distributions claim the name).
        problem: what is wrong; empty if ready.
        remedy: what to do about it; empty if ready.
    """

    spec: BackendSpec | None
    name: str
    distribution: str
    version: str
    state: BackendState
    problem: str
    remedy: str

    @property
    def qualified_name(self) -> str:
        """`distribution:name`, which always means this one."""
        return f"{self.distribution}:{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBackend:
    """A backend that is ready to build models. The other fields are as in `BackendInfo`.

    Attributes:
        backend: what the spec's factory made.
    """

    name: str
    spec: BackendSpec
    distribution: str
    version: str
    backend: Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatInfo:
    """One checkpoint format.

    Attributes:
        name: what users type: the format's name, or "distribution:name" where another has it.
        distribution: name of the distribution it comes from; "gemma-hub" for a built-in one.
        version: the distribution's version.
        summary: one line on what it is.
        missing: what its reader needs and is not installed, and how to install it; empty if
            nothing. The format recognises paths all the same.
        problem: why it cannot be used at all; empty if nothing is known to be wrong.
    """

    name: str
    distribution: str
    version: str
    summary: str
    missing: str
    problem: str = ""
