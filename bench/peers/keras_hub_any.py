"""KerasHub on the framework that the request names: its own generate, greedy."""

import os

import numpy as np

DISTRIBUTIONS = ("keras-hub", "keras", "jax", "jaxlib", "torch", "numpy")


def start(request):
    os.environ["KERAS_BACKEND"] = request["keras_backend"]
    import keras_hub  # noqa: F401


def load(request):
    import keras
    import keras_hub

    backbone = keras_hub.models.GemmaBackbone.from_preset(
        request["checkpoint"], dtype=request["dtype"]
    )
    model = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy")

    def generate(ids, new):
        rows, length = ids.shape
        tokens = np.zeros((rows, length + new), np.int32)
        tokens[:, :length] = ids
        mask = np.zeros((rows, length + new), np.int32)
        mask[:, :length] = 1
        made = model.generate({"token_ids": tokens, "padding_mask": mask}, stop_token_ids=None)
        return keras.ops.convert_to_numpy(made["token_ids"])[:, length:]

    return generate
