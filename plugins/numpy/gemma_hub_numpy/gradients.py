"""The gradients of every parameter: reverse mode, written out by hand.

Each operation of `Layers`, `Heads` and `Losses` that a gradient passes has its backward here, under
its name with `_backward`. It takes `d`, the gradient of the loss by the operation's result, and
gives the gradients by its arguments; what a parameter gets is added to `into`. Intermediate results
come from the tape, under the names that `keep` gave them.

What has no gradient: a masked score, which is a constant; the embedding's row of `pad_token_id`
where it is looked up, as in Transformers (a tied head gives that row a gradient like any other).
"""

import math

import numpy as np

from gemma_hub.inputs import ModelInputs
from gemma_hub.labels import IGNORED
from gemma_hub_numpy.arithmetic import Array
from gemma_hub_numpy.heads import Heads, pooled_positions_of
from gemma_hub_numpy.losses import Losses, labels_of

Gradients = dict[str, Array]
Tape = dict[str, Array]


class Backward(Heads, Losses):
    """From a taped call to the gradient of each parameter."""

    def gradients(self, inputs: ModelInputs, tape: Tape) -> Gradients:
        """{name: gradient} for every parameter, zeros where the loss does not depend on it.

        Args:
            inputs: of the taped call, with labels.
            tape: what it kept.
        """
        into: Gradients = {}
        d = self.loss_backward(tape["logits"], inputs)
        d = self.logits_backward(d, inputs, tape, into)
        d = self.rms_norm_backward(d, tape["model.norm.x"], "model.norm.weight", into)
        for i in reversed(range(self.config.num_hidden_layers)):
            d = self.block_backward(d, i, tape, into)
        d = self.store(d * self.embedding_scale())
        if inputs.input_ids is not None:
            self.embed_backward(d, inputs.input_ids, into)
        return {
            name: into[name] if name in into else np.zeros(shape)
            for name, shape in self.shapes.items()
        }

    def add_gradient(self, into: Gradients, name: str, value: Array) -> None:
        """Add one use of a parameter to its gradient."""
        value = self.store(value)
        into[name] = self.store(into[name] + value) if name in into else value

    # -- losses --------------------------------------------------------------------------------

    def loss_backward(self, logits: Array, inputs: ModelInputs) -> Array:
        """The gradient by the logits, in their shape."""
        labels = labels_of(inputs)
        if self.task == "causal_lm":
            return self.causal_loss_backward(logits, labels, inputs.num_items_in_batch)
        if self.task == "token_classification":
            return self.token_loss_backward(logits, labels, inputs.num_items_in_batch)
        return self.sequence_loss_backward(logits, labels)

    def causal_loss_backward(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        shifted, labels = self.shift(logits, labels)
        d = np.zeros(logits.shape)
        d[:, :-1] = self.token_loss_backward(shifted, labels, num_items)
        return d

    def token_loss_backward(self, logits: Array, labels: Array, num_items: int | None) -> Array:
        divisor = self.divisor(labels, num_items)
        flat = logits.reshape(-1, logits.shape[-1])
        return self.cross_entropy_backward(flat, labels.ravel(), divisor).reshape(logits.shape)

    def sequence_loss_backward(self, logits: Array, labels: Array) -> Array:
        kind = self.problem_type(labels)
        if kind == "single_label_classification":
            return self.cross_entropy_backward(logits, labels, len(labels))
        if kind == "regression":
            values = logits.reshape(labels.shape)
            return self.squared_error_backward(values, labels).reshape(logits.shape)
        return self.binary_cross_entropy_backward(logits, labels)

    def cross_entropy_backward(self, logits: Array, labels: Array, divisor: int) -> Array:
        """(probability - 1 at the label) / divisor; nothing for a row that does not count."""
        d = self.single(np.exp(self.log_softmax(logits)))
        rows = np.flatnonzero(labels != IGNORED)
        d[rows, labels[rows]] = self.single(d[rows, labels[rows]] - 1)
        return self.single(np.where((labels != IGNORED)[:, None], d, 0.0) / divisor)

    def squared_error_backward(self, values: Array, labels: Array) -> Array:
        difference = self.single(values - self.single(labels))
        return self.single(2 * difference / labels.size)

    def binary_cross_entropy_backward(self, logits: Array, labels: Array) -> Array:
        # The sigmoid as (1 + tanh(x / 2)) / 2 has no exp that could be past the range.
        probs = self.single(0.5 + 0.5 * self.single(np.tanh(logits / 2)))
        return self.single(self.single(probs - self.single(labels)) / labels.size)

    # -- heads ---------------------------------------------------------------------------------

    def logits_backward(self, d: Array, inputs: ModelInputs, tape: Tape, into: Gradients) -> Array:
        """From the logits to the final norm's output."""
        x = tape["model.norm.y"]
        if self.task == "causal_lm":
            return self.head_backward(d, x, tape["logits"], into)
        if self.task == "sequence_classification":
            d = self.pool_backward(d, pooled_positions_of(inputs), x.shape[1])
        return self.linear_backward(self.store(d), x, "score", into)

    def head_backward(self, d: Array, x: Array, logits: Array, into: Gradients) -> Array:
        d = self.store(self.soft_cap_backward(d, logits, self.config.final_logit_softcapping))
        self.add_gradient(into, self.head_name(), self.contract("btv,btd->vd", d, x))
        total, first = np.zeros(x.shape), 0
        for rows in self.head_rows():
            part = d[..., first : first + len(rows)]
            total = total + self.contract("btv,vd->btd", part, rows)
            first += len(rows)
        return self.store(total)

    def pool_backward(self, d: Array, pooled_positions: Array, T: int) -> Array:
        """(B, C) to (B, T, C): zero at every other token."""
        spread = np.zeros((len(d), T, d.shape[-1]))
        spread[np.arange(len(d)), pooled_positions] = d
        return spread

    # -- linear layers and the norm ------------------------------------------------------------

    def linear_backward(self, d: Array, x: Array, name: str, into: Gradients) -> Array:
        """By `x`; the matrix, and the bias if there is one, get theirs."""
        self.add_gradient(into, f"{name}.weight", self.contract("bto,bti->oi", d, x))
        if f"{name}.bias" in self.shapes:
            ones = np.ones(d.shape[:2])
            self.add_gradient(into, f"{name}.bias", self.contract("bto,bt->o", d, ones))
        return self.store(self.contract("bto,oi->bti", d, self.parameter(f"{name}.weight")))

    def rms_norm_backward(self, d: Array, x: Array, name: str, into: Gradients) -> Array:
        """With n = x / root: by n it is d * factor, and root takes n's own direction out of it."""
        mean_square = self.single(self.contract("btd,btd->bt", x, x) / self.config.hidden_size)
        root = self.single(np.sqrt(self.single(mean_square + self.config.rms_norm_eps)))[..., None]
        n = self.single(x / root)
        ones = np.ones(d.shape[:2])
        by_weight = self.contract("btd,bt->d", self.single(d * n), ones)
        self.add_gradient(into, name, by_weight)
        by_n = self.single(d * self.norm_factor(self.parameter(name)))
        along = self.single(self.contract("btd,btd->bt", by_n, n) / self.config.hidden_size)
        return self.store(self.single(by_n - self.single(n * along[..., None])) / root)

    def soft_cap_backward(self, d: Array, capped: Array, cap: float | None) -> Array:
        """The slope of cap * tanh(x / cap) is 1 - tanh², here from the result."""
        if cap is None:
            return d
        tanh = self.single(capped / cap)
        return self.single(d * self.single(1 - tanh * tanh))

    # -- attention -----------------------------------------------------------------------------

    def attention_backward(self, d: Array, i: int, tape: Tape, into: Gradients) -> Array:
        """By the normed input of the attention of layer `i`."""
        at = f"model.layers.{i}.self_attn"
        q, k, v, probs = (tape[f"{at}.{name}"] for name in ("q", "k", "v", "probs"))
        d = self.linear_backward(d, tape[f"{at}.mixed"], f"{at}.o_proj", into)
        d_probs, d_v = self.mix_backward(d.reshape(q.shape), probs, v)
        d_scores = self.softmax_backward(d_probs, probs, tape[f"{at}.visible"])
        d_q, d_k = self.scores_backward(d_scores, q, k, tape[f"{at}.scores"])
        d_q, d_k, d_v = self.apply_positions_backward(d_q, d_k, d_v, tape[f"{at}.angles"])
        return self.project_backward(i, d_q, d_k, d_v, tape[f"{at}.x"], into)

    def mix_backward(self, d: Array, probs: Array, v: Array) -> tuple[Array, Array]:
        """By the probabilities and by the values."""
        d_probs = self.store(self.contract("btnh,bsnh->bnts", d, v[:, :, self.kv_heads()]))
        d_v = self.kv_heads_backward(self.contract("bnts,btnh->bsnh", probs, d))
        return d_probs, self.store(d_v)

    def kv_heads_backward(self, d: Array) -> Array:
        """(B, S, N, H) to (B, S, K, H): what query heads that share a key/value head add up to."""
        is_used = self.kv_heads()[:, None] == np.arange(self.config.num_key_value_heads)
        return self.contract("bsnh,nk->bskh", d, is_used.astype(np.float64))

    def softmax_backward(self, d: Array, probs: Array, visible: Array) -> Array:
        """By the scores; a masked score is a constant."""
        mean = self.single(self.contract("bnts,bnts->bnt", d, probs))[..., None]
        by_score = self.single(probs * self.single(d - mean))
        return np.where(visible[:, None], by_score, 0.0)

    def scores_backward(self, d: Array, q: Array, k: Array, scores: Array) -> tuple[Array, Array]:
        """By the queries and by the keys."""
        d = self.soft_cap_backward(d, scores, self.config.attn_logit_softcapping)
        d = self.single(d * self.attention_scale())
        d_q = self.contract("bnts,bsnh->btnh", d, k[:, :, self.kv_heads()])
        d_k = self.kv_heads_backward(self.contract("bnts,btnh->bsnh", d, q))
        return self.store(d_q), self.store(d_k)

    def apply_positions_backward(
        self, d_q: Array, d_k: Array, d_v: Array, angles: Array
    ) -> tuple[Array, Array, Array]:
        """By queries, keys and values without positions."""
        return self.rotate_backward(d_q, angles), self.rotate_backward(d_k, angles), d_v

    def rotate_backward(self, d: Array, angles: Array) -> Array:
        """Every pair turned back: the inverse of a rotation is its transpose."""
        d_first, d_second = np.split(d, 2, axis=-1)
        cos = self.single(np.cos(angles))[:, :, None, :]
        sin = self.single(np.sin(angles))[:, :, None, :]
        first = self.single(self.single(d_first * cos) + self.single(d_second * sin))
        second = self.single(self.single(d_second * cos) - self.single(d_first * sin))
        return self.store(np.concatenate([first, second], axis=-1))

    def project_backward(
        self, i: int, d_q: Array, d_k: Array, d_v: Array, x: Array, into: Gradients
    ) -> Array:
        at, flat = f"model.layers.{i}.self_attn", (*x.shape[:2], -1)
        by_q = self.linear_backward(d_q.reshape(flat), x, f"{at}.q_proj", into)
        by_k = self.linear_backward(d_k.reshape(flat), x, f"{at}.k_proj", into)
        by_v = self.linear_backward(d_v.reshape(flat), x, f"{at}.v_proj", into)
        return self.store(self.store(by_q + by_k) + by_v)

    # -- feed-forward --------------------------------------------------------------------------

    def activation_backward(self, d: Array, x: Array) -> Array:
        """With t = tanh(inner): (1 + t) / 2 + x / 2 * (1 - t²) * the slope of inner."""
        scale = math.sqrt(2 / math.pi)
        t = self.single(np.tanh(self.single(scale * self.single(x + 0.044715 * x * x * x))))
        inner_slope = self.single(scale * self.single(1 + 3 * 0.044715 * x * x))
        bend = self.single(0.5 * x * self.single(self.single(1 - t * t) * inner_slope))
        return self.store(self.single(d * self.single(self.single(0.5 * (1 + t)) + bend)))

    def mlp_backward(self, d: Array, i: int, tape: Tape, into: Gradients) -> Array:
        """By the normed input of the feed-forward part of layer `i`."""
        at = f"model.layers.{i}.mlp"
        x = tape[f"{at}.x"]
        d = self.linear_backward(d, tape[f"{at}.product"], f"{at}.down_proj", into)
        d_up = self.store(d * tape[f"{at}.active"])
        d_gate = self.activation_backward(self.store(d * tape[f"{at}.up"]), tape[f"{at}.gate"])
        by_gate = self.linear_backward(d_gate, x, f"{at}.gate_proj", into)
        by_up = self.linear_backward(d_up, x, f"{at}.up_proj", into)
        return self.store(by_gate + by_up)

    # -- one layer, and the embedding ----------------------------------------------------------

    def block_backward(self, d: Array, i: int, tape: Tape, into: Gradients) -> Array:
        """By the input of layer `i`: each residual sum passes `d` on to both of its sides."""
        at = f"model.layers.{i}"
        name = f"{at}.post_attention_layernorm.weight"
        by_normed = self.mlp_backward(d, i, tape, into)
        d = self.store(d + self.rms_norm_backward(by_normed, tape[f"{at}.middle"], name, into))
        name = f"{at}.input_layernorm.weight"
        by_normed = self.attention_backward(d, i, tape, into)
        return self.store(d + self.rms_norm_backward(by_normed, tape[f"{at}.x"], name, into))

    def embed_backward(self, d: Array, ids: Array, into: Gradients) -> None:
        """(B, T, D) to the rows that were looked up, but for that of the padding id."""
        ids, d = ids.ravel(), d.reshape(-1, d.shape[-1])
        counted = ids != self.config.pad_token_id
        rows, which = np.unique(ids[counted], return_inverse=True)
        is_row = np.arange(len(rows))[:, None] == which
        table = np.zeros(self.shapes["model.embed_tokens.weight"])
        table[rows] = self.contract("rn,nd->rd", is_row.astype(np.float64), d[counted])
        self.add_gradient(into, "model.embed_tokens.weight", table)
