"""Is what a plug-in's hooks returned what they should return?"""

import re
from collections.abc import Collection, Iterable, Sequence
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

from gemma_hub.backend import FEATURES
from gemma_hub.config import ARCHITECTURES
from gemma_hub.errors import nearest
from gemma_hub.parameters import DTYPES
from gemma_hub.plugins.problems import PluginFailure
from gemma_hub.plugins.spec import API_VERSION, BackendSpec, CheckpointSpec, FormatSpec

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_CHECKPOINT_NAME = re.compile(r"[a-z][a-z0-9_.-]*")  # as models are named: "tiny-intents"
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})")
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def checked_backends(returned: Sequence[object]) -> tuple[BackendSpec, ...]:
    """The specs that `gemma_hub_backends` returned, all of them sound.

    Args:
        returned: one return value for each implementation in the plug-in.

    Raises:
        PluginFailure: the first thing that is wrong with them.
    """
    specs: list[BackendSpec] = []
    for spec in _flatten("gemma_hub_backends", BackendSpec, returned):
        assert isinstance(spec, BackendSpec)  # _flatten saw to it; this tells mypy
        _check_backend(spec)
        specs.append(spec)
    _check_unique("gemma_hub_backends", [spec.name for spec in specs])
    return tuple(specs)


def checked_checkpoints(returned: Sequence[object]) -> tuple[CheckpointSpec, ...]:
    """The specs that `gemma_hub_checkpoints` returned, all of them sound.

    Whether the folder is there is the loader's question: one that is missing costs its own
    checkpoint alone.

    Raises:
        PluginFailure: the first thing that is wrong with them.
    """
    specs: list[CheckpointSpec] = []
    for spec in _flatten("gemma_hub_checkpoints", CheckpointSpec, returned):
        assert isinstance(spec, CheckpointSpec)
        what = f"checkpoint {spec.name!r}"
        _check_checkpoint_name(what, spec.name)
        _check_text(what, "path", spec.path)
        _check_text(what, "summary", spec.summary, may_be_empty=True)
        specs.append(spec)
    _check_unique("gemma_hub_checkpoints", [spec.name for spec in specs])
    return tuple(specs)


def checked_formats(returned: Sequence[object]) -> tuple[FormatSpec, ...]:
    """The specs that `gemma_hub_checkpoint_formats` returned, all of them sound.

    Raises:
        PluginFailure: the first thing that is wrong with them.
    """
    specs: list[FormatSpec] = []
    for spec in _flatten("gemma_hub_checkpoint_formats", FormatSpec, returned):
        assert isinstance(spec, FormatSpec)
        what = f"checkpoint format {spec.name!r}"
        _check_made_later(what, spec)
        if speaks_our_api(spec):
            _check_requirements(what, spec)
        specs.append(spec)
    _check_unique("gemma_hub_checkpoint_formats", [spec.name for spec in specs])
    return tuple(specs)


def speaks_our_api(spec: BackendSpec | FormatSpec) -> bool:
    """Whether the core offers what the spec was written for: same major, no later minor."""
    major, minor = _parsed(spec.api_version)
    return major == API_VERSION[0] and minor <= API_VERSION[1]


def api_failure(spec: BackendSpec | FormatSpec, distribution: str) -> PluginFailure:
    """What to say of a spec that does not speak our version of the contract."""
    host = f"{API_VERSION[0]}.{API_VERSION[1]}"
    cause = f"it was written for plug-in API {spec.api_version} and this gemma-hub speaks {host}"
    if _parsed(spec.api_version) > API_VERSION:
        remedy = (
            f"Upgrade with 'pip install --upgrade gemma-hub', or install an older {distribution}."
        )
    else:
        remedy = f"Upgrade it with 'pip install --upgrade {distribution}'."
    return PluginFailure("api version", cause, remedy)


def requirement_failure(spec: BackendSpec | FormatSpec) -> PluginFailure | None:
    """What is needed and this environment lacks, from metadata alone; None if nothing."""
    causes: list[str] = []
    wanted: list[str] = []
    for text in spec.requires:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = installed_version(requirement.name)
        if installed and requirement.specifier.contains(installed, prereleases=True):
            continue
        causes.append(f"it needs {text} and {installed or 'no version'} is installed")
        wanted.append(f'"{str(requirement).partition(";")[0].strip()}"')
    if not wanted:
        return None
    return PluginFailure(
        "requires", "; ".join(causes), f"Install it with: pip install {' '.join(wanted)}"
    )


def installed_version(name: str) -> str:
    """The version of an installed distribution; empty if there is none, or it does not say."""
    try:
        return metadata.version(name) or ""
    except Exception:  # noqa: BLE001  # not found, or metadata too broken to tell
        return ""


def _parsed(version: str) -> tuple[int, int]:
    match = _VERSION.fullmatch(version)
    assert match is not None  # _check_made_later saw to it
    return int(match[1]), int(match[2])


def _flatten(hook: str, kind: type, returned: Iterable[object]) -> list[object]:
    """The items of all return values, each checked to be a `kind`."""
    items: list[object] = []
    for value in returned:
        if isinstance(value, kind):
            raise _wrong(hook, f"returned a bare {kind.__name__}; expected a list of them")
        if not isinstance(value, (list, tuple)):
            raise _wrong(hook, f"returned {_short(value)}; expected a list of {kind.__name__}")
        for item in value:
            if not isinstance(item, kind):
                raise _wrong(hook, f"returned a list with {_short(item)}; expected {kind.__name__}")
            items.append(item)
    return items


def _check_backend(spec: BackendSpec) -> None:
    what = f"backend {spec.name!r}"
    _check_made_later(what, spec)
    if not speaks_our_api(spec):
        return  # a later contract may have features that are unknown here
    _check_names(what, "features", spec.features, known=FEATURES)
    _check_names(what, "tasks", spec.tasks, known=ARCHITECTURES)
    if not spec.tasks:
        raise _wrong(what, f"has no tasks; expected at least one of {', '.join(ARCHITECTURES)}")
    _check_names(what, "dtypes", spec.dtypes, known=DTYPES)
    if not spec.dtypes:
        raise _wrong(what, f"has no dtypes; expected at least one of {', '.join(DTYPES)}")
    _check_requirements(what, spec)
    _check_options(what, spec.options)


def _check_made_later(what: str, spec: BackendSpec | FormatSpec) -> None:
    """The fields that every spec with a factory has, whatever version of the contract it is of."""
    _check_name(what, spec.name)
    if not _matches(_VERSION, spec.api_version):
        raise _wrong(what, f"has api_version {spec.api_version!r}; expected 'major.minor'")
    if not _matches(_FACTORY, spec.factory):
        raise _wrong(what, f"has factory {spec.factory!r}; expected 'module:Class'")
    _check_text(what, "summary", spec.summary, may_be_empty=True)
    _check_names(what, "requires", spec.requires)


def _check_requirements(what: str, spec: BackendSpec | FormatSpec) -> None:
    for text in spec.requires:
        try:
            Requirement(text)
        except InvalidRequirement as error:
            raise _wrong(what, f"has requires {text!r}; expected a PEP 508 string") from error


def _check_options(what: str, options: object) -> None:
    if not isinstance(options, dict):
        raise _wrong(what, f"has options {_short(options)}; expected a dictionary")
    for name, text in options.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise _wrong(
                what,
                f"has the option {_short(name)} with {_short(text)}; expected a name and a line on "
                "what it does",
            )


def _check_name(what: str, name: object) -> None:
    if not _matches(_NAME, name):
        raise _wrong(
            what,
            "is no valid name; expected lower case letters, digits and underscores, a letter first",
        )


def _check_checkpoint_name(what: str, name: object) -> None:
    if not _matches(_CHECKPOINT_NAME, name):
        raise _wrong(
            what,
            "is no valid name; expected lower case letters, digits, and any of '_', '-' and '.', a "
            "letter first",
        )


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    # A dataclass does not hold its fields to their types.
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _check_text(what: str, field: str, value: object, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, str) or not (value or may_be_empty):
        raise _wrong(what, f"has {field} {_short(value)}; expected a string")


def _check_names(
    what: str, field: str, values: object, known: Collection[str] | None = None
) -> None:
    if not isinstance(values, (frozenset, set, tuple, list)):
        raise _wrong(what, f"has {field} {_short(values)}; expected a tuple or set of strings")
    for value in values:
        if not isinstance(value, str):
            raise _wrong(what, f"has {_short(value)} among its {field}; expected strings")
        if known is not None and value not in known:
            raise _wrong(
                what,
                f"has {value!r} among its {field}. {nearest(value, known)} "
                f"Known: {', '.join(sorted(known))}",
            )


def _check_unique(hook: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise _wrong(hook, f"names {name!r} twice")


def _wrong(what: str, fault: str) -> PluginFailure:
    return PluginFailure("specs", f"{what} {fault}")


def _short(value: object) -> str:
    """A value in at most 60 characters, with its type where that is not plain from it."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # a plug-in's object may fail even at this
        text = "?"
    return f"{text[:60]} ({type(value).__name__})"
