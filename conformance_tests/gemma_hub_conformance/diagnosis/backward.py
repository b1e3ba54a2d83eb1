"""Which step of the backward pass is the first that is wrong? Read from the parameters' verdicts.

The backward pass goes from the loss to the embedding, and every parameter hangs on one place of
that way. The first wrong one in its order is right behind the error. If those that come next are
right all the same, what flows back is right, and only that gradient is made wrongly from it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from gemma_hub_conformance.checkpoints import DesignedCheckpoint

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
HEADS = ("lm_head", "score")

# One layer, from its output to its input: parameters on one line hang on the same place.
_STAGES = (
    ("mlp.down_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("post_attention_layernorm",),
    ("self_attn.o_proj",),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("input_layernorm",),
)

# By the parameters that are wrong in the first wrong stage, the backward step that made them so.
_STEPS = {
    ("mlp.gate_proj", "mlp.up_proj"): "feed-forward: projections",
    ("mlp.gate_proj",): "feed-forward: activation",
    ("mlp.up_proj",): "feed-forward: product with the gate",
    ("post_attention_layernorm",): "feed-forward: projections",
    ("self_attn.o_proj",): "norm or residual stream after the attention",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "attention: output",
    ("self_attn.q_proj", "self_attn.k_proj"): "attention: softmax, scores or rotary positions",
    ("self_attn.k_proj", "self_attn.v_proj"): "attention: heads that share keys and values",
    ("self_attn.q_proj",): "attention: scores or rotary positions of the queries",
    ("self_attn.k_proj",): "attention: scores or rotary positions of the keys",
    ("self_attn.v_proj",): "attention: values",
    ("input_layernorm",): "attention: projections",
}


@dataclass(frozen=True, slots=True)
class WrongStep:
    """Where the backward pass is wrong.

    Attributes:
        layer: whose backward it is; None if it is around the layers.
        where: the part, in the words of `branches`.
        first: the first wrong parameters in backward order.
        after: the last right ones before them; empty if nothing comes before.
        wrong: number of wrong parameters.
        alone: whether what flows on from there is right.
    """

    layer: int | None
    where: str
    first: tuple[str, ...]
    after: tuple[str, ...]
    wrong: int
    alone: bool

    @property
    def text(self) -> str:
        """For a reader, one line."""
        names = ", ".join(self.first)
        place = "around the layers" if self.layer is None else f"in layer {self.layer}"
        rest = (
            "What flows on from there is right, so it is this gradient by itself"
            if self.alone
            else f"{self.wrong} gradients are wrong, none of them before it"
        )
        after = f", right after {', '.join(self.after)}, which is right" if self.after else ""
        return (
            f"The backward pass is wrong {place}: {self.where}. Going backwards the first wrong "
            f"gradient is that of {names}{after}. {rest}."
        )


def find_step(checkpoint: DesignedCheckpoint, wrong: Collection[str]) -> WrongStep | None:
    """The first wrong step of the backward pass; None if no parameter is wrong.

    Args:
        checkpoint: the model, whose logits are right.
        wrong: names of the parameters whose gradients are wrong.
    """
    stages = [each for each in _backward_order(checkpoint) if each]
    bad = {name.rpartition(".")[0] for name in wrong}
    place = next((n for n, stage in enumerate(stages) if bad & set(stage)), None)
    if place is None:
        return None
    first = tuple(name for name in stages[place] if name in bad)
    following = stages[place + 1] if place + 1 < len(stages) else ()
    alone = not following or not bad & set(following)
    layer, where = _step(checkpoint, first, alone)
    names = [name for name in wrong if name.rpartition(".")[0] in first]
    after = stages[place - 1] if place else ()
    return WrongStep(layer, where, tuple(sorted(names)), tuple(after), len(wrong), alone)


def _backward_order(checkpoint: DesignedCheckpoint) -> Iterable[tuple[str, ...]]:
    names = {name.rpartition(".")[0] for name in checkpoint.weights().names()}
    yield tuple(name for name in HEADS if name in names)
    yield (FINAL_NORM,)
    for i in reversed(range(checkpoint.config.num_hidden_layers)):
        for stage in _STAGES:
            yield tuple(f"model.layers.{i}.{name}" for name in stage)
    yield (EMBEDDING,)


def _step(
    checkpoint: DesignedCheckpoint, first: tuple[str, ...], alone: bool
) -> tuple[int | None, str]:
    """Layer and part of the step that made `first` wrong."""
    if first[0] == EMBEDDING:
        return None, "embedding"
    if first[0] in HEADS:
        return None, "head" if alone else "loss"
    if first[0] == FINAL_NORM:
        return None, "final norm" if alone else "loss or head"
    layer = int(first[0].split(".")[2])
    kinds = tuple(name.split(".", 3)[3] for name in first)
    if alone:
        return layer, _own(kinds[0])
    if kinds[0] == "mlp.down_proj":
        # The layer after this one passed it on; the gradients inside of that one are right.
        if layer + 1 == checkpoint.config.num_hidden_layers:
            return None, "final norm"
        return layer + 1, "norm or residual stream before the attention"
    return layer, _STEPS.get(kinds, "attention")


def _own(kind: str) -> str:
    """The part that a parameter is in."""
    if kind.endswith("layernorm"):
        return "norms"
    branch, _, name = kind.partition(".")
    return f"{'attention' if branch == 'self_attn' else 'feed-forward'}: {name}"
