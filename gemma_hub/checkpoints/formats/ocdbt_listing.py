"""What is in an OCDBT database, found out in a process of its own, of little memory.

tensorstore allocates what a node of the database's B-tree claims, and ends the process where it
cannot: a forged file of 50 kB takes 4 GB. So a program lists the keys first, and reads the entries
that describe arrays. Once it has, the database can be opened here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from gemma_hub.checkpoints.formats import ocdbt_program
from gemma_hub.checkpoints.formats.readers import needed
from gemma_hub.errors import CheckpointError

MANIFEST = "manifest.ocdbt"

_MEMORY = 512 << 20  # bytes; a Gemma takes less than 150 MB, most of it tensorstore's own
_SECONDS = 30


def list_database(folder: Path, described_by: tuple[str, ...]) -> dict[str, str | None]:
    """{key: its value as text if it describes an array, else None} of a folder's database.

    Args:
        folder: which has the manifest.
        described_by: ends of the keys that describe an array.

    Raises:
        CheckpointError: the database is damaged or hostile, or tensorstore is not installed.
    """
    needed("tensorstore", "orbax")
    # -P: what lies beside the program is none of its modules.
    command = [sys.executable, "-P", ocdbt_program.__file__, str(_MEMORY), str(folder)]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # this process's own
    try:
        done = subprocess.run(
            [*command, *described_by],
            capture_output=True,
            timeout=_SECONDS,
            check=False,
            env={**os.environ, **paths},
        )
        answer = json.loads(done.stdout)
    except OSError as error:
        raise _unusable(folder, f"no process can be started to list it ({error})") from error
    except subprocess.TimeoutExpired as error:
        raise _unusable(folder, f"it cannot be listed in {_SECONDS} seconds") from error
    except ValueError as error:  # there is no JSON, as the program died
        limit = f"{_MEMORY >> 20} MB of memory, which is more than any Gemma takes"
        raise _unusable(folder, f"it cannot be listed in {limit}") from error
    if "error" in answer:
        raise _unusable(folder, answer["error"])
    entries: dict[str, str | None] = answer["entries"]
    return entries


def _unusable(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / MANIFEST} cannot be used as a database of arrays: {reason}. Get the "
        "checkpoint again."
    )
