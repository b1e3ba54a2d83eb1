"""Calls: the torch backend's results up to rounding, and Transformers' own where these differ."""

import numpy as np
import pytest
import torch
import transformers

from gemma_hub import Gemma
from gemma_hub.checkpoints import open_checkpoint, save_checkpoint
from gemma_hub.errors import CapacityError, InputError, UnsupportedFeature
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import parameter_shapes

# float32 has 24 bits; the largest distance seen is 8e-7 of the largest element.
NOISE = 5e-6
RANDOM = np.random.default_rng(2)
TARGETS = RANDOM.standard_normal((3, 3))
LABELLED = {
    "causal_lm": ("causal_lm", {}, None),
    "causal_lm_part_of_a_batch": ("causal_lm", {}, 40),
    "token": ("token_classification", {}, None),
    "one_choice": ("sequence_classification", {}, np.array([0, 2, 1])),
    "several": ("sequence_classification", {}, np.abs(TARGETS) % 1),
    "regression": ("sequence_classification", {"problem_type": "regression"}, TARGETS),
    "one_number": ("sequence_classification", {"num_labels": 1, "id2label": None}, TARGETS[:, 0]),
}


def distance(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def labelled(case, config, batch):
    """(config, task, inputs with labels); no label is predicted from a padding slot."""
    task, changes, labels = LABELLED[case]
    changed = config(**changes)
    number = labels if isinstance(labels, int) else None
    if task != "sequence_classification":
        plain = batch(changed)
        seen = plain.attention_mask & np.roll(plain.attention_mask, 1, axis=1)
        seen[:, 0] = False
        ids = plain.input_ids if task == "causal_lm" else plain.input_ids % 3
        labels = np.where(seen, ids, -100)
    return changed, task, batch(changed, task=task, labels=labels, num_items_in_batch=number)


@pytest.mark.parametrize(
    "task", ["base", "causal_lm", "sequence_classification", "token_classification"]
)
def test_outputs_are_the_torch_backends(task, build, batch):
    wanted = {"output_hidden_states": True, "output_attentions": True, "task": task}
    found, expected = (
        build(name, task=task).forward(batch(**wanted)).to_numpy()
        for name in ("transformers", "torch")
    )
    real = batch().attention_mask
    if task == "base":
        assert found.logits is None
        assert distance(found.last_hidden_state[real], expected.last_hidden_state[real]) < NOISE
    else:
        assert found.last_hidden_state is None
        rows = slice(None) if task == "sequence_classification" else real
        assert distance(found.logits[rows], expected.logits[rows]) < NOISE
    assert len(found.hidden_states) == 3
    assert len(found.attentions) == 2
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert distance(mine[real], theirs[real]) < NOISE
    for mine, theirs in zip(found.attentions, expected.attentions, strict=True):
        queries = np.swapaxes(mine, 1, 2)[real], np.swapaxes(theirs, 1, 2)[real]
        assert distance(*queries) < NOISE
    assert found.loss is None


def test_what_was_not_asked_for_is_not_there(build, batch):
    outputs = build().forward(batch())
    assert outputs.hidden_states is None
    assert outputs.attentions is None


@pytest.mark.parametrize("case", LABELLED)
def test_loss_and_gradients_are_the_torch_backends(case, build, config, batch):
    changed, task, inputs = labelled(case, config, batch)
    models = [build(name, config=changed, task=task) for name in ("transformers", "torch")]
    (loss, gradients), (expected_loss, expected) = (m.loss_and_gradients(inputs) for m in models)
    assert isinstance(loss, float)
    assert loss == pytest.approx(expected_loss, rel=NOISE)
    assert float(models[0].forward(inputs).loss) == pytest.approx(loss, rel=1e-6)
    assert set(gradients) == set(expected) == set(parameter_shapes(changed, task))
    for name, gradient in gradients.items():
        assert distance(gradient, expected[name]) < NOISE, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["causal_lm", "token", "one_choice", "several", "regression"])
def test_losses_in_narrow_types_are_float32(case, dtype, build, config, batch):
    changed, task, inputs = labelled(case, config, batch)
    model = build(config=changed, task=task, dtype=dtype)
    outputs = model.forward(inputs)
    assert outputs.loss.dtype == outputs.logits.dtype == torch.float32
    _, gradients = model.loss_and_gradients(inputs)
    assert {g.dtype for g in gradients.values()} == {getattr(torch, dtype)}


def test_the_meaning_of_labels_is_not_kept_for_the_next_call(build, config, batch):
    task = "sequence_classification"
    model = build(task=task)
    calls = [[0, 1, 2], np.abs(TARGETS) % 1, [0, 1, 2]]
    losses = [float(model.forward(batch(task=task, labels=labels)).loss) for labels in calls]
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embeddings_are_unscaled(dtype, build, config, weights, batch):
    table = weights(config(), dtype=dtype).read("model.embed_tokens.weight").astype(np.float32)
    with_ids, model = batch(output_hidden_states=True), build(dtype=dtype)
    with_embeddings = ModelInputs.prepare(
        config(),
        attention_mask=with_ids.attention_mask,
        inputs_embeds=table[with_ids.input_ids],
        output_hidden_states=True,
    )
    found, expected = model.forward(with_embeddings), model.forward(with_ids)
    assert torch.equal(found.hidden_states[0], expected.hidden_states[0])
    assert torch.equal(found.logits, expected.logits)


def test_the_cache_gives_the_logits_of_the_whole_sequence(build, config, batch):
    whole, model = batch(), build()
    expected = model.forward(whole).to_numpy().logits
    cache, parts = model.init_cache(3, 9), []
    for part in (slice(0, 5), slice(5, 6), slice(6, 9)):
        step = ModelInputs.prepare(
            config(),
            whole.input_ids[:, part],
            whole.attention_mask[:, part],
            next_position=cache.next_position,
            output_attentions=True,
        )
        outputs, cache = model.extend(step, cache)
        assert outputs.attentions[0].shape == (3, 4, part.stop - part.start, part.stop)
        parts.append(outputs.to_numpy().logits)
    real = whole.attention_mask
    assert distance(np.concatenate(parts, axis=1)[real], expected[real]) < NOISE
    with pytest.raises(CapacityError, match="9 of 9"):
        model.extend(step, cache)


def test_a_classifier_has_a_cache_too(build, config, batch):
    task = "token_classification"
    whole, model = batch(task=task), build(task=task)
    cache, parts = model.init_cache(3, 20), []
    for part in (slice(0, 5), slice(5, 9)):
        step = ModelInputs.prepare(
            config(),
            whole.input_ids[:, part],
            whole.attention_mask[:, part],
            task=task,
            next_position=cache.next_position,
        )
        outputs, cache = model.extend(step, cache)
        parts.append(outputs.to_numpy().logits)
    real = whole.attention_mask
    expected = model.forward(whole).to_numpy().logits[real]
    assert distance(np.concatenate(parts, axis=1)[real], expected) < NOISE


def test_saved_through_it_transformers_and_the_core_read_the_same_bits(config, weights, tmp_path):
    given = weights(config(), dtype="bfloat16")
    save_checkpoint(tmp_path / "first", config(), given)
    Gemma.load(tmp_path / "first", backend="transformers").save(tmp_path / "second")
    again = open_checkpoint(tmp_path / "second")
    assert again.config == open_checkpoint(tmp_path / "first").config
    assert set(again.weights.names()) == set(given.names())
    theirs = transformers.GemmaForCausalLM.from_pretrained(tmp_path / "second")
    for name in given.names():
        assert again.weights.read(name).tobytes() == given.read(name).tobytes(), name
        bits = theirs.get_parameter(name).detach().view(torch.uint16).numpy().tobytes()
        assert bits == given.read(name).tobytes(), name


def test_rows_are_pooled_as_transformers_pools_them(build, config, batch):
    # A real last token that is the padding id: Transformers looks at ids, not at the mask.
    task = "sequence_classification"
    ids = batch().input_ids.copy()
    ids[0, -1] = config().pad_token_id
    inputs = ModelInputs.prepare(config(), ids, batch().attention_mask, task=task)
    found, contract = (build(name, task=task).forward(inputs) for name in ("transformers", "torch"))
    assert inputs.pooled_positions[0] == 8
    states = build(task="base").forward(batch(task="base")).last_hidden_state
    score = build(task=task).native.score.weight
    assert distance(found.logits[0], (states[0, 7] @ score.T).detach()) < NOISE
    assert distance(found.logits[1:], contract.logits[1:]) < NOISE
    assert distance(found.logits[0], contract.logits[0]) > 1000 * NOISE


def test_several_rows_cannot_be_pooled_without_a_padding_id(build, config, batch):
    task, changed = "sequence_classification", config(pad_token_id=None)
    model = build(config=changed, task=task)
    with pytest.raises(UnsupportedFeature, match=r"pooling by attention_mask.*one row at a time"):
        model.forward(batch(changed, task=task))
    one = ModelInputs.prepare(changed, batch().input_ids[:1], task=task)
    expected = build("torch", config=changed, task=task).forward(one).logits
    assert distance(model.forward(one).logits, expected) < NOISE


def test_the_token_classifier_refuses_a_divisor_that_it_would_ignore(build, config, batch):
    _, task, inputs = labelled("token", config, batch)
    parted = batch(task=task, labels=inputs.labels, num_items_in_batch=40)
    with pytest.raises(UnsupportedFeature, match=r"num_items_in_batch.*always takes the mean"):
        build(task=task).forward(parted)


def test_the_core_refuses_what_transformers_would_take(build, config):
    ids = np.full((1, 65), 12)
    with pytest.raises(CapacityError, match="positions 0 to 63"):
        ModelInputs.prepare(config(), ids)
    with torch.no_grad():
        logits = build().native(torch.tensor(ids)).logits
    assert torch.isfinite(logits).all()
    with pytest.raises(InputError, match="batch_size=0"):
        build().init_cache(0, 4)


def test_positions_of_the_caller_are_obeyed(build, config, batch):
    ids = batch().input_ids
    positions = [[0, 1, 2, 3, 20, 21, 22, 23, 24]]
    inputs = ModelInputs.prepare(config(), ids, position_ids=positions)
    found, expected = (build(name).forward(inputs).logits for name in ("transformers", "torch"))
    assert distance(found, expected) < NOISE
    counted = build().forward(ModelInputs.prepare(config(), ids)).logits
    assert distance(counted, expected) > 1000 * NOISE


@pytest.mark.parametrize("case", ["several", "regression"])
def test_targets_are_taken_in_float32(case, build, config, batch):
    _, changes, labels = LABELLED[case]
    task, changed = "sequence_classification", config(**changes)
    model = build(config=changed, task=task)
    losses = [
        model.forward(batch(changed, task=task, labels=labels.astype(dtype))).loss
        for dtype in (np.float32, np.float64)
    ]
    assert torch.equal(*losses)


def test_gradients_of_a_model_in_training_with_frozen_parameters(build, config, batch):
    changed, task, inputs = labelled("token", config, batch)
    expected = build(config=changed, task=task).loss_and_gradients(inputs)
    model = build(config=changed, task=task)
    model.native.train()
    model.native.model.norm.weight.requires_grad_(False)
    with torch.no_grad():
        loss, gradients = model.loss_and_gradients(inputs)
    assert loss == expected[0]
    for name, gradient in expected[1].items():
        assert torch.equal(gradients[name], gradient)
    assert model.native.training
    assert model.native.dropout.training
    frozen = [name for name, p in model.native.named_parameters() if not p.requires_grad]
    assert frozen == ["model.norm.weight"]


def test_no_gradients_without_a_loss(build, batch):
    with pytest.raises(InputError, match="There are no labels"):
        build().loss_and_gradients(batch())
    with pytest.raises(UnsupportedFeature, match=r"'gradients'.*has no loss"):
        build(task="base").loss_and_gradients(batch(task="base"))


def test_gradients_flow_through_slots_that_see_nothing(build, batch):
    # The first real token of a left-padded row has a label, which its padding predicts.
    plain = batch()
    inputs = batch(labels=np.where(plain.attention_mask, plain.input_ids, -100))
    (loss, found), (expected_loss, expected) = (
        build(name).loss_and_gradients(inputs) for name in ("transformers", "torch")
    )
    assert loss == pytest.approx(expected_loss, rel=NOISE)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert distance(found[name], expected[name]) > 1000 * NOISE
