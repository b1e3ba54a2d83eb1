"""The designed checkpoints with a head other than the causal LM's, and the one without any.

One layer is enough: the decoder has the cases of level 2, and a compiled backend compiles each
head, loss and gradient anew.
"""

import dataclasses
from types import MappingProxyType

from gemma_hub_conformance.checkpoints import CHECKPOINTS, GQA, DesignedCheckpoint

NUM_LABELS, NUM_TAGS = 5, 7

_CONFIG = dataclasses.replace(GQA.config, num_hidden_layers=1).with_labels(NUM_LABELS)


def _sequence(problem_type: str | None) -> DesignedCheckpoint:
    name = f"sequence_{problem_type or 'inferred'}"
    config = dataclasses.replace(_CONFIG, problem_type=problem_type)
    purpose = f"a sequence classifier of {NUM_LABELS} labels, problem_type {problem_type}"
    return DesignedCheckpoint(name, purpose, config, "heads", task="sequence_classification")


BASE = DesignedCheckpoint("base", "the decoder without a head", _CONFIG, "heads", task="base")

SEQUENCE = MappingProxyType(
    {
        kind: _sequence(kind)
        for kind in ("single_label_classification", "multi_label_classification", "regression")
    }
)
"""Sequence classifiers whose config says what their labels are, by what it says."""

INFERRED = _sequence(None)

ONE_LABEL = DesignedCheckpoint(
    "sequence_one_label",
    "a sequence classifier of one label, whose config does not say that it is a regression",
    _CONFIG.with_labels(1),
    "heads",
    task="sequence_classification",
)

TOKEN = DesignedCheckpoint(
    "token",
    "a token classifier whose dropout would show in inference",
    dataclasses.replace(_CONFIG.with_labels(NUM_TAGS), classifier_dropout=0.6),
    "heads",
    task="token_classification",
)

GRADIENTS = MappingProxyType(
    {
        name: DesignedCheckpoint(
            f"{name}_gradients",
            f"`{name}` with as few layers as its gradients need",
            dataclasses.replace(CHECKPOINTS[name].config, num_hidden_layers=layers),
            name,
        )
        for name, layers in (("gqa", 2), ("mqa", 1), ("mha", 1), ("untied", 1), ("bias", 1))
    }
)
"""Causal LMs for the gradients, by the checkpoint whose shapes they have."""
