"""Which layer is the first that is wrong? Found from outside, by models of the first layers only.

A model of the first k layers is a Gemma too, and a backend can run it without a hook. The first k
at which it is wrong has the wrong layer as its last.
"""

from dataclasses import dataclass, replace

from gemma_hub_conformance.diagnosis.probes import Prober, hollow, prefix
from gemma_hub_conformance.diagnosis.watching import Seen


@dataclass(frozen=True, slots=True)
class LayerFinding:
    """The outcome of the bisection.

    Attributes:
        layer: the first wrong layer; None if a model whose layers add nothing is wrong already.
        runs: models that were run, at most ceil(log2(layers)) + 2.
        tried: {number of layers: is that model wrong?}; 0 is one whose layers add nothing.
    """

    layer: int | None
    runs: int
    tried: dict[int, bool]


def find_layer(prober: Prober, seen: Seen) -> LayerFinding | None:
    """The first wrong layer for an input; None if the whole model is right there.

    Both models that decide are run: the one that ends with the layer, which is wrong, and the one
    that ends before it, which is right.
    """
    before = prober.runs
    layers = seen.checkpoint.config.num_hidden_layers
    tried: dict[int, bool] = {}

    def fails(count: int) -> bool:
        part = prefix(seen.checkpoint, count) if count else hollow(seen.checkpoint)
        tried[count] = prober.fails(replace(seen, checkpoint=part))
        return tried[count]

    if not fails(layers):
        return None
    right, wrong = 0, layers
    while wrong - right > 1:
        middle = (right + wrong) // 2
        if fails(middle):
            wrong = middle
        else:
            right = middle
    outside = right == 0 and fails(0)
    return LayerFinding(None if outside else wrong - 1, prober.runs - before, tried)
