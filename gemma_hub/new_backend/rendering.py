"""From templates to a folder: a backend in plain NumPy that passes the conformance suite."""

import keyword
import os
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from packaging.utils import canonicalize_name

from gemma_hub.checkpoints.output import flush, whole_folder
from gemma_hub.errors import InputError
from gemma_hub.plugins.registry import PluginRegistry, plugin_registry
from gemma_hub.plugins.spec import API_VERSION

LONGEST_NAME = 24
"""Names up to this fit the lines of the templates."""

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_SUFFIX = ".txt"  # of every template, so that no tool takes one for a module


def render(name: str, folder: str | Path, registry: PluginRegistry | None = None) -> Path:
    """Write the distribution of a new backend; the folder appears whole or not at all.

    Args:
        name: of the backend: a lower-case identifier that no installed plug-in has.
        folder: where; must not exist, and the folder that it is in must.
        registry: what is installed; that of this process if None.

    Returns:
        The folder.

    Raises:
        InputError: the name cannot be used, or the folder cannot be made.
    """
    checked_name(name, registry)
    given = Path(folder).expanduser()
    if os.path.lexists(given):
        raise InputError(f"{given} exists already. Choose another folder, or remove it.")
    if not given.parent.is_dir():
        raise InputError(f"There is no folder {given.parent} to make {given.name} in. Make it.")
    target = given.parent.resolve() / given.name
    try:
        with whole_folder(target) as hidden:
            for path, content in rendered_files(name).items():
                _write(hidden / path, content)
    except OSError as error:
        raise InputError(f"{given} cannot be written: {error.strerror or error}.") from error
    return given


def rendered_files(name: str) -> dict[str, str]:
    """{path in the distribution: content} for a name that was checked."""
    values = {
        "name": name,
        "title": "".join(word.capitalize() for word in name.split("_")),
        "package": package_name(name),
        "distribution": distribution_name(name),
        "api_version": ".".join(map(str, API_VERSION)),
    }
    templates = _templates(files("gemma_hub.new_backend").joinpath("templates"))
    return {
        path.replace("package/", f"{values['package']}/"): Template(content).substitute(values)
        for path, content in sorted(templates.items())
    }


def distribution_name(name: str) -> str:
    """What the distribution of the backend `name` is called."""
    return f"gemma-hub-{name.replace('_', '-')}"


def package_name(name: str) -> str:
    """What its package is called."""
    return f"gemma_hub_{name}"


def checked_name(name: Any, registry: PluginRegistry | None = None) -> str:
    """`name`, if a new backend may be called so.

    Args:
        name: whatever was given as the name.
        registry: what is installed; that of this process if None.

    Raises:
        InputError: it is no name for a backend, or an installed plug-in has it.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"The name is {name!r}; expected lower-case letters and digits, a letter first, with "
            f"single underscores between words, such as {_suggestion(name)!r}."
        )
    if len(name) > LONGEST_NAME:
        raise InputError(
            f"The name {name!r} has {len(name)} characters; expected at most {LONGEST_NAME}."
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise InputError(f"{name!r} is a keyword of Python. Choose another name.")
    if owner := _owner(name, plugin_registry() if registry is None else registry):
        raise InputError(f"The name {name!r} is taken by {owner}. Choose another name.")
    return name


def _suggestion(name: object) -> str:
    """The nearest name that is one."""
    words = re.findall(r"[a-z0-9]+", str(name).lower())
    suggestion = "_".join(words).lstrip("_0123456789")[:LONGEST_NAME].rstrip("_")
    is_usable = _NAME.fullmatch(suggestion) and not keyword.iskeyword(suggestion)
    return suggestion if is_usable else "abacus"


def _owner(name: str, registry: PluginRegistry) -> str:
    """Who has the name or one made from it, in words; '' if nobody has."""
    for backend in registry.backends():
        if backend.name == name:
            return f"a backend of {backend.distribution or 'an installed plug-in'}"
    for plugin in registry.plugins():
        is_same = canonicalize_name(plugin.distribution) == distribution_name(name)
        if plugin.entry_point == name or is_same:
            return f"a plug-in of {plugin.distribution}"
    if find_spec(package_name(name)) is not None:
        return f"the package {package_name(name)}, which is installed"
    return ""


def _templates(folder: Traversable, under: str = "") -> dict[str, str]:
    """{path without suffix: text} of every template."""
    found: dict[str, str] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= _templates(entry, f"{under}{entry.name}/")
        elif entry.name.endswith(_SUFFIX):
            found[under + entry.name.removesuffix(_SUFFIX)] = entry.read_text("utf-8")
    return found


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(content)
        flush(file)
