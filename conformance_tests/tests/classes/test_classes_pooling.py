"""Which token stands for its row in a sequence classifier."""

from typing import Any

import numpy as np
import pytest
import torch

from gemma_hub.errors import InputError
from gemma_hub.inputs import ModelInputs

BATCH, LENGTH, PAD, VOCABULARY = 3, 11, 3, 61
TASK = "sequence_classification"

# {what: (places with the pad id, places masked out or None for no mask, the tokens that stand for
# their rows, whether transformers takes the same ones)}. A place is (row, slice of tokens).
FROM_1_TO_4, FROM_6 = (1, slice(0, 4)), (1, slice(6, LENGTH))
CASES: dict[str, Any] = {
    "no padding": ([], [], [10, 10, 10], True),
    "left": ([FROM_1_TO_4], [FROM_1_TO_4], [10, 10, 10], True),
    "right": ([FROM_6], [FROM_6], [10, 5, 10], True),
    "both sides": ([FROM_1_TO_4, FROM_6], [FROM_1_TO_4, FROM_6], [10, 5, 10], True),
    "a row of padding": ([(1, slice(None))], [(1, slice(None))], [10, 0, 10], True),
    "pad id inside the text": ([(1, slice(2, 4))], [], [10, 10, 10], True),
    "no mask, right": ([FROM_6], None, [10, 5, 10], True),
    "no mask, left": ([FROM_1_TO_4], None, [10, 10, 10], True),
    "no mask, a row of padding": ([(2, slice(None))], None, [10, 10, 0], True),
    # transformers never looks at the mask.
    "text that ends with the pad id": ([(1, slice(9, LENGTH))], [], [10, 10, 10], False),
    "right, with other ids there": ([], [FROM_6], [10, 5, 10], False),
}


def batch(pads: Any, masked: Any) -> tuple[np.ndarray, np.ndarray | None]:
    ids = np.random.default_rng(5).integers(6, VOCABULARY, (BATCH, LENGTH))
    for place in pads:
        ids[place] = PAD
    if masked is None:
        return ids, None
    mask = np.ones_like(ids)
    for place in masked:
        mask[place] = 0
    return ids, mask


def in_transformers(model: Any, mask: Any, **arguments: Any) -> Any:
    if mask is not None:
        arguments["attention_mask"] = torch.tensor(mask)
        arguments["position_ids"] = torch.tensor(np.where(mask == 1, np.cumsum(mask, 1) - 1, 0))
    with torch.no_grad():
        return model(**arguments, output_hidden_states=True)


def scored(model: Any, out: Any, places: list[int]) -> np.ndarray:
    """The logits of chosen tokens, from the hidden states of transformers."""
    hidden = out.hidden_states[-1].numpy()[np.arange(len(places)), places]
    return hidden @ model.score.weight.detach().numpy().T


@pytest.mark.parametrize("case", CASES)
def test_the_last_real_token_stands_for_its_row(written: Any, models: Any, case: str) -> None:
    pads, masked, places, transformers_agrees = CASES[case]
    theirs, path = written(TASK)
    ids, mask = batch(pads, masked)
    out = in_transformers(theirs, mask, input_ids=torch.tensor(ids))
    model = models.read(TASK, path)
    arguments = {"input_ids": ids, **({} if mask is None else {"attention_mask": mask})}
    got = models.call(model, **arguments).logits
    np.testing.assert_allclose(got, scored(theirs, out, places), rtol=0, atol=1e-4)
    assert np.allclose(out.logits.numpy(), got, rtol=0, atol=1e-4) == transformers_agrees
    inputs = ModelInputs.prepare(model.config, task=TASK, **arguments)
    assert inputs.pooled_positions is not None
    assert inputs.pooled_positions.tolist() == places


def test_a_pad_id_that_also_ends_texts(written: Any, models: Any) -> None:
    theirs, path = written(TASK, eos_token_id=PAD)
    ids, mask = batch([(1, slice(6, LENGTH)), (0, slice(10, LENGTH))], [(1, slice(7, LENGTH))])
    out = in_transformers(theirs, mask, input_ids=torch.tensor(ids))
    got = models.call(models.read(TASK, path), input_ids=ids, attention_mask=mask).logits
    np.testing.assert_allclose(got, scored(theirs, out, [10, 6, 10]), rtol=0, atol=1e-4)


def test_without_a_pad_id(written: Any, models: Any) -> None:
    theirs, path = written(TASK, pad_token_id=None)
    model = models.read(TASK, path)
    assert model.config.pad_token_id is None
    ids, mask = batch([], [FROM_6])
    with pytest.raises(InputError, match=r"3 rows.*no pad_token_id.*Give an attention_mask"):
        models.call(model, input_ids=ids)
    with pytest.raises(InputError, match="Give an attention_mask"):
        ModelInputs.prepare(model.config, ids, task=TASK)
    # transformers refuses two rows with a mask too; one row is its last token there.
    rows = [in_transformers(theirs, None, input_ids=torch.tensor(row[None])) for row in ids]
    for row, out in zip(ids, rows, strict=True):
        got = models.call(model, input_ids=row[None]).logits
        np.testing.assert_allclose(got, out.logits.numpy(), rtol=0, atol=1e-4)
    got = models.call(model, input_ids=ids, attention_mask=mask).logits
    expected = [scored(theirs, out, [place]) for out, place in zip(rows, [10, 5, 10], strict=True)]
    np.testing.assert_allclose(got, np.concatenate(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("masked", [None, [FROM_6]])
def test_embeddings_are_real_where_no_mask_says_otherwise(
    written: Any, models: Any, masked: Any
) -> None:
    theirs, path = written(TASK)
    ids, mask = batch([FROM_6], masked)
    embeds = theirs.model.embed_tokens.weight.detach().numpy()[ids]
    # transformers takes embeddings that are scaled already.
    out = in_transformers(theirs, mask, inputs_embeds=torch.tensor(embeds * 40**0.5))
    got = models.call(
        models.read(TASK, path),
        inputs_embeds=embeds,
        **({} if mask is None else {"attention_mask": mask}),
    ).logits
    places = [10, 10, 10] if mask is None else [10, 5, 10]
    np.testing.assert_allclose(got, scored(theirs, out, places), rtol=0, atol=1e-4)
    assert np.allclose(out.logits.numpy(), got, rtol=0, atol=1e-4) == (mask is None)


def test_the_caller_may_choose_the_tokens(written: Any, models: Any) -> None:
    theirs, path = written(TASK)
    ids, _ = batch([], None)
    out = in_transformers(theirs, None, input_ids=torch.tensor(ids))
    places = np.array([3, 0, 10])
    got = models.call(models.read(TASK, path), input_ids=ids, pooled_positions=places).logits
    np.testing.assert_allclose(got, scored(theirs, out, places.tolist()), rtol=0, atol=1e-4)
