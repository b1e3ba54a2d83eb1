"""What cases are made of: fields that none forgets, laws that hold exactly, sums that cancel."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from gemma_hub.config import GemmaConfig
from gemma_hub_conformance.cases import laws, liveness, precision
from gemma_hub_conformance.cases.forward import LENGTH, left_padded
from gemma_hub_conformance.checkpoints import CHECKPOINTS, GQA
from gemma_hub_conformance.rows import Batch
from gemma_hub_conformance.spec import prepare
from gemma_hub_numpy.model import Reference

LAWS = {
    "heads": (CHECKPOINTS["bias"], laws.permuted_heads),
    "units": (GQA, laws.permuted_units),
    "features": (CHECKPOINTS["untied"], laws.permuted_features),
    "values": (GQA, laws.permuted_values),
    "up": (GQA, laws.scaled_up),
    "value scale": (GQA, laws.scaled_values),
}


def test_every_field_of_the_config_has_its_place_in_liveness():
    tables = (
        liveness.ALIVE, liveness.SHAPES, liveness.LATER, liveness.DEAD, liveness.SPECIAL,
        liveness.ELSEWHERE,
    )  # fmt: skip
    found = Counter(name for table in tables for name in table)
    assert set(found) == {field.name for field in dataclasses.fields(GemmaConfig)}
    assert set(found.values()) == {1}


@pytest.mark.parametrize("law", LAWS)
def test_a_law_holds_in_the_reference_and_changes_weights(law):
    original, change = LAWS[law]
    written = laws.Rewritten(law, "", original.config, original.name, change=change)
    before, after = original.weights(), written.weights()
    assert any(not np.array_equal(before.read(n), after.read(n)) for n in before.names())
    inputs = prepare(original, Batch.of(left_padded(), LENGTH))
    logits = [Reference(original.config, each).run(inputs).logits for each in (before, after)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-11 * np.abs(logits[0]).max())


def test_the_terms_of_the_cancelling_sums_are_far_larger_than_the_sums():
    weights = precision.CANCELLING.weights()
    down = weights.read("model.layers.0.mlp.down_proj.weight").astype(np.float64)
    half = down.shape[1] // 2
    sums = np.abs(down[:, :half] + down[:, half:])
    assert np.median(np.abs(down[:, half:])) > 16 * np.median(sums)


def test_the_long_sums_have_terms_of_one_sign():
    down = precision.LONG_SUMS.weights().read("model.layers.0.mlp.down_proj.weight")
    assert down.shape[1] > 4 * 256
    assert ((down > 0).all(axis=1) | (down < 0).all(axis=1) | (down == 0).all(axis=1)).all()
