"""needed: a library that reads or writes one format, imported when that format is used."""

import importlib
from types import ModuleType

from gemma_hub.errors import CheckpointError


def needed(module: str, extra: str) -> ModuleType:
    """The module of that name.

    Raises:
        CheckpointError: it is not installed, or does not import; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CheckpointError(
            f"This format needs {module}, which cannot be imported ({error}). Install it with: "
            f"pip install 'gemma-hub[{extra}]'"
        ) from error
