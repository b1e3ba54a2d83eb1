"""What a plug-in tells the core about itself, without importing any array framework."""

from dataclasses import dataclass, field

API_VERSION = (1, 0)
"""Version of the plug-in contract that this core speaks: (major, minor)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """One backend.

    Attributes:
        name: the name users type: lower case letters, digits and underscores.
        api_version: version of the contract it was written for, as "major.minor".
        factory: "module:Class" of the `Backend`; imported only when the backend is loaded.
        features: names from `gemma_hub.backend.FEATURES` that it supports.
        tasks: names from `gemma_hub.config.ARCHITECTURES` that it builds models for.
        dtypes: compute types that it supports, the preferred one first.
        requires: distributions it needs, as PEP 508 strings; checked from metadata alone.
        summary: one line for `gemma-hub backends`.
        options: names that `BuildOptions.extra` may have, each with one line on what it does, for
            `gemma-hub backends`; see `gemma_hub.options.told_switches`.
    """

    name: str
    api_version: str
    factory: str
    features: frozenset[str] = frozenset()
    tasks: tuple[str, ...] = ("causal_lm",)
    dtypes: tuple[str, ...] = ("float32",)
    requires: tuple[str, ...] = ()
    summary: str = ""
    options: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSpec:
    """One installed checkpoint that users load by name.

    Attributes:
        name: the name users type ("tiny-intents"): lower case letters, digits, "_", "-" and ".".
        path: the folder, in the Hugging Face layout.
        summary: one line for `gemma-hub doctor`.
    """

    name: str
    path: str
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatSpec:
    """One checkpoint format.

    Attributes:
        name: the name users type ("gguf"): lower case letters, digits and underscores.
        api_version: version of the contract it was written for, as "major.minor".
        factory: "module:Class" of the `gemma_hub.checkpoints.formats.interface.CheckpointFormat`;
            imported only when the format is used.
        requires: distributions that it needs to read or write, as PEP 508 strings; shown to users.
            Without them the format is there still: it recognises paths, and what cannot be done
            says what to install.
        summary: one line for `gemma-hub doctor`.
    """

    name: str
    api_version: str
    factory: str
    requires: tuple[str, ...] = ()
    summary: str = ""
