"""A tokenizer.model as a tokenizer of the `tokenizers` package, where that gives the same ids.

BPE in sentencepiece merges the two neighbours whose piece has the best score, the leftmost first.
In `tokenizers` it merges the pair of the best rank. With a rank for every way to split a piece,
in the order of the pieces' scores, the two are the same wherever no two pieces share a score and
every character of a piece is a piece: sentencepiece merges characters that are none, too.
Nothing else is converted: unigram models sum scores in float32 in the one package and in float64
in the other, so that near ties fall differently.
"""

import gc
import hashlib
import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import tokenizers

from gemma_hub import cache
from gemma_hub.tokenizers.json_file import is_json, with_marks
from gemma_hub.tokenizers.model_file import ModelFile, ModelType, PieceType
from gemma_hub.tokenizers.sentencepiece import SentencePieceEngine, open_model
from gemma_hub.tokenizers.vocabulary import SPACE, Vocabulary

_CACHE_VERSION = 2
"""Counts up when what `converted` makes of a file changes."""


def converts_exactly(file: ModelFile, scores: Sequence[float]) -> bool:
    """Whether `converted` gives a tokenizer with the ids of sentencepiece."""
    kinds = {kind for _, kind in file.marked.values()}
    mergeable = [score for i, score in enumerate(scores) if i not in file.marked]
    return (
        file.model_type == ModelType.BPE
        and file.keeps_text
        and not file.adds_prefix
        and not file.removes_spaces
        and PieceType.UNUSED not in kinds
        and file.spells_out
        and math.isfinite(sum(mergeable))
        and len(set(mergeable)) == len(mergeable)
    )


def converted(
    content: bytes, file: ModelFile, engine: SentencePieceEngine, vocabulary: Vocabulary
) -> tokenizers.Tokenizer:
    """The tokenizer of a model that `converts_exactly`; kept on disk for the next time.

    Without post-processor: it adds no tokens around a text.
    """
    digest = hashlib.sha256(content).hexdigest()
    cached = _read_cache(digest)
    if cached is not None:
        return cached
    with _no_collection():
        made = _convert(file, engine, vocabulary)
        _write_cache(digest, made)
    return made


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collection: half a million tuples are made, and none of them is garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def json_content(content: bytes) -> bytes | None:
    """A vocabulary file as a tokenizer.json; None where there is none with the same ids."""
    if is_json(content):
        return content
    engine, vocabulary, file = open_model(content)
    if not converts_exactly(file, engine.scores()):
        return None
    return converted(content, file, engine, vocabulary).to_str().encode("utf-8")


def _convert(
    file: ModelFile, engine: SentencePieceEngine, vocabulary: Vocabulary
) -> tokenizers.Tokenizer:
    pieces, scores = engine.pieces(), engine.scores()
    ordinary = [i for i in range(file.size) if i not in file.marked]
    ranked = [pieces[i] for i in sorted(ordinary, key=scores.__getitem__, reverse=True)]
    model = tokenizers.models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=list(_merges(ranked)),
        unk_token=pieces[vocabulary.unk],
        fuse_unk=True,
        byte_fallback=file.byte_fallback,
    )
    made = with_marks(model, vocabulary)
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace(SPACE, " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    return made


def _merges(ranked: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every way to make a piece of two others, the pieces of the best score first."""
    known = frozenset(ranked)
    for piece in ranked:
        for cut in range(1, len(piece)):
            left = piece[:cut]
            if left in known:
                right = piece[cut:]
                if right in known:
                    yield left, right


# -- the cache -------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where converted vocabularies are kept."""
    return cache.cache_folder("tokenizers")


def _cache_path(digest: str) -> Path:
    return cache_folder() / f"{digest}.{_CACHE_VERSION}.{tokenizers.__version__}"


def _check_sum(digest: str, text: bytes) -> bytes:
    return hashlib.sha256(digest.encode() + text).hexdigest().encode()


def _read_cache(digest: str) -> tokenizers.Tokenizer | None:
    """What is in the cache; None for nothing, and for a file that is damaged."""
    try:
        found, _, text = _cache_path(digest).read_bytes().partition(b"\n")
    except (OSError, RuntimeError):  # a user without a home folder is a RuntimeError
        return None
    if found != _check_sum(digest, text):
        return None
    return tokenizers.Tokenizer.from_buffer(text)


def _write_cache(digest: str, made: tokenizers.Tokenizer) -> None:
    """Keep a tokenizer; without a word where there is no place to write.

    A file is a checksum, a line end, and a tokenizer.json.
    """
    try:
        path = _cache_path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
    text = made.to_str().encode("utf-8")
    try:
        partial.write_bytes(_check_sum(digest, text) + b"\n" + text)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
