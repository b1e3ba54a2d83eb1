"""What the plug-in layer tells users: names that they may have meant, and what to install."""

from collections.abc import Iterable, Sequence

from gemma_hub.errors import nearest
from gemma_hub.plugins.discovery import SWITCHES_VARIABLE, Candidate
from gemma_hub.plugins.info import BackendInfo
from gemma_hub.plugins.problems import Problem

DEFAULT = "torch"
"""The backend that is taken where nobody chose one and it is installed."""

REFERENCE = "numpy"
"""The float64 reference: exact and slow, so nobody's default while there is another backend."""

OFFICIAL = {
    "torch": "gemma-hub-torch",
    "flax": "gemma-hub-flax",
    "numpy": "gemma-hub-numpy",
    "transformers": "gemma-hub-transformers",
}
"""{backend: distribution} of this project, to say what to install. Nothing else depends on it."""

OFFICIAL_CHECKPOINTS = dict.fromkeys(("tiny", "tiny-intents", "tiny-slots"), "gemma-hub-tiny")
"""{checkpoint: distribution} of this project, to say what to install."""

_ALIASES = {
    "jax": ("flax", "The JAX backend is called 'flax'."),
    "nnx": ("flax", "The JAX backend is called 'flax'."),
    "pytorch": ("torch", "The PyTorch backend is called 'torch'."),
    "reference": ("numpy", "The float64 reference is called 'numpy'."),
}


def with_way_out(remedy: str, candidate: Candidate) -> str:
    """`remedy`, and how to get rid of the plug-in; repairing it is advised if there is no other."""
    name = candidate.distribution
    if not name:
        return f"{remedy} To switch it off, set {SWITCHES_VARIABLE}=-{candidate.name}.".strip()
    repair = remedy or f"Repair it with 'pip install --upgrade {name}'."
    return (
        f"{repair} Otherwise remove it with 'pip uninstall {name}', or switch it off with "
        f"{SWITCHES_VARIABLE}=-{name}."
    )


def conflict(kind: str, name: str, rivals: Sequence[Candidate]) -> tuple[str, str]:
    """(cause, remedy) where several plug-ins claim the name of a backend or a checkpoint."""
    owners = sorted({rival.distribution for rival in rivals})
    if len(owners) == 1:
        entries = " and ".join(rival.name for rival in rivals)
        return (
            f"two entry points of {owners[0]} ({entries}) claim the {kind} name {name!r}",
            "Report it to the authors of the distribution.",
        )
    argument = "backend=" if kind == "backend" else ""
    choices = " or ".join(f'{argument}"{owner}:{name}"' for owner in owners)
    return (
        f"{' and '.join(owners)} all claim the {kind} name {name!r}, so that none has it",
        f"Choose one as {choices}, or uninstall the others.",
    )


def no_backend(
    asked: str, known: Sequence[BackendInfo], disabled: Iterable[Candidate], switches: str
) -> str:
    """The message for a backend that is not there."""
    short = asked.rpartition(":")[2].strip().lower()
    name, hint = _ALIASES.get(short, (short, ""))
    same = [info for info in known if info.name == name]
    off = [candidate for candidate in disabled if name in {candidate.name, candidate.distribution}]
    if off:
        hint = (
            f"{hint} The plug-in {off[0].name!r} of {off[0].distribution} is switched off by "
            f"{SWITCHES_VARIABLE}={switches!r}."
        )
    elif same:
        choices = {info.qualified_name if ":" in asked else info.name for info in same}
        hint = hint or f"Did you mean {' or '.join(map(repr, sorted(choices)))}?"
    elif name in OFFICIAL:
        hint = f"{hint} Install it with 'pip install {OFFICIAL[name]}'."
    else:
        hint = nearest(name, {*OFFICIAL, *(info.name for info in known)})
    return f"There is no backend {asked!r}. {hint} {_installed(known)}".replace("  ", " ")


def no_choice(known: Sequence[BackendInfo]) -> str:
    """The message where nobody chose a backend and none suggests itself."""
    usable = [info for info in known if info.state == "ready" and info.name != REFERENCE]
    choose = "Choose with backend=... or the environment variable GEMMA_HUB_BACKEND."
    if usable:
        return f"No backend was chosen and several are usable. {choose} {_installed(known)}"
    install = (
        f"Install one: 'pip install {OFFICIAL['torch']}' for PyTorch, "
        f"'pip install {OFFICIAL['flax']}' for JAX."
    )
    if any(info.state == "ready" for info in known):
        return (
            f"No backend is usable but {REFERENCE!r}, the slow float64 reference, which has to be "
            f"asked for: backend={REFERENCE!r}. {install} {_installed(known)}"
        )
    return f"No backend is usable. {install} {_installed(known)}"


def no_checkpoint(name: str, known: Iterable[str], problems: Iterable[Problem]) -> str:
    """The message for an installed checkpoint that is not there."""
    names = sorted(known)
    rivals = [other for other in names if other.endswith(f":{name}")]
    failed = [problem for problem in problems if problem.entry_point == name]
    if rivals:
        hint = f"Several distributions ship one of that name: {', '.join(rivals)}. Name one so."
    elif failed:
        hint = (
            f"The plug-in {name!r} of {failed[0].distribution} {failed[0].version} failed "
            f"({failed[0].phase}): {failed[0].cause}. {failed[0].remedy}"
        )
    elif name in OFFICIAL_CHECKPOINTS:
        hint = f"Install it with 'pip install {OFFICIAL_CHECKPOINTS[name]}'."
    else:
        hint = nearest(name, names)
    installed = f"Installed: {', '.join(names) or 'none'}."
    return f"There is no installed checkpoint {name!r}. {hint} {installed}".replace("  ", " ")


def taken_name(name: str, candidate: Candidate) -> tuple[str, str]:
    """(cause, remedy) where a plug-in claims the name of a built-in checkpoint format."""
    return (
        f"{candidate.distribution} claims the format name {name!r}, which gemma-hub keeps for its "
        "own format",
        f'Choose the plug-in\'s as "{candidate.distribution}:{name}".',
    )


def no_format(name: str, known: Iterable[str], problems: Iterable[Problem]) -> str:
    """The message for a checkpoint format that is not there."""
    names = list(known)
    rivals = [other for other in names if other.endswith(f":{name}")]
    failed = [problem for problem in problems if problem.entry_point == name]
    if rivals:
        hint = f"Several distributions have one of that name: {', '.join(rivals)}. Name one so."
    elif failed:
        hint = (
            f"The plug-in {name!r} of {failed[0].distribution} {failed[0].version} failed "
            f"({failed[0].phase}): {failed[0].cause}. {failed[0].remedy}"
        )
    else:
        hint = nearest(name, names)
    listed = f"Known: {', '.join(names)}."
    return f"There is no checkpoint format {name!r}. {hint} {listed}".replace("  ", " ")


def _installed(known: Sequence[BackendInfo]) -> str:
    """`Installed: flax, dist:mlx (quarantined).`, for the end of a message."""
    words = [
        info.name if info.state == "ready" else f"{info.qualified_name} ({info.state})"
        for info in known
    ]
    return f"Installed: {', '.join(words) or 'none'}."
