"""Calls that go on from a cache, and the other ways to say the same call."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from gemma_hub.errors import CapacityError

BATCH, LENGTH, FIRST, PAD, VOCABULARY = 3, 11, 7, 3, 61
TASKS = ("base", "causal_lm", "sequence_classification", "token_classification")


def batch(padding: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask; all padding is among the tokens of the first call."""
    ids = np.random.default_rng(5).integers(6, VOCABULARY, (BATCH, LENGTH))
    mask = np.ones_like(ids)
    if padding == "left":
        mask[1, :4], mask[2, :1] = 0, 0
    elif padding == "right":
        mask[1, 5:FIRST], mask[2, 6:FIRST] = 0, 0
    ids[mask == 0] = PAD
    return ids, mask


@pytest.mark.parametrize("second_mask", ["none", "full", "new"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_second_call_goes_on(written: Any, models: Any, padding: str, second_mask: str) -> None:
    model = models.read("causal_lm", written("causal_lm")[1])
    ids, mask = batch(padding)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    whole = models.call(model, input_ids=ids, attention_mask=mask, **wanted)
    first = models.call(model, input_ids=ids[:, :FIRST], attention_mask=mask[:, :FIRST])
    real = mask[:, :FIRST] == 1
    np.testing.assert_allclose(first.logits[real], whole.logits[:, :FIRST][real], atol=1e-4)

    masks = {"none": None, "full": mask, "new": mask[:, FIRST:]}
    got = models.call(
        model,
        input_ids=ids[:, FIRST:],
        attention_mask=masks[second_mask],
        past_key_values=first.past_key_values,
        **wanted,
    )
    np.testing.assert_allclose(got.logits, whole.logits[:, FIRST:], atol=1e-4)
    for ours, theirs in zip(got.hidden_states, whole.hidden_states, strict=True):
        np.testing.assert_allclose(ours, theirs[:, FIRST:], atol=1e-4)
    for ours, theirs in zip(got.attentions, whole.attentions, strict=True):
        np.testing.assert_allclose(ours[..., :LENGTH], theirs[:, :, FIRST:], atol=1e-5)
        assert not ours[..., LENGTH:].any()  # Flax looks at the free slots too


@pytest.mark.parametrize("task", TASKS)
def test_every_class_goes_on_as_transformers_does(written: Any, models: Any, task: str) -> None:
    theirs, path = written(task)
    ids, mask = batch("left")
    positions = np.where(mask == 1, np.cumsum(mask, 1) - 1, 0)
    expected = theirs(
        torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
    )
    model = models.read(task, path)
    past = models.call(
        model, input_ids=ids[:, :FIRST], attention_mask=mask[:, :FIRST]
    ).past_key_values
    got = models.call(model, input_ids=ids[:, FIRST:], attention_mask=mask, past_key_values=past)
    name = "last_hidden_state" if task == "base" else "logits"
    theirs = getattr(expected, name).detach().numpy()
    theirs = theirs if task == "sequence_classification" else theirs[:, FIRST:]
    np.testing.assert_allclose(getattr(got, name), theirs, rtol=0, atol=1e-4)


def test_a_cache_of_its_own_making_grows(written: Any, models: Any) -> None:
    model = models.read("causal_lm", written("causal_lm")[1])
    ids, mask = batch("left")
    whole = models.call(model, input_ids=ids, attention_mask=mask)
    past = models.call(
        model, input_ids=ids[:, :FIRST], attention_mask=mask[:, :FIRST]
    ).past_key_values
    assert past.valid.shape == (BATCH, FIRST)
    for t in range(FIRST, LENGTH):
        out = models.call(model, input_ids=ids[:, t : t + 1], past_key_values=past)
        past = out.past_key_values
        assert past.length == t + 1
        assert past.valid.shape == (BATCH, 2 * FIRST)
        np.testing.assert_allclose(out.logits[:, 0], whole.logits[:, t], rtol=0, atol=1e-4)
    assert past.next_position.tolist() == mask.sum(1).tolist()
    assert past.valid[:, :LENGTH].tolist() == (mask == 1).tolist()
    assert past.with_room(3) is past
    assert past.with_room(4).valid.shape == (BATCH, 4 * FIRST)
    assert past.with_room(50).valid.shape == (BATCH, LENGTH + 50)


def test_a_cache_of_init_cache_is_filled_and_then_refuses(written: Any, models: Any) -> None:
    model = models.read("causal_lm", written("causal_lm")[1])
    ids, mask = batch("left")
    whole = models.call(model, input_ids=ids, attention_mask=mask)
    past = model.init_cache(BATCH, 2 * FIRST)
    first = models.call(
        model, input_ids=ids[:, :FIRST], attention_mask=mask[:, :FIRST], past_key_values=past
    )
    second = models.call(model, input_ids=ids[:, FIRST:], past_key_values=first.past_key_values)
    np.testing.assert_allclose(second.logits, whole.logits[:, FIRST:], rtol=0, atol=1e-4)
    assert second.past_key_values.valid.shape == (BATCH, 2 * FIRST)
    with pytest.raises(CapacityError, match="holds 11 of 14 tokens and 4 more do not fit"):
        models.call(model, input_ids=ids[:, :4], past_key_values=second.past_key_values)
    with pytest.raises(CapacityError, match="holds 0 of 10 tokens and 11 more do not fit"):
        models.call(model, input_ids=ids, past_key_values=model.init_cache(BATCH, LENGTH - 1))


def test_a_full_cache_gives_nan_where_nothing_can_be_raised(written: Any, both: Any) -> None:
    models = both[1]
    model = models.read("base", written("base")[1])
    ids = jnp.asarray(batch("none")[0][:, :4])

    @nnx.jit
    def step(model: Any, ids: Any, past: Any) -> Any:
        out = model(ids, past_key_values=past)
        return out.last_hidden_state, out.past_key_values

    hidden, past = step(model, ids, model.init_cache(BATCH, 6))
    assert np.isfinite(hidden).all()
    hidden, past = step(model, ids, past)
    assert np.isnan(hidden).all()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_embeddings_say_the_same_as_ids(written: Any, models: Any, padding: str) -> None:
    theirs, path = written("causal_lm")
    model = models.read("causal_lm", path)
    ids, mask = batch(padding)
    embeds = theirs.model.embed_tokens.weight.detach().numpy()[ids]
    expected = models.call(model, input_ids=ids, attention_mask=mask)
    got = models.call(model, inputs_embeds=embeds, attention_mask=mask)
    np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=1e-6)


def test_embeddings_are_unscaled_where_those_of_transformers_are_scaled(
    written: Any, models: Any
) -> None:
    theirs, path = written("base")
    embeds = np.random.default_rng(0).standard_normal((BATCH, LENGTH, 40)).astype(np.float32)
    expected = theirs(inputs_embeds=torch.tensor(embeds * 40**0.5)).last_hidden_state
    got = models.call(models.read("base", path), inputs_embeds=embeds).last_hidden_state
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 4, LENGTH, LENGTH + 3])
def test_logits_to_keep(written: Any, models: Any, count: int) -> None:
    theirs, path = written("causal_lm")
    ids, _ = batch("none")
    expected = theirs(torch.tensor(ids), logits_to_keep=count).logits.detach().numpy()
    got = models.call(models.read("causal_lm", path), input_ids=ids, logits_to_keep=count)
    assert got.logits.shape == (BATCH, min(count, LENGTH), VOCABULARY)
    np.testing.assert_allclose(got.logits, expected, rtol=0, atol=1e-4)


def test_positions_as_given(written: Any, models: Any) -> None:
    theirs, path = written("causal_lm")
    ids, _ = batch("none")
    positions = np.random.default_rng(1).integers(0, 64, ids.shape)
    expected = theirs(torch.tensor(ids), position_ids=torch.tensor(positions)).logits
    model = models.read("causal_lm", path)
    got = models.call(model, input_ids=ids, position_ids=positions)
    np.testing.assert_allclose(got.logits, expected.detach().numpy(), rtol=0, atol=1e-4)
    same_for_all = models.call(model, input_ids=ids, position_ids=positions[:1])
    np.testing.assert_allclose(same_for_all.logits[0], got.logits[0], rtol=0, atol=1e-5)
