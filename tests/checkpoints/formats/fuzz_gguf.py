"""Damaged GGUF files: each gives an error of ours or loads, and none takes a second.

Run with: python tests/checkpoints/formats/fuzz_gguf.py --runs 100000 --seed 1
"""

import argparse
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import gguf
import numpy as np

from gemma_hub.checkpoints.formats.gguf import Gguf
from gemma_hub.errors import CheckpointError, ConfigError

EXTREMES = (
    0,
    1,
    2,
    7,
    8,
    9,
    12,
    13,
    255,
    2**16,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
SLOWEST = 1.0  # seconds


def valid_file(path: Path, kept_norms: bool) -> bytes:
    """A complete file of one layer, with all kinds of values; most of it is header."""
    writer = gguf.GGUFWriter(path, "gemma")
    sizes = {
        "context_length": 8, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
        "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 16,
        "attention.value_length": 16,
    }  # fmt: skip
    for key, value in sizes.items():
        writer.add_uint32(f"gemma.{key}", value)
    writer.add_float32("gemma.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32("gemma.rope.freq_base", 1e4)
    writer.add_string("gemma.rope.scaling.type", "linear")
    writer.add_float32("gemma.rope.scaling.factor", 2.0)
    writer.add_custom_alignment(32)
    writer.add_tokenizer_model("llama")
    pieces = [b"<pad>", b"<eos>", b"<bos>", b"<unk>", b"a", b"b", b"ab", b"\xe2\x96\x81"]
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0])
    writer.add_token_types([3, 3, 3, 2, 1, 1, 1, 1])
    for i, name in enumerate(("pad", "eos", "bos", "unk")):
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_chat_template("{{ messages }}")
    writer.add_string("gemma_hub.config", '{"initializer_range": 0.5}')
    draw = np.random.default_rng(0).normal
    shapes = {
        "token_embd": (8, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (32, 32),
        "blk.0.ffn_up": (32, 32), "blk.0.ffn_down": (32, 32), "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,), "output_norm": (32,),
    }  # fmt: skip
    norms = {}
    for name, shape in shapes.items():
        array = draw(size=shape).astype(np.float32 if "norm" in name else np.float16)
        if "norm" in name:
            norms[name] = array
            array = array + np.float32(1)
        writer.add_tensor(f"{name}.weight", array)
    if kept_norms:
        import safetensors.numpy

        hub_names = ("input_layernorm", "post_attention_layernorm")
        names = [f"model.layers.0.{name}.weight" for name in hub_names] + ["model.norm.weight"]
        blob = dict(zip(names, norms.values(), strict=True))
        writer.add_array("gemma_hub.norms", safetensors.numpy.save(blob))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def mutated(content: bytes, header: int, chance: random.Random) -> bytes:
    """The content with one to four damages in its first `header` bytes, or cut short.

    Half of the files keep their length, so that the damage is seen late, by what uses a value.
    """
    data = bytearray(content)
    kinds = (0, 1, 2, 5) if chance.random() < 0.5 else range(7)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(min(header, len(data)) or 1)
        kind = chance.choice(kinds)
        if kind == 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            data[at : at + 8] = chance.choice(EXTREMES).to_bytes(8, "little")
        elif kind == 2:
            data[at : at + 4] = (chance.choice(EXTREMES) % 2**32).to_bytes(4, "little")
        elif kind == 3:
            del data[at : at + chance.randint(1, 16)]
        elif kind == 4:
            data[at:at] = chance.randbytes(chance.randint(1, 16))
        elif kind == 6:
            del data[chance.randrange(len(data) + 1) :]
        else:
            data[at] ^= 1 << chance.randrange(8)
    return bytes(data)


def run(runs: int, seed: int, folder: Path) -> tuple[Counter[str], float]:
    """Open `runs` damaged files; counts of the outcomes, and the slowest in seconds."""
    chance = random.Random(seed)
    valid = [valid_file(folder / "valid.gguf", kept) for kept in (False, True)]
    headers = [content.index(b"output_norm.weight") + 100 for content in valid]
    path, form = folder / "damaged.gguf", Gguf()
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for i in range(runs):
        which = chance.randrange(2)
        path.unlink(missing_ok=True)  # a mapped file must not be cut short
        path.write_bytes(mutated(valid[which], headers[which], chance))
        start = time.perf_counter()
        try:
            opened = form.open(path)
            for name in opened.weights.names():
                opened.weights.read(name)
            outcomes["loaded"] += 1
        except (CheckpointError, ConfigError) as error:
            outcomes[type(error).__name__] += 1
        except BaseException:
            kept = Path(tempfile.gettempdir()) / f"gguf-failure-{seed}-{i}.gguf"
            kept.write_bytes(path.read_bytes())
            print(f"run {i} of seed {seed} failed; its file is {kept}")  # noqa: T201
            raise
        taken = time.perf_counter() - start
        slowest = max(slowest, taken)
        assert taken < SLOWEST, f"run {i} of seed {seed} took {taken:.2f} s"
    return outcomes, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GEMMA_HUB_CACHE"] = folder
        outcomes, slowest = run(arguments.runs, arguments.seed, Path(folder))
    print(f"{arguments.runs} files: {dict(outcomes)}; slowest {slowest * 1000:.0f} ms")  # noqa: T201


if __name__ == "__main__":
    main()
