"""Record what keras-hub itself writes and computes, for test_keras.py to compare with.

Not a test: it needs keras-hub, which the tests do without. In an environment of its own:

    pip install keras==3.15.1 keras-hub==0.32.0 h5py jax
    python tests/checkpoints/formats/record_keras.py           # writes keras_hub/ beside this file
    python tests/checkpoints/formats/record_keras.py PRESET    # compares another preset

The second form loads a preset that gemma_hub wrote from the recorded ones, whole or in shards, in
every way that keras-hub has, and compares its variables and logits. To make such presets:

    gemma-hub convert tests/checkpoints/formats/keras_hub/float32 PRESET --to keras
"""

import io
import os
import shutil
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"

import keras
import keras_hub
import numpy as np
import sentencepiece

FOLDER = Path(__file__).parent / "keras_hub"
SIZES = {
    "vocabulary_size": 48, "num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 2,
    "hidden_dim": 20, "intermediate_dim": 72, "head_dim": 6,
}  # fmt: skip
IDS = [[2, 17, 5, 40, 8, 8, 31, 12, 47, 3, 26], [2, 9, 30, 4, 22, 41, 7, 15, 11, 36, 19]]


def vocabulary() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 5),
        model_writer=model, model_type="BPE", vocab_size=48, normalization_rule_name="identity",
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", unk_piece="<unk>", minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def model(dtype: str, proto: bytes) -> keras_hub.models.GemmaCausalLM:
    """A model with weights from N(0, 0.3), so that no part of it is close to doing nothing."""
    backbone = keras_hub.models.GemmaBackbone(**SIZES, dtype=dtype)
    draw = np.random.default_rng(7).normal
    for variable in backbone.variables:
        variable.assign(draw(scale=0.3, size=variable.shape).astype("float32"))
    tokenizer = keras_hub.models.GemmaTokenizer(proto=proto)
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=16)
    return keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=preprocessor)


def logits(lm: keras_hub.models.GemmaCausalLM) -> np.ndarray:
    inputs = {"token_ids": np.array(IDS), "padding_mask": np.ones_like(IDS)}
    return np.asarray(keras.ops.convert_to_numpy(lm(inputs)), np.float32)


def variables(lm: keras_hub.models.GemmaCausalLM) -> dict[str, np.ndarray]:
    values = {v.path: keras.ops.convert_to_numpy(v.value) for v in lm.backbone.variables}
    return {path: np.asarray(value, np.float32) for path, value in values.items()}


def record() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    proto = vocabulary()
    lm = model("float32", proto)
    lm.save_to_preset(str(FOLDER / "float32"))
    np.savez_compressed(
        FOLDER / "expected.npz", ids=np.array(IDS), logits=logits(lm), **variables(lm)
    )
    half = model("bfloat16", proto).backbone  # the same numbers, rounded
    half.save_to_preset(str(FOLDER / "bfloat16_sharded"), max_shard_size=1e-5)


def compare(preset: str) -> None:
    expected = dict(np.load(FOLDER / "expected.npz"))
    has_tokenizer = (Path(preset) / "tokenizer.json").is_file()
    has_task = (Path(preset) / "task.json").is_file()
    for kind in (keras_hub.models.GemmaCausalLM, keras_hub.models.CausalLM):
        # Without either file keras-hub itself has to be told that there is no preprocessor.
        more = {} if has_tokenizer or has_task else {"preprocessor": None}
        lm = kind.from_preset(preset, dtype="float32", **more)
        report(kind.__name__, lm, expected)
    print("text:", lm.generate("the quick", max_length=12) if has_tokenizer else None)  # noqa: T201
    backbone = keras_hub.models.GemmaBackbone.from_preset(preset, dtype="float32")
    lm = keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)
    report("GemmaBackbone", lm, expected)


def report(name: str, lm: keras_hub.models.GemmaCausalLM, expected: dict[str, np.ndarray]) -> None:
    found = {"logits": logits(lm), **variables(lm)}
    missing = expected.keys() - found.keys() - {"ids"}
    assert not missing, missing
    differences = {key: float(np.abs(found[key] - expected[key]).max()) for key in found}
    print(  # noqa: T201
        f"{name}: largest logit {np.abs(expected['logits']).max():.4g}, largest difference "
        f"{differences.pop('logits'):.3g}; of the variables {max(differences.values()):.3g}"
    )


if __name__ == "__main__":
    compare(sys.argv[1]) if len(sys.argv) > 1 else record()
