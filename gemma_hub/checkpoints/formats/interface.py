"""What a checkpoint format is: how it is recognised, opened and written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from gemma_hub.config import GemmaConfig
from gemma_hub.parameters import Weights

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total) while weights are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A checkpoint of any format, opened and checked. No tensor was read.

    Attributes:
        path: the file or the folder.
        config: stated by the checkpoint, given by the caller, or inferred from the shapes.
        task: what the weights are for, a key of `gemma_hub.config.ARCHITECTURES`.
        weights: every parameter that `config` and `task` call for, under its canonical name; read
            when asked for. Every tensor of the source is in one of them, or in `dropped`.
        dropped: {name in the source, or "name[rows]": why the value is not carried over}.
        notes: what had to be assumed, one sentence each; empty where the source says it all.
        files: {name in a Hugging Face folder: file} of what belongs beside the weights, such as
            {"tokenizer.model": Path(".../assets/tokenizer/vocabulary.spm")}.
    """

    path: Path
    config: GemmaConfig
    task: str
    weights: Weights
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How to write a checkpoint.

    Attributes:
        max_shard_bytes: size above which the weights go to several files, where the format has a
            way; None for the format's own default.
        pad_vocab_to: number of embedding rows in the file, the ones past `vocab_size` zero; None
            for no such rows. A format without padded rows ignores nothing: it refuses.
        layout: which of the format's own layouts, by its name; None for the usual one.
    """

    max_shard_bytes: int | None = None
    pad_vocab_to: int | None = None
    layout: str | None = None


@runtime_checkable
class CheckpointFormat(Protocol):
    """One format. Its module imports nothing heavy; its methods import the reader they need.

    Attributes:
        name: what users type after `--to`, such as "gguf".
        file_name: of the file that alone is a complete checkpoint of this format, such as
            "model.gguf"; None where it takes a folder.
        layouts: names that `WriteOptions.layout` may have, the usual one first; () for one layout.
    """

    name: str
    file_name: str | None
    layouts: tuple[str, ...]

    def detect(self, path: Path) -> bool:
        """Whether the file or folder at `path` looks like this format.

        Cheap: names of files, and a few bytes of one. Never raises, needs no heavy reader.
        """
        ...

    def open(self, path: Path, config: GemmaConfig | None = None) -> Opened:
        """Open a checkpoint; all of its structure is checked and no tensor is read.

        Args:
            path: the file or the folder.
            config: instead of what the checkpoint says of itself. None: its own statement, or
                the config.json beside it, or what the shapes tell.

        Raises:
            CheckpointError: a file is damaged or hostile, a tensor is missing, unexpected or
                misshapen, the reader is not installed (the message says what to install), or the
                config cannot be told from the shapes.
        """
        ...

    def objections(self, config: GemmaConfig, task: str, options: WriteOptions) -> tuple[str, ...]:
        """Why this format cannot hold such a model, a sentence each; empty if it can."""
        ...

    def tensors(self, opened: Opened, options: WriteOptions) -> Weights:
        """What would be written: names, shapes and types as in the target, read when asked for."""
        ...

    def write(
        self,
        folder: Path,
        opened: Opened,
        options: WriteOptions,
        progress: Progress | None = None,
    ) -> None:
        """Write a checkpoint into an empty folder, `opened.files` included.

        The caller moves the folder to its place once this returns, so a failure may leave half of
        it. At most one tensor of the target is in memory at a time, and files are flushed to disk.

        Raises:
            CheckpointError: there are objections, or the writer is not installed.
            OSError: the disk is full, or cannot be written.
        """
        ...
