"""Where a failing case is wrong: by its inputs if their logits are, else by what it compared."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from gemma_hub_conformance.diagnosis.backward import find_step
from gemma_hub_conformance.diagnosis.bisection import find_layer
from gemma_hub_conformance.diagnosis.branches import find_place_in_layer, find_place_outside
from gemma_hub_conformance.diagnosis.probes import Prober
from gemma_hub_conformance.diagnosis.recording import Observation
from gemma_hub_conformance.diagnosis.watching import GRADIENTS, Seen

_INPUTS_TRIED = 12  # a case has up to 18; the first that fails is taken
_INDEXED = re.compile(r"(attentions|hidden_states)\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Place:
    """Where it is wrong.

    Attributes:
        text: for a reader.
        layer: the first wrong layer, if it is in a layer.
        where: which part, in the words of `branches`; empty if nothing is known.
        seen: an input that fails by itself; None if none does.
        fails: tells of another input whether it fails as `seen` does.
        in_logits: whether it is the logits of `seen` that are wrong.
    """

    text: str
    layer: int | None = None
    where: str = ""
    seen: Seen | None = None
    fails: Callable[[Seen], bool] | None = None
    in_logits: bool = False


def find_place(prober: Prober, first: Observation) -> Place:
    """Where the failure that `first` saw comes from."""
    tried = first.inputs[:_INPUTS_TRIED]
    for seen in tried:
        place = _in_logits(prober, seen)
        if place is not None:
            return place
    for find in (_in_gradients, _in_indexed, _in_loss, _in_tokens):
        place = find(prober, first)
        if place is not None:
            right = " The logits of its inputs are right." if tried else ""
            return replace(place, text=place.text + right)
    return _nowhere(first)


def _nowhere(first: Observation) -> Place:
    """Nothing that was tried is wrong by itself."""
    said = f"{first.requirement.rstrip('.')}. " if first.requirement else ""
    if first.wrong and 0 < len(first.inputs) <= _INPUTS_TRIED:
        return Place(
            f"{said}Every input of this case gives right logits in a model of its own. So "
            "something is kept from one call or model to the next.",
            None,
            "state between calls",
        )
    return Place(f"{said}No input of this case fails on its logits, so no layer is named.")


def _in_logits(prober: Prober, seen: Seen) -> Place | None:
    """The first wrong layer, if the logits of `seen` are wrong."""
    found = find_layer(prober, seen)
    if found is None:
        return None
    runs = f"({found.runs} models were run)"
    if found.layer is None:
        where = find_place_outside(prober, seen)
        text = f"Wrong before or after the layers: {where} {runs}."
    else:
        where = find_place_in_layer(prober, seen, found.layer)
        text = f"First wrong in layer {found.layer}: {where} {runs}."
    return Place(text + _call_text(prober, seen), found.layer, where, seen, prober.fails, True)


def _call_text(prober: Prober, seen: Seen) -> str:
    """Of a cached run, the first wrong call, and whether the cache has a part in it."""
    call = None if seen.chunks is None else prober.first_wrong_call(seen)
    if seen.chunks is None or call is None:
        return ""
    size, start = seen.chunks[call], sum(seen.chunks[:call])
    alone = prober.fails(replace(seen, chunks=None))
    how = "Without a cache it is wrong too." if alone else "Without a cache it is right."
    return f" Call {call} of the cache, slots {start} to {start + size - 1}, is the first. {how}"


def _in_gradients(prober: Prober, first: Observation) -> Place | None:
    """The first wrong step of the backward pass."""
    for seen in first.inputs[:_INPUTS_TRIED]:
        if GRADIENTS not in seen.asked:
            continue
        names = set(seen.checkpoint.weights().names())
        wrong = names.intersection(first.wrong)

        def fails(other: Seen) -> bool:
            return bool(prober.wrong_gradients(other))

        again = prober.wrong_gradients(seen) or ()
        step = find_step(seen.checkpoint, wrong or again)
        if step is not None:
            shown = seen if again else None
            return Place(step.text, step.layer, step.where, shown, fails)
    return None


def _in_indexed(prober: Prober, first: Observation) -> Place | None:
    """The first of the attentions or hidden states that is wrong where the logits are right."""
    wrong = [found for name in first.wrong if (found := _INDEXED.match(name))]
    if not wrong:
        return None
    what, index = wrong[0][1], min(int(each[2]) for each in wrong)
    count = len({each[2] for each in wrong})
    compared = {found[2] for name in first.residuals if (found := _INDEXED.match(name))}
    text = (
        f"{what}[{index}] is the first that is wrong, {count} of {len(compared)} are. It is in "
        "what is returned and not in what is computed."
    )
    if what == "attentions":
        return Place(text, index, "attention: the probabilities that are returned")
    if index == 0:
        return Place(text, None, "embedding")
    return Place(text, index - 1, "residual stream: the states that are returned")


def _in_loss(_: Prober, first: Observation) -> Place | None:
    """A loss, the logits being right."""
    if not any(name.rstrip("'") in ("losses", "loss") for name in first.wrong):
        return None
    return Place("It is the loss that is computed from the logits.", None, "loss")


_CHOSEN = re.compile(r"row (\d+), new token (\d+) is (\d+)")
_TOKENS = re.compile(r"row (\d+) is \(([\d, ]*)\) \((\w+)\); expected \(([\d, ]*)\) \((\w+)\)")


def _in_tokens(_: Prober, first: Observation) -> Place | None:
    """A generated token, the logits of all that was generated being right."""
    if not first.case.startswith("L4."):
        return None
    text = (
        f"{first_wrong_token(first.requirement)} The rows that were generated, fed again as they "
        "are, give the right logits, with the cache and without it. So it is the loop, the "
        "choice of the token, or something that is kept between calls."
    )
    return Place(text.lstrip(), None, "generation")


def first_wrong_token(message: str) -> str:
    """A sentence about the first wrong token, from the message of a case; the message if none."""
    if found := _CHOSEN.search(message):
        return f"The first wrong token is new token {found[2]} of row {found[1]}, {found[3]}."
    found = _TOKENS.search(message)
    if found is None:
        return message
    got, expected = (
        [int(each) for each in found[group].split(",") if each.strip()] for group in (2, 4)
    )
    for number, (one, other) in enumerate(zip(got, expected, strict=False)):
        if one != other:
            return (
                f"The first wrong token is new token {number} of row {found[1]}: {one} in place "
                f"of {other}."
            )
    return (
        f"All tokens of row {found[1]} are right as far as they go, but it ended by {found[3]!r} "
        f"after {len(got)}; expected {found[5]!r} after {len(expected)}."
    )
