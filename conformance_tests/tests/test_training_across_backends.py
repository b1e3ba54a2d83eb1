"""Training in PyTorch and in JAX goes the same way, as far as rounding lets it.

How far that is, is measured and not chosen: exchanging the order of hidden features changes
nothing but the order in which sums are taken. The spread of such runs is the noise, and the one
error model (`gemma_hub.error_model`) says how far from it a correct run may be. A row of a
parameter is to it what a token is in a forward pass.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import peft
import pytest
import torch
from flax import nnx

from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.error_model import (
    WORST_RATIO_LIMIT,
    NoiseBand,
    expected_maximum,
    judge,
    noise_band,
)
from gemma_hub.inputs import ModelInputs
from gemma_hub.parameters import ArrayWeights
from gemma_hub_conformance.checkpoints import CHECKPOINTS
from gemma_hub_flax.backend import FlaxBackend
from gemma_hub_flax.backend import _arguments as flax_arguments
from gemma_hub_flax.weights import named_leaves
from gemma_hub_numpy.model import Reference, Witness
from gemma_hub_torch.backend import TorchBackend, TorchModel

Arrays = dict[str, np.ndarray]
Training = Callable[[Arrays], Arrays]

CHECKPOINT = CHECKPOINTS["mqa"]
CONFIG = CHECKPOINT.config
LR, BETAS, DECAY = 0.01, (0.9, 0.95), 0.1
WITNESSES = 6
STEPS = 4


def start() -> Arrays:
    """Parameters of one's own: a torch model trains in the very arrays that it was built from."""
    weights = CHECKPOINT.weights()
    return {name: weights.read(name).copy() for name in weights.names()}


def batch() -> ModelInputs:
    ids = np.random.default_rng(3).integers(10, CONFIG.vocab_size, (2, 12))
    mask = np.ones((2, 12), np.int32)
    mask[1, :3] = 0
    return ModelInputs.prepare(
        CONFIG, ids, attention_mask=mask, labels=np.where(mask == 1, ids, -100)
    )


# -- the same training in both frameworks ---------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One rule of descent by its names in both frameworks."""

    eps: float | None = None  # of AdamW; None for plain SGD
    lr: float = LR

    def torch(self, parameters: Any) -> torch.optim.Optimizer:
        if self.eps is None:
            return torch.optim.SGD(parameters, lr=self.lr)
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=BETAS, eps=self.eps, weight_decay=DECAY
        )

    def optax(self) -> optax.GradientTransformation:
        if self.eps is None:
            return optax.sgd(self.lr)
        return optax.adamw(self.lr, b1=BETAS[0], b2=BETAS[1], eps=self.eps, weight_decay=DECAY)


def built(backend: Any, arrays: Arrays, config: GemmaConfig = CONFIG) -> Any:
    options = BuildOptions(dtype="float32", device="cpu")
    return backend.build(config, TaskSpec(), ArrayWeights(arrays), options)


def exported(model: Any) -> Arrays:
    weights = model.export()
    return {name: np.array(weights.read(name)) for name in weights.names()}


def torch_gradients(arrays: Arrays) -> Arrays:
    _, gradients = built(TorchBackend(), arrays).loss_and_gradients(batch())
    return {name: value.numpy() for name, value in gradients.items()}


def flax_gradients(arrays: Arrays) -> Arrays:
    _, gradients = built(FlaxBackend(), arrays).loss_and_gradients(batch())
    return {name: np.asarray(value) for name, value in gradients.items()}


def dropped_flax_gradients(arrays: Arrays, checkpointing: bool) -> Arrays:
    """Gradients with dropout from one key."""
    config = dataclasses.replace(CONFIG, attention_dropout=0.3)
    model = built(FlaxBackend(), arrays, config)
    if checkpointing:
        model.native.gradient_checkpointing_enable()
    call, options = flax_arguments(batch())
    gradients = gradients_by_state(*nnx.split(model.native), call, options, jax.random.key(4))
    return {name: np.asarray(value) for name, value in named_leaves("causal_lm", gradients)}


@partial(jax.jit, static_argnums=(0, 3))
def gradients_by_state(graphdef: Any, state: Any, call: Any, options: Any, key: Any) -> Any:
    def loss(state: Any) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return model(**call, **dict(options), use_cache=False, dropout_rng=key).loss

    return jax.grad(loss)(state)


def train_torch(rule: Rule, steps: int, arrays: Arrays) -> Arrays:
    model = built(TorchBackend(), arrays)
    optimizer = rule.torch(model.native.parameters())
    arguments = model._arguments(batch())
    for _ in range(steps):
        optimizer.zero_grad()
        model.native(**arguments, use_cache=False).loss.backward()
        optimizer.step()
    return exported(model)


def train_flax(rule: Rule, steps: int, arrays: Arrays) -> Arrays:
    model = built(FlaxBackend(), arrays)
    call, options = flax_arguments(batch())

    @nnx.jit
    def step(native: Any, optimizer: nnx.Optimizer, call: Any) -> None:
        def loss(native: Any) -> jax.Array:
            return native(**call, **dict(options), use_cache=False).loss

        optimizer.update(native, nnx.grad(loss)(native))

    optimizer = nnx.Optimizer(model.native, rule.optax(), wrt=nnx.Param)
    for _ in range(steps):
        step(model.native, optimizer, call)
    return exported(model)


# -- the noise -------------------------------------------------------------------------------------

# The axis of each parameter's hidden features (D) and of its feed-forward features (F).
AXES = {
    "embed_tokens.weight": {"D": 1},
    "q_proj.weight": {"D": 1},
    "k_proj.weight": {"D": 1},
    "v_proj.weight": {"D": 1},
    "o_proj.weight": {"D": 0},
    "gate_proj.weight": {"F": 0, "D": 1},
    "up_proj.weight": {"F": 0, "D": 1},
    "down_proj.weight": {"D": 0, "F": 1},
    "norm.weight": {"D": 0},
}


def reordered(arrays: Arrays, orders: dict[str, np.ndarray]) -> Arrays:
    """The same model with its features in another order."""
    result = {}
    for name, array in arrays.items():
        axes = next(axes for ending, axes in AXES.items() if name.endswith(ending))
        for letter, axis in axes.items():
            array = array.take(orders[letter], axis)
        result[name] = array
    return result


def witnesses(training: Training, arrays: Arrays) -> list[Arrays]:
    """Results of `training` with features in random orders, put back into their own."""
    results = []
    for seed in range(WITNESSES):
        random = np.random.default_rng([17, seed])
        orders = {
            "D": random.permutation(CONFIG.hidden_size),
            "F": random.permutation(CONFIG.intermediate_size),
        }
        back = {letter: np.argsort(order) for letter, order in orders.items()}
        results.append(reordered(training(reordered(arrays, orders)), back))
    return results


def bands(results: list[Arrays]) -> tuple[Arrays, dict[str, NoiseBand]]:
    """The mean of the witnesses, and how far rounding alone throws them off it."""
    centre = {name: np.mean([np.float64(r[name]) for r in results], 0) for name in results[0]}
    return centre, {
        name: noise_band(centre[name], [result[name] for result in results]) for name in centre
    }


def misfits(found: Arrays, true: Arrays, band: dict[str, NoiseBand]) -> dict[str, str]:
    """{parameter: why} of those that differ by more than noise."""
    assert set(found) == set(true)
    verdicts = {name: judge(found[name], true[name], band[name]) for name in true}
    return {name: verdict.reason for name, verdict in verdicts.items() if not verdict.passed}


# -- gradients and steps ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradient_noise() -> tuple[Arrays, dict[str, NoiseBand]]:
    return bands(witnesses(torch_gradients, start()))


def test_gradients_are_the_same(gradient_noise: Any) -> None:
    in_torch, in_flax = torch_gradients(start()), flax_gradients(start())
    assert not misfits(in_torch, *gradient_noise)
    assert not misfits(in_flax, *gradient_noise)
    # The band is sharp: one part in ten thousand is seen in every parameter.
    off = {name: value * np.float32(1 + 1e-4) for name, value in in_flax.items()}
    assert set(misfits(off, *gradient_noise)) == set(off)


def test_checkpointing_in_jax_drops_the_same_entries_again() -> None:
    # In torch the gradients are equal bit by bit; its own tests hold that.
    plain = partial(dropped_flax_gradients, checkpointing=False)
    band = bands(witnesses(plain, start()))
    assert not misfits(dropped_flax_gradients(start(), checkpointing=True), *band)
    assert set(misfits(flax_gradients(start()), *band)) == set(start())  # dropout matters


@pytest.mark.parametrize(
    "rule", [Rule(), Rule(eps=1e-3)], ids=["sgd", "adamw"]
)  # an eps above the noise of the gradients: the next test is about the small one
def test_several_steps_stay_together(rule: Rule) -> None:
    true, band = bands(witnesses(partial(train_torch, rule, STEPS), start()))
    assert not misfits(train_torch(rule, STEPS, start()), true, band)
    assert not misfits(train_flax(rule, STEPS, start()), true, band)
    # The band is sharp: a step shorter by one part in a thousand is seen in every parameter.
    shorter = dataclasses.replace(rule, lr=LR * 0.999)
    assert set(misfits(train_torch(shorter, STEPS, start()), true, band)) == set(true)


@pytest.mark.parametrize("train", [train_torch, train_flax])
def test_one_step_of_adamw_is_where_the_noise_of_the_gradient_allows(
    train: Any, gradient_noise: Any
) -> None:
    # Adam's first step is g / (|g| + eps), nearly the sign of g: where g is below its noise the
    # step may have either sign. It grows with g, so the ends of g's range give the step's range.
    eps, rounding = 1e-8, 2.0**-24
    gradients, band = gradient_noise
    found = train(Rule(eps), 1, start())
    sharp = []
    for name, value in start().items():
        g = gradients[name]
        scatter = band[name].element_rms * WORST_RATIO_LIMIT * expected_maximum(g.size)
        low, high = (
            LR * end / (np.abs(end) + eps)
            for end in (g - scatter.reshape(g.shape), g + scatter.reshape(g.shape))
        )
        centre = np.float64(value) * (1 - LR * DECAY)
        # In float32, 1 - beta has an error 1 / (1 - beta) times that of other operations, of
        # which there are fewer than ten on each side.
        slack = LR * rounding * (10 + sum(1 / (1 - beta) for beta in BETAS))
        slack = slack + 10 * rounding * np.abs(centre)
        assert (found[name] >= centre - high - slack).all(), name
        assert (found[name] <= centre - low + slack).all(), name
        sharp.append((high - low).ravel() < LR / 1000)
    assert np.concatenate(sharp).mean() > 0.9  # elsewhere the test says little


# -- LoRA ------------------------------------------------------------------------------------------


def test_a_merged_adapter_computes_what_the_adapted_model_does() -> None:
    torch.manual_seed(2)
    native = built(TorchBackend(), start()).native
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    lora = peft.get_peft_model(native, settings)
    truth: dict[str, np.ndarray] = {name: np.float64(array) for name, array in start().items()}
    for name, layer in native.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            torch.nn.init.normal_(b, std=0.3)
            product = b.detach().numpy().astype(np.float64) @ a.detach().numpy()
            truth[f"{name}.weight"] = truth[f"{name}.weight"] + 6 / 4 * product
    inputs = batch()
    weights = ArrayWeights(truth)
    true = Reference(CONFIG, weights).run(inputs).logits
    runs = [Witness(CONFIG, weights, "float32", seed).run(inputs).logits for seed in range(8)]
    mask = inputs.attention_mask
    band = noise_band(true, runs, mask)
    adapted = TorchModel(native).forward(inputs)  # PEFT has put the adapter into the module
    merged = TorchModel(lora.merge_and_unload())
    results = {
        "adapted": adapted.to_numpy().logits,
        "merged": merged.forward(inputs).to_numpy().logits,
        "in flax": built(FlaxBackend(), exported(merged)).forward(inputs).to_numpy().logits,
    }
    for name, logits in results.items():
        verdict = judge(logits, true, band, mask)
        assert verdict.passed, f"{name}: {verdict.reason}"
    base = built(TorchBackend(), start()).forward(inputs).to_numpy().logits
    assert not judge(base, true, band, mask).passed
