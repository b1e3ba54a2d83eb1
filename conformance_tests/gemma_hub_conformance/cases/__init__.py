"""The cases, by the behaviour that they check."""

from gemma_hub_conformance.cases import (
    attentions,
    cache,
    cache_rows,
    combinations,
    contract,
    forward,
    generation,
    gradients,
    greedy_steps,
    head_contract,
    heads,
    honesty,
    label_combinations,
    laws,
    lengths,
    liveness,
    losses,
    masks,
    narrow,
    outputs,
    package,
    positions,
    precision,
    sampling,
    storage,
    text,
)
from gemma_hub_conformance.spec import CaseSpec


def all_cases() -> dict[str, CaseSpec]:
    """Every case by its id, in the order in which they run."""
    first = (package, contract, forward, honesty, positions, masks, outputs, liveness, laws)
    causal_lm = (
        *first,
        lengths,
        precision,
        cache,
        cache_rows,
        narrow,
        generation,
        greedy_steps,
        sampling,
        combinations,
    )
    training = (head_contract, heads, losses, attentions, gradients, label_combinations)
    modules = (*causal_lm, *training, storage, text)
    cases = [case for module in modules for case in module.cases()]
    by_id = {case.id: case for case in cases}
    if len(by_id) != len(cases):
        raise RuntimeError("Two cases have one id.")
    return by_id
