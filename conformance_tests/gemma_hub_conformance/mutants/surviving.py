"""Bugs that survived all other cases when they were written; those of `combinations` kill them."""

import dataclasses
from typing import Any

import numpy as np

from gemma_hub.backend import Cache
from gemma_hub.inputs import ModelInputs
from gemma_hub.labels import IGNORED
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import ArrayWeights, Weights
from gemma_hub_conformance.mutants.bank import Bank, StandInModel, to_bfloat16
from gemma_hub_numpy.losses import labels_of
from gemma_hub_numpy.model import Array, Gradients, LayerCache, Reference

bank = Bank()
WIDE = "L2.lengths.released_widths"
LONG = "L2.lengths.long"
VOCABULARY = "L2.lengths.large_vocabulary"
SAME_IDS = "L2.calls.same_ids"


# -- ranges that the designed checkpoints do not reach -------------------------------------------


@bank.mutant("L2.ranges.large_scores", "The largest score is taken off before the exponential.")
class SoftmaxWithoutMaximum(Reference):
    def softmax(self, scores: Array, visible: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            powers = np.exp(np.where(visible[:, None], scores, -1e30).astype(np.float32))
            total = np.maximum(powers.sum(axis=-1, keepdims=True), 1e-30)
            return np.asarray(powers / total, np.float64)


@bank.mutant("L2.ranges.large_scores", "A score has no limit where the config has no cap.")
class ScoresClipped(Reference):
    def scores(self, q: Array, k: Array) -> Array:
        return np.asarray(np.clip(super().scores(q, k), -30.0, 30.0))


@bank.mutant(
    "L2.ranges.large_gates", "A tanh by exponentials is 1 far out, not infinity by itself."
)
class GeluTanhOverflows(Reference):
    def activation(self, x: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            inner = np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3).astype(np.float32)
            power = np.exp(2 * inner)
            return np.asarray(0.5 * x * (1 + (power - 1) / (power + 1)), np.float64)


@bank.mutant("L2.ranges.large_gates", "GELU goes on rising where a table of it ends.")
class GeluTableEnds(Reference):
    def activation(self, x: Array) -> Array:
        return super().activation(np.clip(x, -8.0, 8.0))


@bank.mutant("L2.laws.stream_scaled", "The residual stream has the range of float32.")
class ResidualSaturates(Reference):
    def block(self, i: int, x: Array, *args: Any) -> Array:
        return np.asarray(np.clip(super().block(i, x, *args), -65504.0, 65504.0))


@bank.mutant("L2.laws.head_scaled", "A logit has no limit where the config has no cap.")
class LogitsClipped(Reference):
    def head(self, x: Array) -> Array:
        return np.asarray(np.clip(super().head(x), -50.0, 50.0))


# -- sizes of released models --------------------------------------------------------------------


@bank.mutant(WIDE, "A head may have 256 features.")
class HeadCutAtOneTwentyEight(Reference):
    def scores(self, q: Array, k: Array) -> Array:
        return super().scores(q[..., :128], k[..., :128])


@bank.mutant(WIDE, "A norm is over more features than one block of threads has.")
class NormOfFirstThousand(Reference):
    def rms_norm(self, x: Array, weight: Array) -> Array:
        mean_square = np.mean(x[..., :1024] ** 2, axis=-1, keepdims=True)
        root = np.sqrt(mean_square + self.config.rms_norm_eps)
        return np.asarray(x / root * self.norm_factor(weight))


@bank.mutant(LONG, "A row of scores may be longer than 512.")
class KeysPastFiveTwelveUnseen(Reference):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        own = np.arange(start, start + T)[:, None]
        slots = np.arange(valid.shape[1])
        seen = super().visible(valid, start, T, layer)
        return np.asarray(seen & ((slots < 512) | (slots == own)))


@bank.mutant(VOCABULARY, "Ids do not fit into 16 bits.")
class IdsInUintSixteen(Reference):
    def embed(self, ids: Array) -> Array:
        return super().embed(ids % 2**16)


@bank.mutant("L2.lengths.rows_17", "A batch may have more rows than a tile.")
class RowsPastEightRepeated(StandInModel):
    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        outputs = super().forward(inputs)
        if outputs.logits is not None and len(outputs.logits) > 8:
            outputs.logits[8:] = outputs.logits[7]
        return outputs


@bank.mutant("L5.export.sequence", "The head of a classifier is a parameter too.")
class ExportWithoutScore(StandInModel):
    def export(self) -> Weights:
        weights = super().export()
        names = [name for name in weights.names() if not name.startswith("score")]
        return ArrayWeights({name: weights.read(name) for name in names})


@bank.mutant("L5.export.token", "The bias of a head comes back as it is.")
class ExportBiasRounded(StandInModel):
    def export(self) -> Weights:
        weights = super().export()
        arrays = {name: weights.read(name) for name in weights.names()}
        if "score.bias" in arrays:
            arrays["score.bias"] = to_bfloat16(arrays["score.bias"]).astype(np.float32)
        return ArrayWeights(arrays)


# -- calls one after the other -------------------------------------------------------------------


@bank.mutant("L2.calls.shapes", "A shorter call returns its own logits.")
class LongestCallReturned(StandInModel):
    """Keeps one buffer of logits and returns the end of it."""

    _buffer: Array | None = None

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        outputs = super().forward(inputs)
        if outputs.logits is None or outputs.logits.ndim != 3:
            return outputs
        B, T, _ = outputs.logits.shape
        if self._buffer is None or self._buffer.shape[:2] < (B, T):
            self._buffer = np.zeros_like(outputs.logits)
        if len(self._buffer) < B or self._buffer.shape[1] < T:
            return outputs
        self._buffer[:B, :T] = outputs.logits
        return dataclasses.replace(outputs, logits=self._buffer[:B, -T:].copy())


@bank.mutant(SAME_IDS, "The same ids under another mask are another call.")
class AnswersByIds(StandInModel):
    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        if inputs.input_ids is None or inputs.labels is not None:
            return super().forward(inputs)
        if not hasattr(self, "_answers"):
            self._answers: dict[tuple[object, ...], ModelOutputs] = {}
        flags = (inputs.logits_to_keep, inputs.output_hidden_states, inputs.output_attentions)
        key = (inputs.input_ids.shape, inputs.input_ids.tobytes(), *flags)
        if key not in self._answers:
            self._answers[key] = super().forward(inputs)
        return self._answers[key]


class _Beside(Reference):
    """Is not causal where something else is asked for and nothing is padding."""

    asked = ""
    _leaks = False

    def run(self, inputs: ModelInputs, *args: Any, **kwargs: Any) -> ModelOutputs:
        self._leaks = bool(getattr(inputs, self.asked)) and bool(inputs.attention_mask.all())
        return super().run(inputs, *args, **kwargs)

    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        seen = super().visible(valid, start, T, layer)
        return np.repeat(valid[:, None, :], T, axis=1) if self._leaks else seen


@bank.mutant("L2.calls.beside_attentions", "Asking for attentions changes no logit.")
class AttentionsPathUncausal(_Beside):
    asked = "output_attentions"


@bank.mutant("L2.calls.beside_states", "Asking for hidden states changes no logit.")
class StatesPathUncausal(_Beside):
    asked = "output_hidden_states"


@bank.mutant("L2.logits_to_keep.right_padding", "The last slots are kept, padding or not.")
class KeepsLastRealTokens(StandInModel):
    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        keep = inputs.logits_to_keep
        if not keep:
            return super().forward(inputs)
        outputs = super().forward(dataclasses.replace(inputs, logits_to_keep=0))
        slots = np.arange(inputs.shape[1])
        last = np.where(inputs.attention_mask, slots, 0).max(axis=1)
        chosen = np.maximum(last[:, None] + np.arange(1 - keep, 1), 0)
        logits = np.take_along_axis(outputs.logits, chosen[..., None], axis=1)
        return dataclasses.replace(outputs, logits=logits)


# -- a cache, and what else the model has --------------------------------------------------------


class _Decoding(Reference):
    """Knows whether it is taking one token with a cache."""

    _decodes = False

    def block(
        self, i: int, x: Array, positions: Array, valid: Array, start: int,
        cache: list[LayerCache] | None,
    ) -> Array:  # fmt: skip
        self._decodes = cache is not None and start > 0 and x.shape[1] == 1
        return super().block(i, x, positions, valid, start, cache)


@bank.mutant("L2.cache.sliding_window.left_padding", "One-token steps have the window too.")
class SwaMissingInDecode(_Decoding):
    def visible(self, valid: Array, start: int, T: int, layer: int) -> Array:
        seen = super().visible(valid, start, T, layer)
        return valid[:, None, :] if self._decodes else seen


@bank.mutant("L2.cache.softcap.left_padding", "One-token steps have the caps too.")
class DecodeWithoutCap(_Decoding):
    def soft_cap(self, x: Array, cap: float | None) -> Array:
        return x if self._decodes else super().soft_cap(x, cap)


@bank.mutant("L2.cache.bias.left_padding", "One-token steps have the biases too.")
class DecodeWithoutBias(_Decoding):
    def linear(self, x: Array, name: str) -> Array:
        if self._decodes:
            return self.contract("bti,oi->bto", x, self.parameter(f"{name}.weight"))
        return super().linear(x, name)


@bank.mutant("L2.cache.linear_rope.left_padding", "One-token steps scale positions too.")
class DecodeWithoutRopeScaling(_Decoding):
    def angles(self, positions: Array, layer: int) -> Array:
        factor = self.config.layers[layer].rope_factor if self._decodes else 1.0
        return super().angles(positions * factor, layer)


@bank.mutant("L2.cache.small_limit.left_padding", "The limit cuts no feature in a step either.")
class DecodeTableTruncated(_Decoding):
    def rotate(self, x: Array, angles: Array) -> Array:
        kept = np.arange(x.shape[-1]) < self.config.max_position_embeddings
        return np.where(kept | (not self._decodes), super().rotate(x, angles), x)


@bank.mutant("L2.cache.inputs_embeds", "extend takes embeddings as forward does.")
class ExtendRescalesEmbeds(StandInModel):
    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        if inputs.inputs_embeds is not None:
            scaled = inputs.inputs_embeds * np.float32(self.native.config.embedding_scale)
            inputs = dataclasses.replace(inputs, inputs_embeds=scaled)
        return super().extend(inputs, cache)


@bank.mutant("L2.cache.sizes", "A second cache has its own size.")
class CacheSizeOfFirst(StandInModel):
    """Compiles for the first cache and makes all later ones so."""

    _size: tuple[int, int] | None = None

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        cache = super().init_cache(batch_size, max_length)
        self._size = self._size or (batch_size, max_length)
        short = [
            (keys[:, : self._size[1]], values[:, : self._size[1]]) for keys, values in cache.arrays
        ]
        padded = [
            tuple(np.resize(each, (batch_size, max_length, *each.shape[2:])) for each in pair)
            for pair in short
        ]
        self._limit = self._size[1]
        return dataclasses.replace(cache, arrays=padded)

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        outputs, after = super().extend(inputs, cache)
        for keys, values in after.arrays:
            keys[:, self._limit :] = 0.0
            values[:, self._limit :] = 0.0
        return outputs, after


# -- losses --------------------------------------------------------------------------------------


@bank.mutant("L5.causal.loss.first_label", "The last token of a row predicts nothing.")
class LossShiftAcrossRows(Reference):
    """Shifts the flat batch, so that a row's last token predicts the next row's first."""

    def causal_loss(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        flat = logits.reshape(1, -1, logits.shape[-1])
        return super().causal_loss(flat, labels.reshape(1, -1), num_items)


@bank.mutant("L5.causal.loss.first_label", "A row's first label is in no count.")
class LossFirstLabelCounted(Reference):
    def causal_loss(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        count = int((labels != IGNORED).sum()) if num_items is None else num_items
        return super().causal_loss(logits, labels, count)


@bank.mutant("L5.causal.loss.large_logits", "A loss takes the largest logit off first.")
class LossExpOverflows(Reference):
    def log_softmax(self, logits: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.exp(logits.astype(np.float32)).sum(axis=-1, keepdims=True)
            return np.asarray(logits - np.log(total), np.float64)


@bank.mutant("L5.sequence.loss.large_logits", "log(sigmoid(x)) is x far out, not log(0).")
class LossSigmoidUnderflows(Reference):
    def binary_cross_entropy(self, logits: Array, labels: Array) -> Array:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            probs = 1 / (1 + np.exp(-logits.astype(np.float32)))
            terms = labels * np.log(probs) + (1 - labels) * np.log(1 - probs)
            return np.asarray(-np.where(np.isfinite(terms), terms, -100.0).mean())


# -- gradients -----------------------------------------------------------------------------------


@bank.mutant("L5.gradients.causal.num_items", "num_items_in_batch divides the gradient too.")
class GradNumItemsIgnored(Reference):
    def token_loss_backward(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        return super().token_loss_backward(logits, labels, None)


@bank.mutant("L5.gradients.causal.softcap", "A cap has a slope.")
class GradWithoutCap(Reference):
    def soft_cap_backward(self, d: Array, capped: Array, cap: float | None) -> Array:
        return d


@bank.mutant("L5.gradients.causal.linear_rope", "The rotation is undone by the scaled angle.")
class GradWithoutRopeScaling(Reference):
    def rotate_backward(self, d: Array, angles: Array) -> Array:
        return super().rotate_backward(d, angles * self.config.layers[0].rope_factor)


@bank.mutant("L5.gradients.causal.pad_id_label", "A label that is the pad id has a gradient.")
class GradPadLabelIgnored(Reference):
    def loss_backward(self, logits: Array, inputs: ModelInputs) -> Array:
        d = super().loss_backward(logits, inputs)
        if self.task == "causal_lm" and self.config.pad_token_id is not None:
            d[:, :-1][labels_of(inputs)[:, 1:] == self.config.pad_token_id] = 0.0
        return d


@bank.mutant("L5.gradients.causal.fully_masked_row", "A row of padding makes no gradient NaN.")
class GradNanOfMaskedRow(Reference):
    """The gradient of a maximum of nothing but -inf."""

    def softmax_backward(self, d: Array, probs: Array, visible: Array) -> Array:
        found = super().softmax_backward(d, probs, visible)
        found[~visible.any(axis=(1, 2))] = np.nan
        return found


@bank.mutant("L5.gradients.causal.dropout", "Gradients are without dropout.")
class GradWithDropout(Reference):
    def softmax_backward(self, d: Array, probs: Array, visible: Array) -> Array:
        rate = self.config.attention_dropout
        kept = np.random.default_rng(0).random(probs.shape) >= rate
        return super().softmax_backward(d * kept / (1 - rate), probs, visible)


@bank.mutant("L5.gradients.other_labels", "Gradients are those of this call's labels.")
class GradOfFirstLabels(StandInModel):
    _kept: Gradients | None = None

    def loss_and_gradients(self, inputs: ModelInputs) -> tuple[float, Gradients]:
        loss, gradients = super().loss_and_gradients(inputs)
        self._kept = self._kept or gradients
        return loss, self._kept


@bank.mutant("L5.gradients.causal.first_label", "A row's first label has no gradient.")
class GradShiftAcrossRows(Reference):
    def causal_loss_backward(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        flat = logits.reshape(1, -1, logits.shape[-1])
        return (
            super()
            .causal_loss_backward(flat, labels.reshape(1, -1), num_items)
            .reshape(logits.shape)
        )


@bank.mutant("L5.gradients.causal.sliding_window", "Recomputed probabilities have the window.")
class GradWithoutWindow(Reference):
    """A fused backward that computes the probabilities anew, under a causal mask only."""

    def attention_backward(
        self, d: Array, i: int, tape: dict[str, Array], into: Gradients
    ) -> Array:
        at = f"model.layers.{i}.self_attn"
        visible = tape[f"{at}.visible"]
        T = visible.shape[1]
        seen = np.asarray(visible.any(axis=1))
        wide = seen[:, None, :] & np.tri(T, dtype=np.bool_)
        probs = self.softmax(tape[f"{at}.scores"], wide)
        return super().attention_backward(
            d, i, tape | {f"{at}.visible": wide, f"{at}.probs": probs}, into
        )
