"""L2.cache: prefill, chunks and single tokens all give the logits of the whole sequence."""

from functools import partial

import numpy as np

from gemma_hub.errors import CapacityError
from gemma_hub_conformance.cases.forward import LENGTH
from gemma_hub_conformance.checkpoints import CHECKPOINTS, GQA, DesignedCheckpoint
from gemma_hub_conformance.rows import Batch, Row, row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec, step

CAPACITY = 31
PROMPT = 7
ONE_BY_ONE = [PROMPT, *[1] * (LENGTH - PROMPT)]
CHUNKS = {
    "chunks_of_7_9_7": [7, 9, 7],
    "chunks_of_3": [*[3] * 7, 1, 1],
    "chunks_of_1": [1] * LENGTH,
}
NEEDS = frozenset({"cache"})


def prompts(padding: str) -> Batch:
    """Three rows of 23 slots whose first 7 are the prompt, padded in it on one side."""
    pads = (0, 3, 5)
    rows: list[Row] = []
    for pad in pads if padding != "no_padding" else (0, 0, 0):
        first = pad if padding == "left_padding" else 0
        prompt = range(first, first + PROMPT - pad)
        slots = (*prompt, *range(PROMPT, LENGTH))
        rows.append(Row(tokens(len(slots), 80 + pad + len(rows)), slots))
    return Batch.of(rows, LENGTH)


def cases() -> list[CaseSpec]:
    """Every way of feeding a cache, and its limits."""
    fed = {
        f"L2.cache.{name}.{padding}": (
            f"A prompt and then one token at a time on `{name}`: {padding.replace('_', ' ')}.",
            partial(_fed, checkpoint=CHECKPOINTS[name], padding=padding, chunks=ONE_BY_ONE),
        )
        for name in ("gqa", "mqa", "mha")
        for padding in ("no_padding", "left_padding", "right_padding")
        if name == "gqa" or padding == "left_padding"
    }
    chunked = {
        f"L2.cache.{how}": (
            f"The sequence in {how.replace('_', ' ')} tokens, left-padded.",
            partial(_fed, checkpoint=GQA, padding="left_padding", chunks=chunks),
        )
        for how, chunks in CHUNKS.items()
    }
    rest = {
        "positions": ("Positions of the caller, with a gap among the decoded ones.", _positions),
        "hidden_states": ("Hidden states of prefill and decode.", _hidden_states),
        "logits_to_keep": ("Prefill and decode that keep the last logits only.", _logits_to_keep),
        "idle_row": ("A row that pauses while the others go on, and resumes.", _idle_row),
        "capacity": ("The last slot is right; one token more is a CapacityError.", _capacity),
        "batch_size": ("More rows than the cache has are an error.", _batch_size),
        "two_sequences": ("A second, shorter sequence does not see the first.", _two_sequences),
        "interleaved": ("Two caches in turns do not see one another.", _interleaved),
    }
    named = {f"L2.cache.{name}": case for name, case in rest.items()}
    return [CaseSpec(id_, doc, run, NEEDS) for id_, (doc, run) in (fed | chunked | named).items()]


def _fed(
    context: CaseContext, checkpoint: DesignedCheckpoint, padding: str, chunks: list[int]
) -> None:
    batch = prompts(padding)
    logits = context.extend(checkpoint, batch, chunks, CAPACITY)
    context.judge_logits(logits, checkpoint, batch)


def _positions(context: CaseContext) -> None:
    gaps = (10, 13, 16)
    rows = [
        row(tokens(LENGTH, 90 + gap), 0, [*range(100, 100 + gap), *range(400 + gap, 400 + LENGTH)])
        for gap in gaps
    ]
    batch = Batch.of(rows, LENGTH)
    context.judge_logits(context.extend(GQA, batch, ONE_BY_ONE, CAPACITY), GQA, batch)


def _hidden_states(context: CaseContext) -> None:
    batch = prompts("left_padding")
    model = context.cached_model(GQA)
    cache = model.init_cache(len(batch.rows), CAPACITY)
    parts, start = [], 0
    for size in (PROMPT, 1, 1):
        inputs = step(GQA, batch, start, size, cache, output_hidden_states=True)
        outputs, cache = model.extend(inputs, cache)
        states = outputs.to_numpy().hidden_states
        count = GQA.config.num_hidden_layers + 1
        if states is None or len(states) != count:
            context.fail(
                f"extend returned {states and len(states)} hidden states; expected {count}"
            )
        parts.append(states)
        start += size
    seen = batch.mask[:, :start]
    truth = context.oracle.truth(GQA, batch.rows, context.dtype)
    kept = _first_tokens(batch, seen)
    context.compare_layers(
        [np.concatenate(states, axis=1)[seen] for states in zip(*parts, strict=True)],
        [state[kept] for state in truth.states],
        [[state[kept] for state in states] for states in truth.witness_states],
    )


def _first_tokens(batch: Batch, seen: np.ndarray) -> np.ndarray:
    """Of all tokens of all rows, one row after the other, whether each is among those `seen`."""
    counts = seen.sum(axis=1)
    return np.concatenate(
        [np.arange(len(each.ids)) < count for each, count in zip(batch.rows, counts, strict=True)]
    )


def _logits_to_keep(context: CaseContext) -> None:
    batch = prompts("left_padding")
    model = context.cached_model(GQA)
    cache = model.init_cache(len(batch.rows), CAPACITY)
    outputs, cache = model.extend(step(GQA, batch, 0, PROMPT, cache, logits_to_keep=1), cache)
    logits = outputs.to_numpy().logits
    expected = (len(batch.rows), 1, GQA.config.vocab_size)
    context.require(
        logits.shape == expected, f"the logits have shape {logits.shape}; expected {expected}"
    )
    second, _ = model.extend(step(GQA, batch, PROMPT, 1, cache, logits_to_keep=1), cache)
    found = np.concatenate([logits, second.to_numpy().logits], axis=1)
    truth = context.oracle.truth(GQA, batch.rows, context.dtype)
    first = np.cumsum([0, *(len(each.ids) for each in batch.rows)])[:-1]
    last = first + batch.mask[:, :PROMPT].sum(axis=1) - 1
    kept = np.stack([last, last + 1], axis=1).ravel()
    witnesses = tuple(each[kept] for each in truth.witness_logits)
    context.compare("logits", found.reshape(len(kept), -1), truth.logits[kept], witnesses)


def _idle_row(context: CaseContext) -> None:
    paused = ({9, 10, 11}, {8, 20}, set(range(12, 19)))
    slots = [tuple(slot for slot in range(LENGTH) if slot not in each) for each in paused]
    rows = [Row(tokens(len(each), 100 + len(each)), each) for each in slots]
    batch = Batch.of(rows, LENGTH)
    logits = context.extend(GQA, batch, ONE_BY_ONE, CAPACITY)
    context.require(bool(np.isfinite(logits).all()), "a paused row's logits are not finite")
    context.judge_logits(logits, GQA, batch)


def _capacity(context: CaseContext) -> None:
    model = context.cached_model(GQA)
    batch = Batch.of(prompts("left_padding").rows, LENGTH)
    cache = model.init_cache(len(batch.rows), LENGTH)
    parts, start = [], 0
    for size in ONE_BY_ONE:
        outputs, cache = model.extend(step(GQA, batch, start, size, cache), cache)
        parts.append(outputs.to_numpy().logits)
        start += size
    context.judge_logits(np.concatenate(parts, axis=1), GQA, batch)
    try:
        model.extend(step(GQA, batch, LENGTH - 1, 1, cache), cache)
    except CapacityError:
        return
    context.fail("a token past the cache's capacity was taken; expected a CapacityError")


def _batch_size(context: CaseContext) -> None:
    model = context.cached_model(GQA)
    batch = prompts("no_padding")
    cache = model.init_cache(len(batch.rows) - 1, CAPACITY)
    inputs = step(GQA, Batch.of(batch.rows, LENGTH), 0, PROMPT, model.init_cache(3, CAPACITY))
    try:
        model.extend(inputs, cache)
    except ValueError:
        return
    context.fail("three rows were taken into a cache of two; expected an InputError")


def _two_sequences(context: CaseContext) -> None:
    first, second = prompts("no_padding"), prompts("left_padding")
    for batch, length in ((first, LENGTH), (second, 10), (first, LENGTH)):
        rows = tuple(_cut(each, length) for each in batch.rows)
        part = Batch.of(rows, length)
        logits = context.extend(GQA, part, [PROMPT, *[1] * (length - PROMPT)], CAPACITY)
        context.judge_logits(logits, GQA, part)


def _cut(each: Row, length: int) -> Row:
    slots = tuple(slot for slot in each.slots if slot < length)
    return Row(each.ids[: len(slots)], slots)


def _interleaved(context: CaseContext) -> None:
    model = context.cached_model(GQA)
    batches = (prompts("no_padding"), prompts("left_padding"))
    caches = [model.init_cache(3, CAPACITY) for _ in batches]
    parts: list[list[np.ndarray]] = [[], []]
    start = 0
    for size in ONE_BY_ONE:
        for index, batch in enumerate(batches):
            inputs = step(GQA, batch, start, size, caches[index])
            outputs, caches[index] = model.extend(inputs, caches[index])
            parts[index].append(outputs.to_numpy().logits)
        start += size
    for batch, found in zip(batches, parts, strict=True):
        context.judge_logits(np.concatenate(found, axis=1), GQA, batch)
