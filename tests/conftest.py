"""A small model that needs no framework, for tests of what runs on top of a model."""

import dataclasses
import gc
import io
from collections.abc import Iterator

import numpy as np
import pytest
import sentencepiece

from gemma_hub.backend import Cache
from gemma_hub.config import GemmaConfig
from gemma_hub.inputs import ModelInputs
from gemma_hub.outputs import ModelOutputs
from gemma_hub.parameters import ArrayWeights
from gemma_hub.tokenizers import GemmaTokenizer

WIDTH = 16


@pytest.fixture(scope="module", autouse=True)
def what_was_there_before_is_not_collected() -> Iterator[None]:
    """A test that measures time measures its own: a whole collection takes a second in a process
    that has imported every framework."""
    gc.freeze()
    yield
    gc.unfreeze()


class UncachedModel:
    """Logits from a sum over the tokens seen, each turned by its position.

    Every token, its place, and the mask change the result, so that a loop which feeds a wrong one
    gives other tokens.

    Attributes:
        calls: the inputs of every call, in order.
    """

    device = "fake:0"

    def __init__(self, config: GemmaConfig, seed: int = 0) -> None:
        draw = np.random.default_rng(seed).normal
        self.native = self
        self.config = config
        self.embeddings = draw(size=(config.vocab_size, WIDTH))
        self.frequencies = draw(size=WIDTH)
        self.head = draw(size=(WIDTH, config.vocab_size)).astype(np.float32)
        self.calls: list[ModelInputs] = []

    def forward(self, inputs: ModelInputs) -> ModelOutputs:
        self.calls.append(inputs)
        return self._outputs(self._features(inputs), inputs, start=0, valid=inputs.attention_mask)

    def to_numpy(self, array):
        return np.asarray(array)

    def _features(self, inputs):
        turned = np.cos(inputs.position_ids[..., None] * self.frequencies)
        return self.embeddings[inputs.input_ids] * turned

    def _outputs(self, features, inputs, start, valid):
        tokens = inputs.shape[1]
        seen = np.cumsum(np.where(valid[..., None], features, 0.0), axis=1)
        seen = np.tanh(seen[:, start : start + tokens]) * 2
        logits = seen.astype(np.float32) @ self.head
        return ModelOutputs(logits[:, -inputs.logits_to_keep :])


class CachedModel(UncachedModel):
    """The same with a cache, and with parameters to save."""

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        arrays = np.full((batch_size, max_length, WIDTH), np.nan)
        return Cache.empty(arrays, batch_size, max_length)

    def extend(self, inputs: ModelInputs, cache: Cache) -> tuple[ModelOutputs, Cache]:
        self.calls.append(inputs)
        valid = cache.admit(inputs)
        features = cache.arrays.copy()
        features[:, cache.length : cache.length + inputs.shape[1]] = self._features(inputs)
        outputs = self._outputs(features, inputs, cache.length, valid)
        return outputs, cache.advanced(inputs, features)

    def export(self) -> ArrayWeights:
        return ArrayWeights({"head.weight": self.head})


class CachedRowsModel(CachedModel):
    """The same with caches whose rows can be repeated, moved and shortened; free slots are NaN."""

    def gather_rows(self, caches, rows, max_length: int) -> Cache:
        cache, slots = Cache.gathered(caches, rows, max_length)
        flat = np.concatenate([each.arrays.reshape(-1, WIDTH) for each in caches])
        arrays = np.where(slots[..., None] < 0, np.nan, flat[slots])
        return dataclasses.replace(cache, arrays=arrays)


@pytest.fixture
def fake_config() -> GemmaConfig:
    return GemmaConfig(
        vocab_size=48,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        eos_token_id=None,
    )


@pytest.fixture
def fake_model(fake_config: GemmaConfig) -> CachedModel:
    return CachedModel(fake_config)


@pytest.fixture
def uncached_model(fake_config: GemmaConfig) -> UncachedModel:
    return UncachedModel(fake_config)


@pytest.fixture
def rows_model(fake_config: GemmaConfig) -> CachedRowsModel:
    return CachedRowsModel(fake_config)


@pytest.fixture(
    params=[UncachedModel, CachedModel, CachedRowsModel], ids=lambda kind: kind.__name__
)
def any_model(request, fake_config: GemmaConfig) -> UncachedModel:
    return request.param(fake_config)


def vocabulary(*marks: str) -> bytes:
    """A tokenizer.model with bytes, a few words and `marks` as user-defined pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the king and the queen", "a small dog ran to the king"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        user_defined_symbols=list(marks),
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    return vocabulary("<start_of_turn>", "<end_of_turn>")


@pytest.fixture(scope="session")
def tokenizer(tokenizer_model: bytes) -> GemmaTokenizer:
    return GemmaTokenizer(tokenizer_model)


@pytest.fixture(scope="session")
def plain_tokenizer() -> GemmaTokenizer:
    """One without turns."""
    return GemmaTokenizer(vocabulary())


@pytest.fixture
def text_model(fake_config: GemmaConfig, tokenizer: GemmaTokenizer) -> CachedModel:
    return CachedModel(dataclasses.replace(fake_config, vocab_size=tokenizer.vocab_size))
