"""A program that lists an OCDBT database in little memory, as JSON; `ocdbt_listing` runs it.

Arguments: the most bytes of memory, the folder, and the ends of the keys whose values are wanted.
It imports nothing of gemma_hub, so that it starts at once.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

# More than any Gemma has.
_MOST_KEYS = 100_000
_LONGEST_KEY = 1_000
_LARGEST_VALUE = 1 << 20


def database_spec(folder: str) -> dict[str, Any]:
    """tensorstore's spec of a folder's database: files of that folder, whatever they say."""
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}


def explained(error: Exception) -> str:
    """The reason that one of tensorstore's errors gives, without where it was raised."""
    return " ".join(str(error).partition(" [source")[0].split())[:300]


def entries(folder: str, described_by: Sequence[str]) -> dict[str, str | None]:
    """{key: its value as text if it ends in one of `described_by`, else None}.

    Raises:
        ValueError: the database is damaged, or there is more in it than a Gemma has.
    """
    tensorstore = importlib.import_module("tensorstore")
    limits = {"file_io_concurrency": {"limit": 2}, "data_copy_concurrency": {"limit": 1}}
    context = tensorstore.Context(limits)
    store = tensorstore.KvStore.open(database_spec(folder), context=context).result()
    keys = store.list().result()
    if len(keys) > _MOST_KEYS or any(len(key) > _LONGEST_KEY for key in keys):
        raise ValueError(
            f"it has {len(keys):,} keys; expected at most {_MOST_KEYS:,}, of {_LONGEST_KEY} bytes"
        )
    found: dict[str, str | None] = {}
    for key in sorted(keys):
        name, value = str(key, "utf-8"), None
        if name.endswith(tuple(described_by)):
            value = store.read(key).result().value
            if len(value) > _LARGEST_VALUE:
                raise ValueError(f"{name} has {len(value):,} bytes")
        found[name] = None if value is None else str(value, "utf-8")
    return found


def _limit_memory(nbytes: int) -> None:
    try:
        import resource
    except ImportError:  # not a Unix
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))


def _main() -> None:
    nbytes, folder, *described_by = sys.argv[1:]
    _limit_memory(int(nbytes))
    answer: dict[str, Any] = {}
    try:
        answer["entries"] = entries(folder, described_by)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        answer["error"] = explained(error)
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main()
