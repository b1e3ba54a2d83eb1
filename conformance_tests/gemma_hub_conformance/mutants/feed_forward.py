"""Bugs in the feed-forward part."""

import math

import numpy as np

from gemma_hub_conformance.mutants.bank import Bank, to_bfloat16
from gemma_hub_numpy.model import Array, Reference

bank = Bank()
FORWARD = "L2.forward.gqa.no_padding"


@bank.mutant(FORWARD, "Gemma's GELU is the tanh form, also where a config says 'gelu'.")
class MlpGeluErf(Reference):
    def activation(self, x: Array) -> Array:
        erf = np.vectorize(math.erf)
        return np.asarray(0.5 * x * (1 + erf(x / math.sqrt(2))))


@bank.mutant(FORWARD, "Gemma's GELU is the tanh form, not x * sigmoid(1.702 x).")
class MlpQuickGelu(Reference):
    def activation(self, x: Array) -> Array:
        return np.asarray(x / (1 + np.exp(-1.702 * x)))


@bank.mutant(FORWARD, "Gemma's activation is GELU, not SiLU.")
class MlpSilu(Reference):
    def activation(self, x: Array) -> Array:
        return np.asarray(x / (1 + np.exp(-x)))


@bank.mutant("L2.forward.one_token", "The constant in GELU is 0.044715.")
class MlpGeluConstant(Reference):
    def activation(self, x: Array) -> Array:
        inner = math.sqrt(2 / math.pi) * (x + 0.0447 * x**3)
        return np.asarray(0.5 * x * (1 + np.tanh(inner)))


@bank.mutant(FORWARD, "Compute GELU in float32.")
class MlpGeluInBf16(Reference):
    def activation(self, x: Array) -> Array:
        return to_bfloat16(super().activation(x))


@bank.mutant(FORWARD, "The activation belongs to the gate.")
class MlpGateUpSwap(Reference):
    def mlp(self, i: int, x: Array) -> Array:
        at = f"model.layers.{i}.mlp"
        up = self.activation(self.linear(x, f"{at}.up_proj"))
        return self.linear(self.linear(x, f"{at}.gate_proj") * up, f"{at}.down_proj")


@bank.mutant(FORWARD, "The activation is applied before the product with up.")
class MlpActivationOfProduct(Reference):
    def mlp(self, i: int, x: Array) -> Array:
        at = f"model.layers.{i}.mlp"
        product = self.linear(x, f"{at}.gate_proj") * self.linear(x, f"{at}.up_proj")
        return self.linear(self.activation(product), f"{at}.down_proj")


@bank.mutant("L2.forward.square.no_padding", "gate_proj is the gate, up_proj is not.")
class CkptExchangedSquare(Reference):
    def parameter(self, name: str) -> Array:
        value = super().parameter(name)
        if "gate_proj" in name and value.shape[0] == value.shape[-1]:
            return super().parameter(name.replace("gate_proj", "up_proj"))
        return value
