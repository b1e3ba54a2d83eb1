"""What a training step takes: loss and gradients of 4 texts of 128 tokens, beside other programs.

    python bench/training.py --subjects torch,transformers,flax,transformers-flax,keras-hub-jax

One random checkpoint of the small shape, float32. Each subject runs in a process of its own, one at
a time, in rounds; peers in the environments of `gemma-hub bench`, which are made where they are
missing. Prints a Markdown table: the median of all steps, the least and the greatest, and the ratio
to the first subject by medians. KerasHub's step has an update by SGD in it, which is small beside
the rest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROWS, LENGTH, VOCABULARY = 4, 128, 32000
FORMATS = {"transformers-flax": "flax_msgpack"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", default="torch,transformers,flax,transformers-flax")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a subject, in its own process
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        seconds = measured(STEPS[arguments.one](arguments.checkpoint), arguments.steps)
        print(json.dumps(seconds))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    # Imported here: a peer's environment has no gemma_hub.
    from gemma_hub.bench.checkpoints import SHAPES, random_checkpoint
    from gemma_hub.bench.peers import python_of, read_peers
    from gemma_hub.bench.running import converted
    from gemma_hub.cache import cache_folder

    cache = arguments.cache or cache_folder("bench")
    checkpoint = random_checkpoint(cache / "checkpoints" / "small", SHAPES["small"])
    peers = read_peers(Path(__file__).parent / "peers")
    subjects = arguments.subjects.split(",")
    commands = {}
    for name in subjects:
        python, path = Path(sys.executable), checkpoint
        if name in peers:
            python = python_of(peers[name], cache / "environments")
        if name in FORMATS:
            path = converted(checkpoint, "float32", FORMATS[name], SHAPES["small"], cache)
        options = ["--one", name, "--checkpoint", str(path), "--steps", str(arguments.steps)]
        commands[name] = [str(python), __file__, *options]
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            found[name] += json.loads(done.stdout.splitlines()[-1])
    first = statistics.median(found[subjects[0]])
    print("| program | seconds a step | |")
    print("|---|---|---|")
    for name, seconds in found.items():
        median = statistics.median(seconds)
        spread = f"[{min(seconds):.3g}, {max(seconds):.3g}]"
        print(f"| {name} | {median:.3g} {spread} | ×{median / first:.2f} |")


def measured(step, steps):
    """Seconds of some steps, after two that are not counted."""
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def token_ids():
    return np.random.default_rng(0).integers(4000, VOCABULARY, (ROWS, LENGTH))


def of_torch(model):
    import torch

    model.train()
    ids = torch.from_numpy(token_ids())

    def step():
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def of_jax(loss, parameters):
    import jax

    gradient = jax.jit(jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(gradient(parameters))


def torch_step(checkpoint):
    from gemma_hub_torch import GemmaForCausalLM

    return of_torch(GemmaForCausalLM.from_pretrained(checkpoint, dtype="float32"))


def transformers_step(checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    return of_torch(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))


def flax_step(checkpoint):
    from flax import nnx

    from gemma_hub_flax import FlaxGemmaForCausalLM

    model = FlaxGemmaForCausalLM.from_pretrained(checkpoint, dtype="float32")
    structure, parameters = nnx.split(model)
    ids = token_ids()

    def loss(parameters):
        return nnx.merge(structure, parameters)(ids, labels=ids, use_cache=False).loss

    return of_jax(loss, parameters)


def transformers_flax_step(checkpoint):
    import jax
    import jax.numpy as jnp
    from transformers import FlaxGemmaForCausalLM

    model = FlaxGemmaForCausalLM.from_pretrained(checkpoint, dtype=jnp.float32)
    parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), model.params)
    ids = jnp.asarray(token_ids())

    def loss(parameters):
        out = model(ids, params=parameters, train=True, dropout_rng=jax.random.key(0))
        scores = jax.nn.log_softmax(out.logits[:, :-1])
        return -jnp.take_along_axis(scores, ids[:, 1:, None], -1).mean()

    return of_jax(loss, parameters)


def keras_hub_step(checkpoint):
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    import keras_hub

    backbone = keras_hub.models.GemmaBackbone.from_preset(checkpoint, dtype="float32")
    model = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(1e-9), loss=loss)
    ids = token_ids().astype(np.int32)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    return lambda: model.train_on_batch(inputs, np.roll(ids, -1, 1))


STEPS = {
    "torch": torch_step,
    "transformers": transformers_step,
    "flax": flax_step,
    "transformers-flax": transformers_flax_step,
    "keras-hub-jax": keras_hub_step,
}


if __name__ == "__main__":
    main()
