"""L4.greedy_steps: several greedy steps of decoding in one call, by the backend itself."""

from collections.abc import Mapping, Sequence

import numpy as np

from gemma_hub.backend import Cache, Model, SupportsGreedySteps, TaskSpec
from gemma_hub.errors import CapacityError
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import ArrayWeights
from gemma_hub_conformance.cases.generation import DRAWS, MODEL, judge_greedy
from gemma_hub_conformance.rows import row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec

LENGTHS = (6, 3, 7)
CAPACITY = 31
NEW_TOKENS = 12
UNUSED_STOPS = 10
"""Stop ids that no row chooses, before the one that a row does."""
ALL = np.ones(len(LENGTHS), np.bool_)
Rows = Sequence[tuple[int, ...]]


def cases() -> list[CaseSpec]:
    """What the core hands out as if it had chosen each token itself."""
    each = {
        "tokens": ("Every token is the best after those before it, or tied with it.", _tokens),
        "ties": ("Of equal logits the lowest id is chosen.", _ties),
        "stops": ("A call ends with a stop id, and the other rows go on without that row.", _stops),
        "book": ("The cache afterwards is that of plain steps, and extend goes on from it.", _book),
        "bad_logits": ("A step whose logits no token can be chosen from is not taken.", _bad),
        "capacity": ("More steps than the cache has room for are a CapacityError.", _capacity),
    }
    needs = frozenset({"cache", "greedy_steps"})
    return [
        CaseSpec(f"L4.greedy_steps.{name}", doc, run, needs) for name, (doc, run) in each.items()
    ]


def _tokens(context: CaseContext) -> None:
    model, prompts = _model(context), _prompts(0)
    ids, cache = _fed(model, prompts)
    found = [ids[:, None]]
    for size in (1, 4, NEW_TOKENS - 6):
        more, cache = _stepped(context, model, found[-1][:, -1], ALL, cache, size)
        found.append(more)
    for number, new in enumerate(np.concatenate(found, axis=1)):
        judge_greedy(context, number, prompts[number], new.tolist())


def _ties(context: CaseContext) -> None:
    head = np.zeros_like(MODEL.weights().read("lm_head.weight"))
    model = _changed(context, {"lm_head.weight": head})
    ids, cache = _fed(model, _prompts(0))
    found, _ = _stepped(context, model, ids, ALL, cache, 3)
    context.require(
        not found.any(), f"the chosen ids are {found.tolist()}; all logits are 0, so expected 0"
    )


def _stops(context: CaseContext) -> None:
    model = _model(context)
    for draw in range(DRAWS):
        prompts = _prompts(draw)
        ids, cache = _fed(model, prompts)
        free, _ = _stepped(context, model, ids, ALL, cache, NEW_TOKENS - 1)
        if _first_new(free) is not None:
            break
    else:
        context.fail(f"for {DRAWS} draws of prompts no row came to a token that none had before")
    step, stop = _first_new(free) or (0, 0)
    unused = np.setdiff1d(np.arange(12, MODEL.config.vocab_size), free)[:UNUSED_STOPS]
    ids, cache = _fed(model, prompts)
    stops = (*unused.tolist(), stop)
    found, cache = _stepped(context, model, ids, ALL, cache, NEW_TOKENS, stops)
    context.require(
        np.array_equal(found, free[:, : step + 1]),
        f"the tokens are {found.tolist()}; without stop ids they were {free.tolist()}, and {stop} "
        f"is one: expected the first {step + 1} of each row",
    )
    goes_on = found[:, -1] != stop
    more, _ = _stepped(context, model, np.where(goes_on, found[:, -1], 0), goes_on, cache, 4)
    for number in np.flatnonzero(goes_on).tolist():
        new = np.concatenate([ids[number, None], found[number], more[number]])
        judge_greedy(context, number, prompts[number], new.tolist())


def _first_new(free: np.ndarray) -> tuple[int, int] | None:
    """The first step from 3 on that gives some row a token which no row had, and the token."""
    for step in range(3, free.shape[1] - 1):
        fresh = np.setdiff1d(free[:, step], free[:, :step])
        if len(fresh):
            return step, int(fresh[0])
    return None


def _book(context: CaseContext) -> None:
    model, prompts = _model(context), _prompts(0)
    ids, before = _fed(model, prompts)
    goes_on, size = np.array([True, False, True]), 5
    found, cache = _stepped(context, model, ids, goes_on, before, size)
    valid = before.valid.copy()
    valid[:, before.length : before.length + size] = goes_on[:, None]
    context.require(
        cache.length == before.length + size
        and np.array_equal(cache.valid, valid)
        and np.array_equal(cache.next_position, before.next_position + size * goes_on),
        f"after {size} steps the cache says length {cache.length}, next_position "
        f"{cache.next_position.tolist()} and {cache.valid.sum(axis=1).tolist()} valid slots; "
        f"expected {before.length + size}, {(before.next_position + size * goes_on).tolist()} "
        f"and {valid.sum(axis=1).tolist()}, those of plain steps",
    )
    fed = np.concatenate([ids[:, None], found[:, :-1]], axis=1)
    held = [
        (*prompt, *(fed[number].tolist() if goes_on[number] else ()), *tokens(1, 1390 + number))
        for number, prompt in enumerate(prompts)
    ]
    logits, _ = _extended(model, np.array([[each[-1]] for each in held]), ALL[:, None], cache)
    truth = context.oracle.truth(MODEL, tuple(row(each) for each in held), context.dtype)
    last = np.cumsum([len(each) for each in held]) - 1
    witnesses = tuple(each[last] for each in truth.witness_logits)
    context.compare("logits", logits, truth.logits[last], witnesses)


def _bad(context: CaseContext) -> None:
    prompts = _prompts(0)
    ids, cache = _fed(_model(context), prompts)
    free, _ = _stepped(context, _model(context), ids, ALL, cache, NEW_TOKENS - 1)
    # 0 stands in the padding, where NaN would get into every sum with a weight of 0.
    known = np.concatenate([[0], ids, *(np.array(prompt) for prompt in prompts)])
    unknown = (~np.isin(free[:, 1:], known)).any(axis=0)
    step = 1 + int(unknown.argmax())
    name = "model.embed_tokens.weight"
    embedding = MODEL.weights().read(name).copy()
    embedding[np.setdiff1d(free[:, step], known)] = np.nan
    step = int(np.isnan(embedding[free]).any(axis=(0, 2)).argmax())  # the first that chooses one
    model = _changed(context, {name: embedding})
    ids, before = _fed(model, prompts)
    found, cache = _stepped(context, model, ids, ALL, before, NEW_TOKENS, ())
    context.require(
        np.array_equal(found, free[:, : step + 1]) and cache.length == before.length + step + 1,
        f"the tokens are {found.tolist()}, of a cache of length {cache.length}; the embedding of "
        f"one of step {step} is NaN: expected {free[:, : step + 1].tolist()} and "
        f"{before.length + step + 1}",
    )
    last = found[:, -1]
    for _ in range(2):
        none, cache = model.greedy_steps(last, ALL, cache, 3, ())
        context.require(none.shape == (len(ALL), 0), f"then {none.tolist()}; expected no step")
    logits, _ = _extended(model, last[:, None], ALL[:, None], cache)
    is_bad = ~np.isfinite(logits.max(axis=1))
    expected = np.isnan(embedding[last]).any(axis=1)
    context.require(
        np.array_equal(is_bad, expected),
        f"extend then gives no largest logit in the rows {np.flatnonzero(is_bad).tolist()}; "
        f"expected {np.flatnonzero(expected).tolist()}",
    )


def _capacity(context: CaseContext) -> None:
    model = _model(context)
    ids, cache = _fed(model, _prompts(0), max(LENGTHS) + 4)
    try:
        model.greedy_steps(ids, ALL, cache, 5, ())
    except CapacityError:
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        context.fail(f"5 steps in 4 free slots are {type(error).__name__}, not a CapacityError")
    context.fail("5 steps in 4 free slots are accepted; expected a CapacityError")


def _prompts(draw: int) -> Rows:
    first = 1300 + len(LENGTHS) * draw
    return tuple(tokens(length, first + number) for number, length in enumerate(LENGTHS))


def _model(context: CaseContext) -> SupportsGreedySteps:
    return _with_steps(context, context.model(MODEL))


def _changed(context: CaseContext, arrays: Mapping[str, np.ndarray]) -> SupportsGreedySteps:
    """The model with other weights of some names."""
    weights = MODEL.weights(context.dtype)
    known = {name: weights.read(name) for name in weights.names()}
    options = context.subject.options(context.dtype)
    model = context.subject.backend.build(
        MODEL.config, TaskSpec(MODEL.task), ArrayWeights({**known, **arrays}), options
    )
    return _with_steps(context, model)


def _with_steps(context: CaseContext, model: Model) -> SupportsGreedySteps:
    if not isinstance(model, SupportsGreedySteps):
        context.fail("the backend claims 'greedy_steps' and its model has no greedy_steps")
    return model


def _fed(
    model: SupportsGreedySteps, rows: Rows, capacity: int = CAPACITY
) -> tuple[np.ndarray, Cache]:
    """(B,) the best tokens after left-padded `rows`, and the cache with the rows."""
    length = max(map(len, rows))
    ids = np.array([(0,) * (length - len(each)) + tuple(each) for each in rows])
    mask = np.arange(length) >= length - np.array([[len(each)] for each in rows])
    logits, cache = _extended(model, ids, mask, model.init_cache(len(rows), capacity))
    return logits.argmax(axis=1), cache


def _extended(
    model: SupportsGreedySteps, ids: np.ndarray, mask: np.ndarray, cache: Cache
) -> tuple[np.ndarray, Cache]:
    """(B, V) logits of the last of (B, T) tokens, and the cache with them."""
    inputs = ModelInputs.prepare(
        MODEL.config, ids, mask, logits_to_keep=1, next_position=cache.next_position
    )
    outputs, cache = model.extend(inputs, cache)
    logits: np.ndarray = outputs.to_numpy().logits
    return logits[:, -1], cache


def _stepped(
    context: CaseContext,
    model: SupportsGreedySteps,
    ids: np.ndarray,
    running: np.ndarray,
    cache: Cache,
    count: int,
    stops: Sequence[int] | None = None,
) -> tuple[np.ndarray, Cache]:
    """(B, n) tokens of one call, or of more where a backend takes fewer steps in one.

    n is `count`; with `stops` the last step may be one with a stop id, or one before bad logits.
    """
    parts: list[np.ndarray] = []
    left, fed = count, ids
    while left:
        found, cache = model.greedy_steps(fed, running, cache, left, stops or ())
        fewest = 1 if stops is None else 0
        context.require(
            found.dtype == np.int64
            and len(found) == len(ids)
            and fewest <= found.shape[1] <= left
            and bool(np.all((found >= 0) == running[:, None]) and np.all(found >= -1)),
            f"of {left} steps came {found.dtype} {found.tolist()}; expected int64 of shape "
            f"({len(ids)}, {fewest} to {left}), and -1 in rows that do not run",
        )
        parts.append(found)
        left -= found.shape[1]
        if not found.shape[1] or np.isin(found[running, -1], stops or ()).any():
            break
        fed = np.where(running, found[:, -1], ids)
    return np.concatenate(parts, axis=1), cache
