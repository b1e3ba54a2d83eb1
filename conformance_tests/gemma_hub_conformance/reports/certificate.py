"""The certificate: what was certified, by what, with which numbers drawn; anybody can run it again.

It proves nothing by itself, as anybody can write such a file. It says how to find out:
`gemma-hub conformance --recheck certificate.json` runs the same profile with a fresh seed, on the
same backend with the same options.
"""

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_hub.errors import InputError
from gemma_hub_conformance.profiles import PROFILES, manifest
from gemma_hub_conformance.report import Report, Verdict
from gemma_hub_conformance.small_file import small_text

_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a certificate says that a new run needs.

    Attributes:
        backend: its name.
        distribution: that shipped it.
        version: of that distribution.
        profile: what it was certified for.
        seed: that the run drew from.
        options: of the backend, as `--option` takes them.
        dtypes: as in `Report`.
        manifest: SHA-256 of the list of required cases that counted.
    """

    backend: str
    distribution: str
    version: str
    profile: str
    seed: int
    manifest: str
    options: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()

    @property
    def changes(self) -> tuple[str, ...]:
        """What is other now than it was: the suite's cases, or the distribution's version."""
        found = []
        if self.manifest != manifest_digest():
            found.append("the required cases are others than those that it was certified by")
        try:
            version = importlib.metadata.version(self.distribution) if self.distribution else ""
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        if version != self.version:
            found.append(f"{self.distribution} is {version} and was {self.version}")
        return tuple(found)


def content(report: Report) -> dict[str, Any]:
    """The certificate of a run that certified its backend."""
    return {
        "schema": _SCHEMA,
        "backend": report.backend,
        "distribution": report.distribution,
        "version": report.version,
        "device": report.device,
        "options": list(report.options),
        "dtypes": list(report.dtypes),
        "suite": importlib.metadata.version("gemma-hub-conformance"),
        "profile": report.profile,
        "seed": report.seed,
        "cases": len(report.results),
        "waived": [each.id for each in report.results if each.verdict is Verdict.WAIVED],
        "manifest": manifest_digest(),
        "summary": report.summary,
    }


def read_certificate(path: Path) -> Certificate:
    """What a certificate says.

    Raises:
        InputError: it cannot be read, or is none.
    """
    text = small_text(path)
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    if not isinstance(raw, dict) or raw.get("schema") != _SCHEMA:
        raise InputError(f"{path} is no certificate; expected JSON with a schema of {_SCHEMA}.")
    texts = ("backend", "distribution", "version", "profile", "manifest")
    for key in texts:
        if not isinstance(raw.get(key), str):
            raise InputError(f"{path}: {key} is {raw.get(key)!r}; expected a text.")
    if raw["profile"] not in PROFILES:
        raise InputError(f"{path} is of the profile {raw['profile']!r}, which there is not.")
    if type(raw.get("seed")) is not int:
        raise InputError(f"{path}: seed is {raw.get('seed')!r}; expected an integer.")
    return Certificate(
        **{key: raw[key] for key in texts},
        seed=raw["seed"],
        options=_texts(path, raw, "options"),
        dtypes=_texts(path, raw, "dtypes"),
    )


def _texts(path: Path, raw: dict[str, Any], key: str) -> tuple[str, ...]:
    found = raw.get(key, [])  # certificates of suites without options have none
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise InputError(f"{path}: {key} is {found!r}; expected a list of texts.")
    return tuple(found)


def manifest_digest() -> str:
    """SHA-256 of the list of required cases."""
    return hashlib.sha256(manifest()).hexdigest()
