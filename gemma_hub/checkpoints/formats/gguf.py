"""GGUF: one file for llama.cpp, with the weights, the config and the vocabulary."""

import hashlib
import math
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gemma_hub.cache import cache_folder
from gemma_hub.checkpoints.formats import gguf_config
from gemma_hub.checkpoints.formats.gguf_file import MAGIC, GgufFile, Value
from gemma_hub.checkpoints.formats.gguf_norms import (
    NORMS_KEY,
    norms_to_keep,
    values_changed,
    with_norms,
)
from gemma_hub.checkpoints.formats.gguf_vocabulary import (
    PieceTable,
    padded,
    read_pieces,
    unknown_id,
    vocabulary_model,
)
from gemma_hub.checkpoints.formats.interface import Opened, Progress, WriteOptions
from gemma_hub.checkpoints.formats.layout import (
    StoredWeights,
    canonical_weights,
    stored_weights,
)
from gemma_hub.checkpoints.formats.readers import needed
from gemma_hub.checkpoints.formats.stated import companions
from gemma_hub.checkpoints.formats.table import layout
from gemma_hub.checkpoints.output import copy_file, flush
from gemma_hub.config import GemmaConfig, read_json_object
from gemma_hub.errors import CheckpointError, CheckpointNotFoundError, first_ten
from gemma_hub.parameters import DTYPES, Weights

_SUFFIX = ".gguf"
_PART = re.compile(r".+-\d{5}-of-(\d{5})\.gguf")
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_CONSTANTS = {"rope_freqs.weight": "follows from the config"}
_TASK = "causal_lm"
_COMPARED_AT_ONCE = 4 << 20  # bytes
_WRITTEN_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
# {piece: key of its id}: what llama.cpp cannot tell from the pieces alone.
_MARKS = {
    b"<|fim_prefix|>": "fim_pre",
    b"<|fim_suffix|>": "fim_suf",
    b"<|fim_middle|>": "fim_mid",
    b"<|file_separator|>": "fim_sep",
    b"<end_of_turn>": "eot",
}


class Gguf:
    """Reads F32, F16, BF16 and Q8_0; writes each tensor in its type, the norms in F32."""

    name = "gguf"
    file_name: str | None = "model.gguf"
    layouts: tuple[str, ...] = ()

    def detect(self, path: Path) -> bool:
        try:
            if path.is_dir():
                found = _files(path)
                return len(found) == 1 or (bool(found) and all(map(_PART.fullmatch, found)))
            if not path.is_file() or path.suffix == _SUFFIX:
                return path.is_file()
            with path.open("rb") as file:
                return file.read(len(MAGIC)) == MAGIC
        except (OSError, ValueError):
            return False

    def open(self, path: Path, config: GemmaConfig | None = None) -> Opened:
        file = GgufFile(_one_file(path))
        gguf_config.check_architecture(file.path, file.metadata)
        notes: tuple[str, ...] = ()
        if config is None:
            config, notes = gguf_config.config_from(file, _EMBEDDING)
        columns = layout(self.name)
        # Far too few for a list of what is missing, which might have no end.
        in_layer = sum("{i}" in cell[0].name for cell in columns.values())
        if config.num_hidden_layers * in_layer > len(file.tensors) + 100:
            raise CheckpointError(
                f"{file.path} has {len(file.tensors)} tensors, and the config says "
                f"{config.num_hidden_layers} layers of {in_layer} each. Check that the two belong "
                "together."
            )
        constants = {name: why for name, why in _CONSTANTS.items() if name in file.tensors}
        canonical, dropped = canonical_weights(
            str(file.path), file, columns, config, _TASK, dropped=constants | _tied_head(file)
        )
        weights, of_norms = with_norms(canonical, file, columns, config, _TASK)
        files, of_files = _files_of(file, config, is_alone=not path.is_dir())
        return Opened(
            path=path,
            config=config,
            task=_TASK,
            weights=weights,
            dropped=dropped,
            notes=(*notes, *_rounded(file), *of_norms, *of_files),
            files=files,
        )

    def objections(self, config: GemmaConfig, task: str, options: WriteOptions) -> tuple[str, ...]:
        return tuple(gguf_config.objections(config, task, options))

    def tensors(self, opened: Opened, options: WriteOptions) -> StoredWeights:
        self._check(opened, options)
        return stored_weights(opened.weights, layout(self.name), opened.config, opened.task)

    def write(
        self,
        folder: Path,
        opened: Opened,
        options: WriteOptions,
        progress: Progress | None = None,
    ) -> None:
        stored = self.tensors(opened, options)
        gguf = needed("gguf", "gguf")
        assert self.file_name is not None
        writer = gguf.GGUFWriter(folder / self.file_name, gguf_config.ARCHITECTURE)
        try:
            writer.add_type("model")
            kind = _FILE_TYPES[stored.dtype(_EMBEDDING)]
            writer.add_file_type(int(gguf.LlamaFileType[kind]))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            gguf_config.add_config(writer, opened.config)
            _add_vocabulary(writer, opened)
            kept = norms_to_keep(opened.weights, stored, layout(self.name))
            if kept is not None:
                writer.add_array(NORMS_KEY, kept)
            _write_tensors(writer, gguf.GGMLQuantizationType, stored, progress)
            flush(writer.fout[0])
        finally:
            writer.close()
        for name, source in opened.files.items():
            copy_file(source, folder / name)

    def _check(self, opened: Opened, options: WriteOptions) -> None:
        reasons = list(self.objections(opened.config, opened.task, options))
        wide = [
            name
            for name in opened.weights.names()
            if opened.weights.dtype(name) not in _WRITTEN_TYPES
        ]
        if wide:
            reasons.append(
                f"llama.cpp computes with no float64, the type of {first_ten(wide)}. Pass a dtype: "
                f"{' or '.join(_WRITTEN_TYPES)}."
            )
        if reasons:
            raise CheckpointError(
                "A GGUF cannot hold this model.\n" + "".join(f"  {reason}\n" for reason in reasons)
            )


def unfolded(opened: Opened) -> int:
    """How many values of the norms are not given back by the sums w + 1 that a GGUF holds.

    They are in the file all the same, under a key that only gemma_hub reads; llama.cpp computes
    with the sums.
    """
    return values_changed(opened.weights, layout(Gguf.name))


# -- reading ---------------------------------------------------------------------------------------


def _files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.suffix == _SUFFIX)


def _one_file(path: Path) -> Path:
    """The file that a path means."""
    if not path.exists():
        raise CheckpointNotFoundError(f"There is no GGUF file at {path}.")
    file = path
    if path.is_dir():
        try:
            found = _files(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        if not found:
            raise CheckpointNotFoundError(f"{path} holds no *{_SUFFIX} file.")
        if len(found) > 1 and not _PART.fullmatch(found[0]):
            raise CheckpointError(
                f"{path} holds several GGUF files: {first_ten(found)}. Give the path of one."
            )
        file = path / found[0]
    part = _PART.fullmatch(file.name)
    if part and int(part[1]) > 1:
        raise CheckpointError(
            f"{file} is one of {int(part[1])} parts of a model. Make one file of them with "
            "llama.cpp's llama-gguf-split --merge FIRST_PART model.gguf, and open that."
        )
    return file


def _tied_head(file: GgufFile) -> dict[str, str]:
    """The head, if it is there and the embedding once more; another one is an error."""
    if _OUTPUT not in file.tensors or _EMBEDDING not in file.tensors:
        return {}
    head, embedding = file.tensors[_OUTPUT], file.tensors[_EMBEDDING]
    equal = (head.kind, head.shape) == (embedding.kind, embedding.shape)
    if equal:
        one, other = file.raw_bytes(_OUTPUT), file.raw_bytes(_EMBEDDING)
        equal = all(
            np.array_equal(one[i : i + _COMPARED_AT_ONCE], other[i : i + _COMPARED_AT_ONCE])
            for i in range(0, one.size, _COMPARED_AT_ONCE)
        )
    if not equal:
        # Every Gemma ties the two, and so does llama.cpp: it would not use this head, or not load.
        raise CheckpointError(
            f"{file.path} has a head, {_OUTPUT}, that differs from its embedding, {_EMBEDDING}. "
            "Gemma's are one array. Get the model from another source; this file is no Gemma."
        )
    return {_OUTPUT: f"equal to {_EMBEDDING}, which is the head too"}


def _rounded(file: GgufFile) -> tuple[str, ...]:
    count = sum(tensor.kind == "Q8_0" for tensor in file.tensors.values())
    if not count:
        return ()
    return (
        f"{count} of its tensors are quantised (Q8_0) and are given in float32: the values that "
        "llama.cpp computes with, not those of the model before it was quantised.",
    )


def _files_of(
    file: GgufFile, config: GemmaConfig, *, is_alone: bool
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The files beside a GGUF, and those made of what it holds itself; notes on what failed.

    Args:
        file: the GGUF.
        config: the model's.
        is_alone: whether it was asked for by its own name: the folder may then hold files of other
            models, which count only where this one holds no vocabulary.
    """
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    files = {} if is_alone and tokens is not None else companions(file.path.parent)
    made: dict[str, bytes] = {}
    notes: list[str] = []
    if isinstance(tokens, list) and len(tokens) != config.vocab_size:
        notes.append(
            f"Its vocabulary has {len(tokens):,} pieces, and the config that was given "
            f"{config.vocab_size:,}; llama.cpp would not load it."
        )
    if "tokenizer.model" not in files and "tokenizer.json" not in files and tokens is not None:
        model = vocabulary_model(file.metadata)
        if model is None:
            notes.append("Its vocabulary is not of Gemma's kind; there is no tokenizer.model.")
        else:
            made["tokenizer.model"] = model
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and not files.keys() & {
        "chat_template.jinja",
        "tokenizer_config.json",
    }:
        made["chat_template.jinja"] = template.encode()
    for name, content in made.items():
        try:
            files[name] = _cached(content, Path(name).suffix)
        except (OSError, RuntimeError) as error:
            notes.append(f"There is no {name}: it cannot be written to the cache ({error}).")
    return files, tuple(notes)


def _cached(content: bytes, suffix: str) -> Path:
    """A file with that content, by its checksum."""
    path = cache_folder("gguf") / f"{hashlib.sha256(content).hexdigest()}{suffix}"
    if path.is_file() and path.read_bytes() == content:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise
    return path


# -- writing ---------------------------------------------------------------------------------------


def _add_vocabulary(writer: Any, opened: Opened) -> None:
    """Add what llama.cpp needs to know of the tokenizer, if there is one."""
    template = _chat_template(opened.files)
    if template:
        writer.add_chat_template(template)
    source = opened.files.get("tokenizer.model")
    if source is None:
        writer.add_tokenizer_model("none")  # llama.cpp's word for a model without a vocabulary
        return
    table = _table(source, opened.config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(table.texts)
    writer.add_token_scores(table.scores)
    writer.add_token_types(table.types)
    unknown = unknown_id(table)
    if unknown is not None:
        writer.add_unk_token_id(unknown)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(table.adds_prefix)
    if table.removes_spaces:
        writer.add_remove_extra_whitespaces(True)
    places = {text: i for i, text in enumerate(table.texts) if text in _MARKS}
    for text, i in places.items():
        writer.add_uint32(f"tokenizer.ggml.{_MARKS[text]}_token_id", i)


def _table(source: Path, vocab_size: int) -> PieceTable:
    try:
        table = read_pieces(source.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            f"{source} is no vocabulary that a GGUF can hold: {error}. Use Gemma's own "
            "tokenizer.model, or remove the file to write the weights without a vocabulary."
        ) from error
    if len(table.texts) > vocab_size:
        raise CheckpointError(
            f"{source} has {len(table.texts):,} pieces, and the config's vocab_size is "
            f"{vocab_size:,}. Use the tokenizer.model that belongs to the model."
        )
    return padded(table, vocab_size)


def _chat_template(files: Mapping[str, Path]) -> Value | None:
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].read_text("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{files['chat_template.jinja']} is not UTF-8 ({error}). Get the file again."
            ) from error
    if "tokenizer_config.json" not in files:
        return None
    stated = read_json_object(files["tokenizer_config.json"], CheckpointError)
    template = stated.get("chat_template")
    return template if isinstance(template, str) else None


def _write_tensors(writer: Any, types: Any, stored: Weights, progress: Progress | None) -> None:
    """Write the header, and then one tensor after another."""
    sizes: dict[str, int] = {}
    for name in stored.names():
        shape, dtype = stored.shape(name), DTYPES[stored.dtype(name)]
        sizes[name] = math.prod(shape) * dtype.itemsize
        kind = types[_WRITTEN_TYPES[stored.dtype(name)]]
        writer.add_tensor_info(name, shape, dtype, sizes[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done, total = 0, sum(sizes.values())
    for name, size in sizes.items():
        with np.errstate(invalid="ignore"):  # a NaN among the norms stays one
            array = stored.read(name)
        if array.shape != stored.shape(name) or array.dtype != DTYPES[stored.dtype(name)]:
            raise CheckpointError(
                f"{name} was announced as {stored.dtype(name)} {stored.shape(name)} and reads as "
                f"{array.dtype} {array.shape}; the source's reader is wrong."
            )
        # As bytes: the package does not know bfloat16.
        writer.write_tensor_data(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        done += size
        if progress:
            progress(done, total)
