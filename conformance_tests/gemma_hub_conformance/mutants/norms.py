"""Bugs in RMSNorm, in where the norms stand, and in the residual stream."""

from typing import Any

import numpy as np

from gemma_hub_conformance.mutants.bank import Bank, to_bfloat16
from gemma_hub_numpy.model import Array, Reference

bank = Bank()
FORWARD = "L2.forward.gqa.no_padding"


@bank.mutant("L2.liveness.rms_norm_eps", "Use the config's rms_norm_eps.")
class NormEpsIgnored(Reference):
    def rms_norm(self, x: Array, weight: Array) -> Array:
        root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return np.asarray(x / root * self.norm_factor(weight))


@bank.mutant(FORWARD, "Add epsilon to the mean square, under the root.")
class NormEpsOutsideSqrt(Reference):
    def rms_norm(self, x: Array, weight: Array) -> Array:
        root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + self.config.rms_norm_eps
        return np.asarray(x / root * self.norm_factor(weight))


@bank.mutant(FORWARD, "The norm multiplies by 1 + weight.")
class NormWithoutOffset(Reference):
    def norm_factor(self, weight: Array) -> Array:
        return weight


@bank.mutant(FORWARD, "The norm adds 1 to the weight once; the file holds the weight without it.")
class NormOffsetTwice(Reference):
    def norm_factor(self, weight: Array) -> Array:
        return 2.0 + weight


@bank.mutant("L2.liveness.rms_norm_offset", "Use the config's rms_norm_offset.")
class NormOffsetHardCoded(Reference):
    def norm_factor(self, weight: Array) -> Array:
        return 1.0 + weight


@bank.mutant(FORWARD, "RMSNorm does not subtract the mean.")
class NormSubtractsMean(Reference):
    def rms_norm(self, x: Array, weight: Array) -> Array:
        return super().rms_norm(x - x.mean(axis=-1, keepdims=True), weight)


@bank.mutant(FORWARD, "Divide by the root of the mean, not of the sum.")
class NormL2(Reference):
    def rms_norm(self, x: Array, weight: Array) -> Array:
        return np.asarray(super().rms_norm(x, weight) / np.sqrt(self.config.hidden_size))


@bank.mutant(FORWARD, "Compute the norm in float32.")
class NormInBf16(Reference):
    def rms_norm(self, x: Array, weight: Array) -> Array:
        return to_bfloat16(super().rms_norm(x, weight))


@bank.mutant(FORWARD, "input_layernorm stands before attention, the other before the MLP.")
class NormOrderSwapped(Reference):
    def parameter(self, name: str) -> Array:
        one, other = "input_layernorm", "post_attention_layernorm"
        if one in name:
            name = name.replace(one, other)
        elif other in name:
            name = name.replace(other, one)
        return super().parameter(name)


@bank.mutant(FORWARD, "post_attention_layernorm is the norm before the MLP.")
class NormG1PostattnMisread(Reference):
    def block(self, i: int, x: Array, *args: Any) -> Array:
        at = f"model.layers.{i}"
        normed = self.rms_norm(x, self.parameter(f"{at}.input_layernorm.weight"))
        attended = self.attention(i, normed, *args)
        weight = self.parameter(f"{at}.post_attention_layernorm.weight")
        x = x + self.rms_norm(attended, weight)
        return np.asarray(x + self.mlp(i, x))


@bank.mutant(FORWARD, "The residual is what came in, not its norm.")
class NormInplaceResidual(Reference):
    def block(self, i: int, x: Array, *args: Any) -> Array:
        at = f"model.layers.{i}"
        x = self.rms_norm(x, self.parameter(f"{at}.input_layernorm.weight"))
        x = x + self.attention(i, x, *args)
        weight = self.parameter(f"{at}.post_attention_layernorm.weight")
        return np.asarray(x + self.mlp(i, self.rms_norm(x, weight)))


@bank.mutant(FORWARD, "The MLP reads the residual stream after attention was added.")
class ParallelBlock(Reference):
    def block(self, i: int, x: Array, *args: Any) -> Array:
        at = f"model.layers.{i}"
        first = self.rms_norm(x, self.parameter(f"{at}.input_layernorm.weight"))
        second = self.rms_norm(x, self.parameter(f"{at}.post_attention_layernorm.weight"))
        return np.asarray(x + self.attention(i, first, *args) + self.mlp(i, second))


@bank.mutant(FORWARD, "Add the MLP's output to the residual stream.")
class MlpResidualMissing(Reference):
    def block(self, i: int, x: Array, *args: Any) -> Array:
        after = super().block(i, x, *args)
        if i < self.config.num_hidden_layers - 1:
            return after
        at = f"model.layers.{i}"
        normed = self.rms_norm(x, self.parameter(f"{at}.input_layernorm.weight"))
        return np.asarray(after - x - self.attention(i, normed, *args))


@bank.mutant(FORWARD, "Layer i uses the parameters of layer i.")
class NormLayerIndexReuse(Reference):
    def block(self, i: int, x: Array, *args: Any) -> Array:
        return super().block(self.config.num_hidden_layers - 1 - i, x, *args)


@bank.mutant(FORWARD, "Run every layer.")
class LastLayerMissing(Reference):
    def block(self, i: int, x: Array, *args: Any) -> Array:
        return x if i == self.config.num_hidden_layers - 1 else super().block(i, x, *args)


@bank.mutant(FORWARD, "The final norm stands before the head.")
class NormFinalMissing(Reference):
    def final_norm(self, x: Array) -> Array:
        return x


@bank.mutant(FORWARD, "The final norm is applied once.")
class NormFinalTwice(Reference):
    def final_norm(self, x: Array) -> Array:
        return super().final_norm(super().final_norm(x))
