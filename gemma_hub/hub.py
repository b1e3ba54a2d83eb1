"""Repositories of the Hugging Face hub: what names one, and its files fetched into the hub's cache.

The transfer is huggingface_hub's: its cache (HF_HOME), its login, its resuming and its bars. That
package is imported when an id is used, not before. Which files are needed is decided here, from
the list of the repository's files; no other is fetched.
"""

import errno
import importlib
import importlib.metadata
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from gemma_hub.errors import CheckpointError, CheckpointNotFoundError, first_ten

Part = Literal["model", "tokenizer", "config"]
"""What of a repository is wanted."""

CONFIG_FILE = "config.json"
VOCABULARY_FILES = ("tokenizer.model", "tokenizer.json")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
SMALL_FILES = (CONFIG_FILE, "generation_config.json", "gemma_hub_probe.json", *TOKENIZER_FILES)
"""What is fetched beside a model's weights, where the repository has it."""

_WORD = r"\w(?:[\w.-]{0,94}\w)?"
_ID = re.compile(
    rf"(?P<name>{_WORD}/{_WORD})"
    r"(?:@(?P<revision>\w[\w.+-]*(?:/\w[\w.+-]*)*))?"
    r"(?::(?P<file>[^/\\:\0]+\.(?:gguf|ckpt)))?",
    re.ASCII,
)
# A name with such an end is that of a local file.
_FILE_ENDS = frozenset("""
    .bin .ckpt .git .gguf .h5 .jinja .json .keras .model .msgpack .npz .pt .pth .safetensors .spm
    .txt
""".split())  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Stem and end of the weights' names, in the order of preference.
_WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
# Errors of httpx, httpx2 and requests, whichever this huggingface_hub is built on.
_NO_ANSWER = frozenset({"TransportError", "RequestException", "ConnectionError"})
_LATE = frozenset({"TimeoutException", "Timeout", "TimeoutError"})
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_TRIES = 3  # a branch may move between two requests

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Repository:
    """What a user calls a repository: `owner/name`, `owner/name@revision`, `owner/name:file.gguf`.

    Attributes:
        text: as the user spelled it.
        name: owner and name.
        revision: a branch, a tag or a commit; None for the branch "main".
        file: the one file that is wanted, a complete checkpoint; None for the ordinary folder.
    """

    text: str
    name: str
    revision: str | None = None
    file: str | None = None


def repository(text: str) -> Repository | None:
    """The repository that `text` names; None where it can only be a path or another name.

    Whether something of that name is on this machine is not asked here.
    """
    match = _ID.fullmatch(text)
    if match is None or ".." in text or "--" in match["name"]:
        return None
    if Path(match["name"]).suffix.lower() in _FILE_ENDS:
        return None
    return Repository(text, match["name"], match["revision"], match["file"])


def fetched(
    wanted: Repository, part: Part = "model", check_config: Callable[[Path], None] | None = None
) -> Path:
    """The folder in the hub's cache that holds the files of `part`; for a single file its path.

    What is in the cache is not fetched again. Where the hub cannot be reached, the copy in the
    cache is taken if it is complete.

    Args:
        wanted: the repository.
        part: "config" for config.json, "tokenizer" for the tokenizer's files, "model" for both and
            the weights: the safetensors, or pytorch_model*.bin where there are none.
        check_config: called with the path of config.json before weights are fetched, to refuse
            another kind of model at once; a single file says itself what it is.

    Raises:
        CheckpointNotFoundError: there is no such repository, revision or file, it is not open to
            this user, the hub cannot be reached, or huggingface_hub is not installed.
        CheckpointError: the index is malformed or names files elsewhere, the transfer broke off,
            or the cache cannot be written.
    """
    hub = _Hub.of(wanted)
    for _ in range(_TRIES):
        try:
            commit, names = hub.listing()
        except _Unreachable as error:
            path = hub.cached(part, str(error))
            level = logging.DEBUG if hub.constants.HF_HUB_OFFLINE else logging.WARNING
            _log.log(level, "%s Using the copy in the cache, %s.", error, path)
            return path
        choice = hub.choice(part, names)
        # Asked for by the revision's name, so that the cache notes what that stands for.
        first, *others = choice.files
        folder = hub.download(first, wanted.revision or "main").parent
        if folder.name == commit:
            break
    else:
        raise CheckpointError(
            f"{hub.intro}, and the repository {wanted.name!r} of the Hugging Face hub changes "
            "while it is fetched. Try again, or name a commit: owner/name@commit."
        )
    if check_config is not None and first == CONFIG_FILE and not wanted.file:
        check_config(folder / CONFIG_FILE)
    weights = choice.weights
    if choice.index:
        weights = hub.shards(hub.download(choice.index, commit), names)
    # Weights come last: where they are in the cache, all that belongs to them is.
    for name in (*others, *weights):
        hub.download(name, commit)
    return _target(folder, wanted, part)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Names of what is needed: files, then an index and its shards, or weights."""

    files: tuple[str, ...]
    index: str | None = None
    weights: tuple[str, ...] = ()


class _Unsuitable(Exception):
    """A repository has not what is needed.

    Attributes:
        what: what it lacks and what it has, as a predicate.
        advice: what to do about it, where the repository itself is meant and no copy.
    """

    def __init__(self, what: str, advice: str = "") -> None:
        self.what, self.advice = what, advice
        super().__init__(f"{what} {advice}".rstrip())


class _Unreachable(Exception):
    """The hub gave no answer; says why."""


@dataclass(frozen=True, slots=True)
class _Hub:
    """huggingface_hub, asked about one repository; its errors become ours."""

    wanted: Repository
    library: Any
    api: Any
    errors: Any
    constants: Any

    @classmethod
    def of(cls, wanted: Repository) -> Self:
        """The package, imported.

        Raises:
            CheckpointNotFoundError: it is not installed.
        """
        try:
            library = importlib.import_module("huggingface_hub")
            errors = importlib.import_module("huggingface_hub.errors")
            constants: Any = importlib.import_module("huggingface_hub.constants")
        except ImportError as error:
            raise CheckpointNotFoundError(
                f"There is no file or folder {wanted.text!r}. If it is a repository of the "
                "Hugging Face hub: fetching it needs huggingface_hub, which cannot be imported "
                f"({error}). Install it with: pip install 'gemma-hub[hub]'"
            ) from error
        # Otherwise requests tell which frameworks and which coding agent there are on this
        # machine, and a list of such agents is fetched to find out.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        try:
            version = importlib.metadata.version("gemma-hub")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        api = library.HfApi(library_name="gemma-hub", library_version=version)
        return cls(wanted, library, api, errors, constants)

    @property
    def intro(self) -> str:
        """How every message begins, since a wrong path may look like an id."""
        return f"There is no file or folder {self.wanted.text!r}"

    @property
    def place(self) -> str:
        """The repository in words, with the revision if one was given."""
        at = f" at {self.wanted.revision!r}" if self.wanted.revision else ""
        return f"the repository {self.wanted.name!r}{at} of the Hugging Face hub"

    # -- what there is -------------------------------------------------------------------------

    def listing(self) -> tuple[str, frozenset[str]]:
        """The commit that the revision stands for, and the names of all its files.

        Raises:
            _Unreachable: the hub gave no answer.
            CheckpointNotFoundError: the hub refuses.
        """
        wanted = self.wanted
        try:
            info = self.api.model_info(
                wanted.name, revision=wanted.revision, timeout=self.constants.HF_HUB_ETAG_TIMEOUT
            )
            commit, names = info.sha, frozenset(file.rfilename for file in info.siblings or ())
        except Exception as error:
            if reason := self.unreachable(error):
                raise _Unreachable(reason) from error
            raise self.refusal(error) from error
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise CheckpointError(
                f"{self.intro}, and {self.constants.ENDPOINT} says that {self.place} is at commit "
                f"{commit!r}; expected 40 hexadecimal digits. Check HF_ENDPOINT."
            )
        # What a terminal would obey is no file's name that could be wanted.
        return commit, frozenset(filter(str.isprintable, names))

    def choice(self, part: Part, names: Collection[str]) -> _Choice:
        """What of the repository's files to fetch.

        Raises:
            CheckpointNotFoundError: it lacks something that is needed.
        """
        try:
            return _chosen(self.wanted, part, names)
        except _Unsuitable as error:
            raise CheckpointNotFoundError(f"{self.intro}, and {self.place} {error}") from error

    def shards(self, index: Path, names: Collection[str]) -> tuple[str, ...]:
        """The files that an index names, all of which are plain names among `names`."""
        try:
            return _shards(index, names)
        except _Unsuitable as error:
            raise CheckpointError(
                f"{self.intro}, and {self.place} {error} No weights were fetched."
            ) from error

    # -- fetching ------------------------------------------------------------------------------

    def download(self, name: str, revision: str) -> Path:
        """The path of one file in the cache, fetched if need be."""
        try:
            path: str = self.api.hf_hub_download(self.wanted.name, name, revision=revision)
        except Exception as error:
            raise self.refusal(error, name) from error
        return Path(path)

    def cached(self, part: Part, reason: str) -> Path:
        """What `fetched` gives, from the cache alone.

        Raises:
            CheckpointNotFoundError: it is not there, or not all of it.
        """
        wanted = self.wanted
        advice = (
            f"Try again when the hub can be reached; the cache is {self.constants.HF_HUB_CACHE}."
        )
        folder = self.snapshot()
        if folder is None:
            raise CheckpointNotFoundError(
                f"{self.intro}, and {self.place} is not in the cache. {reason} {advice}"
            )
        names = {entry.name for entry in folder.iterdir() if entry.is_file()}
        try:
            choice = _chosen(wanted, part, names)
            if choice.index:
                _shards(folder / choice.index, names)
        except _Unsuitable as error:
            raise CheckpointNotFoundError(
                f"{self.intro}, and the copy of {self.place} in the cache is not complete: it "
                f"{error.what} {reason} {advice}"
            ) from error
        return _target(folder, wanted, part)

    def snapshot(self) -> Path | None:
        """The folder in the cache that holds files of the revision, if there is one."""
        for name in (self.wanted.file, *SMALL_FILES):
            found = name and self.library.try_to_load_from_cache(
                self.wanted.name, name, revision=self.wanted.revision
            )
            if isinstance(found, str):  # it may also be a mark that the file does not exist
                return Path(found).parent
        return None

    # -- what went wrong, in words -------------------------------------------------------------

    def unreachable(self, error: BaseException) -> str:
        """Why the hub gives no answer, in a sentence; empty where it gave one."""
        host = self.constants.ENDPOINT
        if isinstance(error, self.errors.OfflineModeIsEnabled):
            return "Offline mode is on (HF_HUB_OFFLINE)."
        if (status := _status(error)) is not None:
            return f"{host} is out of order (HTTP {status})." if status >= 500 else ""
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & _LATE:
            return (
                f"{host} did not answer in time. HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT "
                "are the seconds to wait for it."
            )
        if "JSONDecodeError" in kinds:
            return (
                f"{host} answers with something that is not the hub's. Check HF_ENDPOINT, and "
                "whether this network wants a login first."
            )
        if kinds & _NO_ANSWER:
            return (
                f"The connection to {host} failed ({_words(error)}). Check the network, the proxy "
                "and HF_ENDPOINT; HF_HUB_OFFLINE=1 takes what is in the cache without asking."
            )
        return ""

    def refusal(self, error: BaseException, name: str = "") -> CheckpointError:
        """Our error for one of huggingface_hub, while `name` was fetched or the list was."""
        wanted, page = self.wanted, f"{self.constants.ENDPOINT}/{self.wanted.name}"
        if isinstance(error, self.errors.LocalEntryNotFoundError) and error.__cause__:
            error = error.__cause__
        if isinstance(error, self.errors.GatedRepoError):
            return CheckpointNotFoundError(
                f"{self.intro}, and {self.place} is gated (HTTP {_status(error)}). Accept its "
                f"licence at {page} and log in with 'hf auth login', or set HF_TOKEN to a token "
                "that may read gated repositories."
            )
        if isinstance(error, self.errors.RevisionNotFoundError):
            return CheckpointNotFoundError(
                f"{self.intro}, and the repository {wanted.name!r} of the Hugging Face hub has no "
                f"revision {wanted.revision or 'main'!r}. {page}/tree/main lists its branches and "
                "tags."
            )
        if isinstance(error, self.errors.RepositoryNotFoundError):
            return CheckpointNotFoundError(
                f"{self.intro}, and the Hugging Face hub ({self.constants.ENDPOINT}) has no "
                f"repository {wanted.name!r} for you. Check the name. If it is private, log in "
                "with 'hf auth login', or set HF_TOKEN to a token that may read it."
            )
        if _status(error) == 401:
            return CheckpointNotFoundError(
                f"{self.intro}, and the Hugging Face hub refuses your token ({_words(error)}). Log "
                "in again with 'hf auth login', or set HF_TOKEN to a valid one."
            )
        return self.failure(error, name)

    def failure(self, error: BaseException, name: str) -> CheckpointError:
        """An error that is not about the repository but about the way to it, or about the disk."""
        what = f"{name} of {self.place}" if name else self.place
        number = error.errno if isinstance(error, OSError) else None
        if number in _DISK_FULL:
            return CheckpointError(
                f"{what} cannot be fetched: the disk of {self.constants.HF_HUB_CACHE} is full. "
                "Make room, or set HF_HOME to a folder on another disk."
            )
        if number in _NOT_WRITABLE:
            return CheckpointError(
                f"{what} cannot be fetched: the cache {self.constants.HF_HUB_CACHE} cannot be "
                f"written ({_words(error)}). Set HF_HOME to a folder that can."
            )
        reason = self.unreachable(error) or f"huggingface_hub says: {_words(error)}."
        return CheckpointError(
            f"{self.intro}, and {what} could not be fetched. {reason} Run it again; files that "
            "are complete are not fetched twice."
        )


def _target(folder: Path, wanted: Repository, part: Part) -> Path:
    return folder / wanted.file if wanted.file and part == "model" else folder


def _chosen(wanted: Repository, part: Part, names: Collection[str]) -> _Choice:
    """What to fetch of the files that there are.

    Raises:
        _Unsuitable: something is lacking.
    """
    if part == "config":
        if CONFIG_FILE not in names:
            raise _Unsuitable(f"has no {CONFIG_FILE}; {_holds(names)}.")
        return _Choice((CONFIG_FILE,))
    if part == "tokenizer":
        if not set(VOCABULARY_FILES) & set(names):
            raise _Unsuitable(f"has no {' or '.join(VOCABULARY_FILES)}; {_holds(names)}.")
        return _Choice(_among(TOKENIZER_FILES, names))
    small = _among(SMALL_FILES, names)
    if wanted.file:
        if wanted.file not in names:
            raise _Unsuitable(f"has no file {wanted.file!r}; {_holds(names)}.")
        return _Choice((*small, wanted.file))
    index, weights = _weights(wanted, names)
    if CONFIG_FILE not in names:
        raise _Unsuitable(f"has weights and no {CONFIG_FILE}; {_holds(names)}.")
    return _Choice(small, index, weights)


def _weights(wanted: Repository, names: Collection[str]) -> tuple[str | None, tuple[str, ...]]:
    """The index of sharded weights, or the file that holds all."""
    for stem, end in _WEIGHTS:
        index, single = f"{stem}{end}.index.json", f"{stem}{end}"
        if index in names:
            return index, ()
        if single in names:
            return None, (single,)
        shard = re.compile(rf"{stem}-\d+-of-\d+{re.escape(end)}")
        if shards := [name for name in names if shard.fullmatch(name)]:
            raise _Unsuitable(f"has shards ({first_ten(shards)}) and no {index}.")
    if files := [name for name in names if repository(f"{wanted.name}:{name}")]:
        raise _Unsuitable(
            f"has no model.safetensors, but checkpoints in single files: {first_ten(files)}.",
            f"Name one of them, as in '{wanted.name}:{min(files)}'.",
        )
    raise _Unsuitable(
        f"has no model.safetensors; {_holds(names)}.",
        "If that is a checkpoint in another format ('gemma-hub formats' lists them), fetch it with "
        f"'hf download {wanted.name} --local-dir {wanted.name.rpartition('/')[2]}' and load that "
        "folder.",
    )


def _shards(index: Path, names: Collection[str]) -> tuple[str, ...]:
    """The files that an index names.

    Raises:
        _Unsuitable: it is malformed, or names what is elsewhere or not there.
    """
    end = index.name.removesuffix(".index.json").rpartition(".")[2]
    plain = re.compile(rf"[^/\\:\0]+\.{end}")
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        files = set(places.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _Unsuitable(f"has a malformed {index.name} ({_words(error)}).") from error
    if not files:
        raise _Unsuitable(f"has an empty {index.name}.")
    for file in files:
        if not isinstance(file, str) or not plain.fullmatch(file):
            raise _Unsuitable(
                f"has an {index.name} that names {file!r}; expected plain names of *.{end} files "
                "of the repository."
            )
    if missing := files - set(names):
        raise _Unsuitable(f"lacks files that its {index.name} names: {first_ten(missing)}.")
    return tuple(sorted(files))


def _among(needed: Iterable[str], names: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in needed if name in names)


def _holds(names: Collection[str]) -> str:
    return f"it holds {first_ten(names)}" if names else "it is empty"


def _status(error: BaseException) -> int | None:
    """The number of the answer that an error is about, if it is about one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")
