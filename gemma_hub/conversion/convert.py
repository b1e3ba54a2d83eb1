"""convert: a checkpoint from any format to any other, whole or not at all."""

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_hub.checkpoints.formats.interface import (
    CheckpointFormat,
    Opened,
    Progress,
    WriteOptions,
)
from gemma_hub.checkpoints.output import check_target, whole_file, whole_folder, write_json
from gemma_hub.checkpoints.reader import EMBEDDING
from gemma_hub.config import GemmaConfig
from gemma_hub.conversion.casting import CastWeights
from gemma_hub.conversion.opening import detect_format, open_source
from gemma_hub.errors import CheckpointError, InputError, nearest
from gemma_hub.parameters import DTYPES, Shape
from gemma_hub.plugins.registry import plugin_registry
from gemma_hub.probe import PROBE_FILE, Probe, read_probe, reference_probe

_SPARE = 64 << 20  # bytes of disk beside the tensors: headers, the tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion does, or did.

    Attributes:
        source: path of what is read.
        source_format: its format.
        target_format: the format that is written.
        task: what the model is for.
        config: the model's.
        tensors: {name in the target: (shape, type)}, each of them written once.
        nbytes: size of all tensors of the target.
        dropped: {name in the source: why it is not carried over}.
        notes: what had to be assumed, one sentence each.
        objections: why the target cannot hold the model; empty if it can.
        files: names of the files that go with the weights.
        changed: {parameter: number of values that the narrower type changed}; empty in a plan.
    """

    source: Path
    source_format: str
    target_format: str
    task: str
    config: GemmaConfig
    tensors: Mapping[str, tuple[Shape, str]]
    nbytes: int
    dropped: Mapping[str, str]
    notes: tuple[str, ...]
    objections: tuple[str, ...]
    files: tuple[str, ...]
    changed: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON knows it."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        record["source"] = str(self.source)
        record["config"] = self.config.to_dict(self.task)
        record["tensors"] = {
            name: {"shape": list(shape), "dtype": dtype}
            for name, (shape, dtype) in self.tensors.items()
        }
        for name in ("notes", "objections", "files"):
            record[name] = list(record[name])
        for name in ("dropped", "changed"):
            record[name] = dict(record[name])
        return record


def plan_conversion(
    source: str | os.PathLike[str],
    to: str = "huggingface",
    *,
    dtype: str | None = None,
    source_format: str | None = None,
    config: GemmaConfig | None = None,
    options: WriteOptions | None = None,
) -> Conversion:
    """What `convert` would do with these arguments; no tensor is read and nothing is written.

    Raises:
        CheckpointError: the source is damaged, or one of the formats is unknown.
        InputError: there is no such type.
    """
    job = _Job.prepared(source, to, dtype, source_format, config, options or WriteOptions())
    return job.record()


def convert(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    to: str = "huggingface",
    *,
    dtype: str | None = None,
    source_format: str | None = None,
    config: GemmaConfig | None = None,
    options: WriteOptions | None = None,
    overwrite: bool = False,
    probe: bool = True,
    progress: Progress | None = None,
    probe_progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint in another format, bit for bit the same unless `dtype` says otherwise.

    Everything goes to a hidden folder beside `path`, which is renamed when it is complete: after a
    failure there is what was there before, or nothing. One tensor at a time is in memory.

    Args:
        source: a file or folder of any format, an installed checkpoint's name, or a repository id.
        path: the folder to make; or a file, where the format has one that holds everything and the
            name ends as that file's does ("model.gguf").
        to: the format to write.
        dtype: a key of `gemma_hub.parameters.DTYPES` that all weights are rounded to; None for
            each its own.
        source_format: the format to read; None to find out.
        config: the model's, instead of what the source says of itself.
        options: how to write it.
        overwrite: replace what a former conversion left at `path`.
        probe: write gemma_hub_probe.json into the folder, by which the checkpoint can be verified
            wherever it is loaded: the source's own where the weights stay as they are, else one
            that the float64 reference makes, if it is installed and the results are finite.
        progress: told how many bytes of how many are written.
        probe_progress: told how many parameters of how many were read for the probe.

    Returns:
        What was done, with the number of values that `dtype` changed.

    Raises:
        CheckpointError: the source is damaged, the target cannot hold the model, `path` exists,
            or there is not enough space on the disk.
        InputError: there is no such type.
    """
    job = _Job.prepared(source, to, dtype, source_format, config, options or WriteOptions())
    record = job.record()
    if record.objections:
        raise CheckpointError(
            f"The format {to!r} cannot hold this model; nothing was written.\n"
            + "".join(f"  {reason}\n" for reason in record.objections)
            + "  huggingface holds every model."
        )
    target = Path(path).expanduser().resolve()
    suffix = Path(job.target.file_name or "").suffix
    is_file = bool(suffix) and target.suffix == suffix
    if is_file:
        _check_file(target, overwrite)
    else:
        check_target(target, overwrite, _is_checkpoint)
    _check_space(target, record.nbytes + _SPARE)
    kept = job.kept_probe() if probe and not is_file else None
    try:
        if is_file:
            assert job.target.file_name is not None
            with whole_file(target, job.target.file_name) as folder:
                job.target.write(folder, job.opened, job.options, progress)
        else:
            with whole_folder(target) as folder:
                job.target.write(folder, job.opened, job.options, progress)
                if probe and (made := kept or job.new_probe(probe_progress)):
                    write_json(folder / PROBE_FILE, made.to_dict())
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}. The weights need "
            f"{record.nbytes:,} bytes of disk. What was there before is still there."
        ) from error
    return dataclasses.replace(record, changed=dict(job.changed))


@dataclass(frozen=True, slots=True)
class _Job:
    source_format: str
    target: CheckpointFormat
    opened: Opened
    options: WriteOptions
    cast: CastWeights | None

    @classmethod
    def prepared(
        cls,
        source: str | os.PathLike[str],
        to: str,
        dtype: str | None,
        source_format: str | None,
        config: GemmaConfig | None,
        options: WriteOptions,
    ) -> "_Job":
        if dtype is not None and dtype not in DTYPES:
            hint = nearest(dtype, DTYPES)
            raise InputError(f"There is no dtype {dtype!r}. {hint} Known: {', '.join(DTYPES)}.")
        target = plugin_registry().load_format(to)
        form, opened = open_source(source, source_format, config)
        cast = None
        if dtype is not None:
            cast = CastWeights(opened.weights, dtype)
            changed = dataclasses.replace(opened.config, dtype=dtype)
            opened = dataclasses.replace(opened, weights=cast, config=changed)
        return cls(form.name, target, opened, options, cast)

    @property
    def changed(self) -> Mapping[str, int]:
        return self.cast.changed if self.cast else {}

    def kept_probe(self) -> Probe | None:
        """The source's probe, if it has one that holds for what is written."""
        if self.cast or not self.opened.path.is_dir():
            return None
        probe = read_probe(self.opened.path, self.opened.config)
        return probe if probe and probe.task == self.opened.task else None

    def new_probe(self, progress: Progress | None) -> Probe | None:
        """What the reference computes from the weights that are written."""
        opened = self.opened
        dtype = opened.weights.dtype(EMBEDDING)
        return reference_probe(opened.config, opened.task, opened.weights, dtype, progress)

    def record(self) -> Conversion:
        opened = self.opened
        objections = self.target.objections(opened.config, opened.task, self.options)
        if self.options.layout is not None and self.options.layout not in self.target.layouts:
            known = ", ".join(self.target.layouts) or "none"
            objections += (f"It has no layout {self.options.layout!r}. Known: {known}.",)
        tensors: dict[str, tuple[Shape, str]] = {}
        if not objections:
            written = self.target.tensors(opened, self.options)
            tensors = {name: (written.shape(name), written.dtype(name)) for name in written.names()}
        return Conversion(
            source=opened.path,
            source_format=self.source_format,
            target_format=self.target.name,
            task=opened.task,
            config=opened.config,
            tensors=tensors,
            nbytes=sum(math.prod(s) * DTYPES[d].itemsize for s, d in tensors.values()),
            dropped=opened.dropped,
            notes=opened.notes,
            objections=objections,
            files=tuple(opened.files),
        )


def _is_checkpoint(folder: Path) -> bool:
    """Whether some format knows the folder, so that replacing it loses nothing else."""
    if (folder / "config.json").is_file():
        return True
    try:
        return bool(detect_format(folder))
    except CheckpointError:
        return False


def _check_file(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder. Choose another path for the file.")
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{target} exists already. Choose another path, or pass overwrite=True to replace it."
        )


def _check_space(target: Path, needed: int) -> None:
    folder = next(parent for parent in target.parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"The checkpoint needs {needed:,} bytes and the disk of {folder} has {free:,} left. "
            "Make room, or choose another place."
        )
