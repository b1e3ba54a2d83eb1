"""L2.cache_rows: caches made of the rows of others, and caches that were shortened."""

from collections.abc import Sequence

import numpy as np

from gemma_hub.backend import Cache, SupportsCacheRows
from gemma_hub.inputs import ModelInputs
from gemma_hub_conformance.checkpoints import GQA
from gemma_hub_conformance.rows import row, tokens
from gemma_hub_conformance.spec import CaseContext, CaseSpec

CAPACITY = 31
ROWS = 3
Ids = tuple[int, ...]


def cases() -> list[CaseSpec]:
    """What rows of caches are moved and cut for: batches that change, beams, drafts."""
    each = {
        "joined": ("Rows of two caches of unequal lengths, in another order, one twice.", _joined),
        "copied": ("A cache and its copy go on with different tokens.", _copied),
        "beams": ("Rows that part and are dropped again and again.", _beams),
        "shortened": ("Each row forgets another number of tokens and goes on.", _shortened),
    }
    needs = frozenset({"cache", "cache_rows"})
    return [CaseSpec(f"L2.cache_rows.{name}", doc, run, needs) for name, (doc, run) in each.items()]


def _joined(context: CaseContext) -> None:
    model = _model(context)
    first = [tokens(size, 900 + size) for size in (7, 4, 2)]
    second = [tokens(size, 920 + size) for size in (3, 5, 7)]
    caches = [_fed(model, first)[1], _fed(model, second)[1]]
    chosen = [(1, 1), (0, 2), (1, 1)]
    held = [(first, second)[place][index] for place, index in chosen]
    cache = model.gather_rows(caches, chosen, CAPACITY)
    for number in range(3):
        held, cache = _gone_on(context, model, held, cache, 930 + 10 * number)


def _copied(context: CaseContext) -> None:
    model = _model(context)
    held = [[tokens(size, 940 + size) for size in (7, 6, 4)]] * 2
    cache = _fed(model, held[0])[1]
    copy = model.gather_rows([cache], [(0, index) for index in range(ROWS)], CAPACITY)
    caches = [cache, copy]
    for number, turn in enumerate((1, 0, 1, 0)):
        held[turn], caches[turn] = _gone_on(
            context, model, held[turn], caches[turn], 950 + 10 * number
        )


def _beams(context: CaseContext) -> None:
    model = _model(context)
    held = [tokens(7, 960 + index) for index in range(ROWS)]
    cache = _fed(model, held)[1]
    for number, parents in enumerate(((2, 2, 2), (1, 0, 1), (2, 2, 0), (0, 1, 2))):
        cache = model.gather_rows([cache], [(0, parent) for parent in parents], CAPACITY)
        held = [held[parent] for parent in parents]
        held, cache = _gone_on(context, model, held, cache, 1000 + 10 * number)


def _shortened(context: CaseContext) -> None:
    model = _model(context)
    held = [tokens(size, 980 + size) for size in (7, 5, 4)]
    cache = _fed(model, held)[1]
    for counts in ((1, 4, 0), (3, 0, 2)):
        cache = cache.shortened(np.array(counts))
        held = [ids[: len(ids) - count] for ids, count in zip(held, counts, strict=True)]
        held, cache = _gone_on(context, model, held, cache, 1050 + 10 * sum(counts))


def _model(context: CaseContext) -> SupportsCacheRows:
    model = context.cached_model(GQA)
    if not isinstance(model, SupportsCacheRows):
        context.fail("the backend claims 'cache_rows' and its model has no gather_rows")
    return model


def _gone_on(
    context: CaseContext,
    model: SupportsCacheRows,
    held: Sequence[Ids],
    cache: Cache,
    seed: int,
) -> tuple[list[Ids], Cache]:
    """`held`, the tokens in `cache`, with a new one; fail unless its logits are right."""
    new = [tokens(1, seed + index) for index in range(len(held))]
    held = [ids + more for ids, more in zip(held, new, strict=True)]
    logits, cache = _fed(model, new, cache)
    _judge_last(context, logits, held)
    return held, cache


def _fed(
    model: SupportsCacheRows, rows: Sequence[Ids], cache: Cache | None = None
) -> tuple[np.ndarray, Cache]:
    """(B, T, V) logits of left-padded `rows`, and the cache with them."""
    if cache is None:
        cache = model.init_cache(len(rows), CAPACITY)
    length = max(map(len, rows))
    ids = np.array([(0,) * (length - len(each)) + each for each in rows])
    mask = np.arange(length) >= length - np.array([[len(each)] for each in rows])
    inputs = ModelInputs.prepare(GQA.config, ids, mask, next_position=cache.next_position)
    outputs, cache = model.extend(inputs, cache)
    return outputs.to_numpy().logits, cache


def _judge_last(context: CaseContext, logits: np.ndarray, held: Sequence[Ids]) -> None:
    """Fail unless the (B, 1, V) logits are those of the last token of each row."""
    truth = context.oracle.truth(GQA, tuple(row(ids) for ids in held), context.dtype)
    last = np.cumsum([len(ids) for ids in held]) - 1
    witnesses = tuple(each[last] for each in truth.witness_logits)
    context.compare("logits", logits[:, -1], truth.logits[last], witnesses)
