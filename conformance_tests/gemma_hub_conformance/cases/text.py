"""L7.text: texts in and out, by the core's tokenizer and tasks over the backend's model.

The tokenizers are the core's and have tests of their own. What a backend can get wrong is what
texts bring with them and random ids do not: special ids inside of a row, <bos> in front of each,
repeated ids, ids past 255, and padding on either side.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_hub.generation.sampling import log_probabilities
from gemma_hub.generation.settings import GenerationSettings
from gemma_hub.plugins.info import LoadedBackend
from gemma_hub.plugins.spec import BackendSpec
from gemma_hub.tasks.causal_lm import CausalLM
from gemma_hub.tokenizers import GemmaTokenizerFast
from gemma_hub.tokenizers.settings import Side
from gemma_hub_conformance.cases.sampling import judge_samples
from gemma_hub_conformance.checkpoints import CHECKPOINTS, DesignedCheckpoint
from gemma_hub_conformance.rows import row
from gemma_hub_conformance.spec import CaseContext, CaseSpec

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_LETTERS = "▁abcdefghijklmnopqrstuvwxyzO\n"
_MERGES = ("th", "the", "▁the", "in", "ing", "on", "▁a", "er", "ou", "or", "▁k", "es")
"""Pieces of several letters; each is a piece or a letter followed by a letter, or the reverse."""

TEXTS = ("Once upon a time there was a king", "the youngest son went out", "a fortune")
MARKED = (
    "<start_of_turn>user\nthe king<end_of_turn>\n",
    "a son<eos><bos>one more<pad>son",
    "the<pad><pad>king<eos>",
)
SPELLED = ("漢字\u3000\u2000 a", "Ünïcödé", "🦙🦙 the end")
"""Texts of characters that are no pieces; some are spelled by one byte piece twice in a row."""
LENGTH = 25
"""Slots of every batch: what the longest of `TEXTS` takes, so that a backend compiles once."""


def cases() -> list[CaseSpec]:
    """Plain, marked and spelled-out texts, and texts that come out."""
    checks = {
        "bos": ("Log-probabilities of texts, with <bos> once before each.", _bos),
        "padded": ("Texts of unequal length in one batch, padded on the left or right.", _padded),
        "special": (
            "Special tokens in a text are one token each, and seen as any other.",
            _special,
        ),
        "bytes": ("Characters without a piece are spelled by bytes, and come back.", _bytes),
        "generated": ("Texts sampled in one batch, and what their tokens say.", _generated),
        "streams": ("Two streams that are read in turn do not mix.", _streams),
    }
    return [CaseSpec(f"L7.text.{name}", doc, run) for name, (doc, run) in checks.items()]


# -- the model and its vocabulary ------------------------------------------------------------------


@functools.cache
def tokenizer() -> GemmaTokenizerFast:
    """A vocabulary of Gemma's kind with 303 pieces: bytes, letters and a few words."""
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *_LETTERS, *_MERGES]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    marks = [
        {"id": vocabulary[mark], "content": mark, "special": True, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for mark in _SPECIAL
    ]  # fmt: skip
    space = {"pattern": {"String": " "}, "content": "▁"}
    back = {"pattern": {"String": "▁"}, "content": " "}
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": vocabulary,
        "merges": [_halves(piece, vocabulary) for piece in _MERGES],
    }
    decoders = [{"type": "Replace", **back}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    content = {
        "version": "1.0",
        "added_tokens": marks,
        "normalizer": {"type": "Replace", **space},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }
    return GemmaTokenizerFast(json.dumps(content).encode())


def _halves(piece: str, vocabulary: dict[str, int]) -> list[str]:
    cuts = [(piece[:at], piece[at:]) for at in range(len(piece) - 1, 0, -1)]
    return list(next(cut for cut in cuts if all(half in vocabulary for half in cut)))


@functools.cache
def checkpoint() -> DesignedCheckpoint:
    """One layer over that vocabulary; its head is not tied, so that its texts wander."""
    words = tokenizer()
    config = dataclasses.replace(
        CHECKPOINTS["untied"].config,
        vocab_size=words.vocab_size,
        num_hidden_layers=1,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    return DesignedCheckpoint("text", "a vocabulary of more than 256 pieces", config)


def _lm(context: CaseContext) -> CausalLM:
    """What a user has: the backend's model with the tokenizer."""
    subject = context.subject
    spec = BackendSpec(
        name=subject.name,
        api_version="1.0",
        factory="",
        features=subject.features,
        tasks=subject.tasks,
        dtypes=subject.dtypes,
    )
    backend = LoadedBackend(
        name=subject.name,
        spec=spec,
        distribution=subject.distribution,
        version=subject.version,
        backend=subject.backend,
    )
    return CausalLM(
        context.model(checkpoint()),
        checkpoint().config,
        backend=backend,
        dtype=context.dtype,
        tokenizer=tokenizer(),
    )


# -- texts in --------------------------------------------------------------------------------------


def _bos(context: CaseContext) -> None:
    bos = tokenizer().bos_token_id
    for text, score in zip(TEXTS, _lm(context).score(TEXTS), strict=True):
        ids = tokenizer().encode(text)
        context.require(
            ids[0] == bos and ids.count(bos) == 1 and score.token_ids == tuple(ids[1:]),
            f"{text!r} was scored as {score.token_ids}; expected {ids[1:]} after one <bos>",
        )
        truth = context.oracle.truth(checkpoint(), [row(ids)], context.dtype)
        reference, *witnesses = (
            log_probabilities(logits[:-1], np.asarray(ids[1:]))[None]
            for logits in (truth.logits, *truth.witness_logits)
        )
        found = np.array([score.logprobs])
        context.compare(f"log-probabilities of {text!r}", found, reference, tuple(witnesses))


def _padded(context: CaseContext) -> None:
    _judge(context, TEXTS, "left")
    _judge(context, TEXTS, "right")


def _special(context: CaseContext) -> None:
    for text in MARKED:
        ids = tokenizer().encode(text)
        for mark in _SPECIAL:
            count = text.count(mark) + (mark == "<bos>")
            context.require(
                ids.count(tokenizer().token_to_id(mark)) == count,
                f"{text!r} became {ids}; expected {mark} as one token, {count} times",
            )
    _judge(context, MARKED, "left")


def _bytes(context: CaseContext) -> None:
    for text in SPELLED:
        ids = tokenizer().encode(text)
        back = tokenizer().decode(ids, skip_special_tokens=True)
        context.require(back == text, f"{text!r} became {ids}, and {back!r} again")
    _judge(context, SPELLED, "left")


def _judge(context: CaseContext, texts: Sequence[str], side: Side) -> None:
    """Fail unless every row of the batch has the logits that its text has alone."""
    batch = tokenizer()(
        list(texts),
        padding="max_length",
        max_length=LENGTH,
        padding_side=side,
        return_tensors="np",
    )
    logits = _lm(context).forward(**batch).to_numpy().logits
    rows = [row(tokenizer().encode(text)) for text in texts]
    truth = context.oracle.truth(checkpoint(), rows, context.dtype)
    mask = batch["attention_mask"].astype(np.bool_)
    context.require_shape("the logits", logits, (*mask.shape, truth.logits.shape[-1]))
    context.compare(
        f"logits with padding on the {side}", logits[mask], truth.logits, truth.witness_logits
    )


# -- texts out -------------------------------------------------------------------------------------


def _settings() -> dict[str, Any]:
    return {"max_new_tokens": 9, "temperature": 1.1, "seed": 17, "eos_token_id": ()}


def _generated(context: CaseContext) -> None:
    found = _lm(context).generate(TEXTS, **_settings())
    prompts = [tokenizer().encode(text) for text in TEXTS]
    for text, prompt, each in zip(TEXTS, prompts, found, strict=True):
        context.require(
            each.prompt_token_ids == tuple(prompt),
            f"{text!r} was fed as {each.prompt_token_ids}; expected {prompt}",
        )
        _require_text(context, each.text, each.token_ids)
    new = [each.token_ids for each in found]
    settings = GenerationSettings(**_settings())
    judge_samples(context, checkpoint(), prompts, new, settings)


def _streams(context: CaseContext) -> None:
    lm = _lm(context)
    texts = (TEXTS[1], TEXTS[1].replace("son", "one"))  # of as many tokens: caches of one shape
    streams = [lm.stream(text, **_settings()) for text in texts]
    in_turn = zip(*streams, strict=True)
    for text, pieces in zip(texts, zip(*in_turn, strict=True), strict=True):
        new = [piece.token_id for piece in pieces if piece.token_id is not None]
        _require_text(context, "".join(piece.text for piece in pieces), new)
        settings = GenerationSettings(**_settings())
        judge_samples(context, checkpoint(), [tokenizer().encode(text)], [new], settings)


def _require_text(context: CaseContext, text: str, ids: Sequence[int]) -> None:
    expected = tokenizer().decode(list(ids), skip_special_tokens=True)
    context.require(text == expected, f"{list(ids)} gave {text!r}; expected {expected!r}")
