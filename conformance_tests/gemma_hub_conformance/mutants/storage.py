"""Bugs between the checkpoint's tensors and the model's."""

from collections.abc import Callable

import numpy as np

from gemma_hub.backend import BuildOptions, TaskSpec
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, ArrayWeights, Weights, parameter_shapes
from gemma_hub_conformance.mutants.bank import Bank, StandInBackend, StandInModel
from gemma_hub_numpy.model import Array, Reference

bank = Bank()
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _changed(weights: Weights, change: Callable[[str, np.ndarray], np.ndarray]) -> ArrayWeights:
    return ArrayWeights({name: change(name, weights.read(name)) for name in weights.names()})


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(array).astype(DTYPES[dtype])


# -- out of the model ------------------------------------------------------------------------------


@bank.mutant("L6.checkpoint.saved.gqa", "A norm's weight is saved without the 1 that is added.")
class SavedNormsFolded(StandInModel):
    def export(self) -> Weights:
        return _changed(super().export(), lambda name, x: x + 1 if "norm" in name else x)


@bank.mutant("L6.checkpoint.saved.untied", "A head that is not tied is saved as it is.")
class SavedHeadIsEmbedding(StandInModel):
    def export(self) -> Weights:
        weights = super().export()
        return _changed(weights, lambda name, x: weights.read(EMBEDDING) if name == HEAD else x)


@bank.mutant("L6.checkpoint.saved.gqa_bfloat16", "A parameter is saved in the type that it has.")
class SavedInFloat32(StandInModel):
    def export(self) -> Weights:
        return _changed(super().export(), lambda _, x: _cast(x, "float32"))


@bank.mutant("L6.checkpoint.saved.gqa_float16", "The two types of 16 bits are not one.")
class SavedFloat16AsBfloat16(StandInModel):
    def export(self) -> Weights:
        return _changed(
            super().export(),
            lambda _, x: x.view(DTYPES["bfloat16"]) if x.dtype == np.float16 else x,
        )


@bank.mutant("L6.checkpoint.widened", "A parameter is saved in the type that it has in the model.")
class SavedInTheTypeOfTheEmbedding(StandInModel):
    def export(self) -> Weights:
        weights = super().export()
        return _changed(weights, lambda _, x: _cast(x, weights.dtype(EMBEDDING)))


# -- into the model --------------------------------------------------------------------------------


class _Loads(StandInBackend):
    """Builds a causal language model on other weights than it is given."""

    def loaded(self, config: GemmaConfig, weights: Weights) -> Weights:
        raise NotImplementedError

    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> StandInModel:
        if task.name == "causal_lm":
            weights = self.loaded(config, weights)
        return StandInBackend.build(self, config, task, weights, options)


def _by_way_of_float16(weights: Weights) -> ArrayWeights:
    return _changed(weights, lambda _, x: _cast(_cast(x, "float16"), x.dtype.name))


@bank.mutant("L6.checkpoint.saved_again", "Read tensors of a file as exactly as those in memory.")
class MappedTensorsRounded(_Loads):
    def loaded(self, config: GemmaConfig, weights: Weights) -> Weights:
        return weights if isinstance(weights, ArrayWeights) else _by_way_of_float16(weights)


@bank.mutant("L6.checkpoint.missing", "Only a config that ties the head lets it be missing.")
class MissingHeadIsTied(_Loads):
    def loaded(self, config: GemmaConfig, weights: Weights) -> Weights:
        if HEAD in weights.names() or config.tie_word_embeddings:
            return weights
        arrays = {name: weights.read(name) for name in weights.names()}
        return ArrayWeights({**arrays, HEAD: arrays[EMBEDDING]})


@bank.mutant("L6.checkpoint.misshapen", "A tensor has the shape that the config calls for.")
class ShapesUnchecked(StandInBackend):
    def build(
        self, config: GemmaConfig, task: TaskSpec, weights: Weights, options: BuildOptions
    ) -> StandInModel:
        try:
            return StandInBackend.build(self, config, task, weights, options)
        except CheckpointError:
            if not set(parameter_shapes(config, task.name)) <= set(weights.names()):
                raise
            return self.model(self.reference(config, weights, task.name))


@bank.mutant("L6.checkpoint.surplus", "The config says whether the head is tied, not the file.")
class StoredHeadWins(Reference):
    def head_name(self) -> str:
        return HEAD if HEAD in self.weights.names() else super().head_name()


@bank.mutant("L6.checkpoint.surplus", "The config says whether there are biases, not the file.")
class StoredBiasWins(Reference):
    def linear(self, x: Array, name: str) -> Array:
        y, bias = super().linear(x, name), f"{name}.bias"
        is_surplus = bias in self.weights.names() and bias not in self.shapes
        return y + self.parameter(bias) if is_surplus else y


@bank.mutant("L6.checkpoint.widened", "A tensor is cast once, from its own type to the model's.")
class WidenedByWayOfFloat16(_Loads):
    def loaded(self, config: GemmaConfig, weights: Weights) -> Weights:
        kinds = {weights.dtype(name) for name in weights.names()}
        return _by_way_of_float16(weights) if len(kinds) > 1 else weights


@bank.mutant("L6.checkpoint.reordered", "A tensor is found by its name.")
class FoundByShape(_Loads):
    """Takes the tensors of each shape in the order in which they come."""

    def loaded(self, config: GemmaConfig, weights: Weights) -> Weights:
        left = list(weights.names())
        arrays = {}
        for name, shape in parameter_shapes(config).items():
            found = next((other for other in left if weights.shape(other) == shape), None)
            if found is None:
                return weights  # and be refused
            left.remove(found)
            arrays[name] = weights.read(found)
        return ArrayWeights(arrays)


@bank.mutant("L6.checkpoint.source_kept", "Fold a constant into a copy of a tensor.")
class FoldsIntoTheSource(_Loads):
    """Adds the norms' 1 where the tensor lies, once the model has what it needs."""

    def loaded(self, config: GemmaConfig, weights: Weights) -> Weights:
        held = _changed(weights, lambda _, x: x.copy())
        for name in weights.names():
            array = weights.read(name)
            if "norm" in name and array.flags.writeable:
                array += 1
        return held
