"""Damage the headers of small GGUF files: each is refused, or loads with the weights that it had.

A CheckpointError or a ConfigError within 1 s, or a load.

python tests/checkpoints/formats/fuzz_gguf.py --runs 30000
"""

import os
import random
from pathlib import Path

import gguf
import numpy as np
import safetensors.numpy
from mutations import damaged, main, replace

from gemma_hub.checkpoints.formats.gguf import Gguf
from gemma_hub.checkpoints.formats.gguf_file import GgufFile
from gemma_hub.errors import CheckpointError, ConfigError

KEPT = "gemma_hub.norms"
WORDS = (
    b"gemma", b"gemma2", b"llama", b"general.alignment", b"split.count", b"tokenizer.ggml.model",
    b"gemma.block_count", b"gemma.rope.scaling.type", b"none", b"gemma_hub.norms", b"output.weight",
    b"blk.0.attn_v.weight", b"rope_freqs.weight",
)  # fmt: skip
BOMBS = (b"\x09\0\0\0", b"\x09\0\0\0\x09\0\0\0" + b"\xff" * 8, b"\x01\0\0\0\0\0\0\0k\0\0\0\0\0")
# {name: shape, the slowest axis first}; every size differs where the format lets it.
SHAPES = {
    "token_embd": (8, 32), "blk.0.attn_q": (64, 32), "blk.0.attn_k": (32, 32),
    "blk.0.attn_v": (32, 32), "blk.0.attn_output": (32, 64), "blk.0.ffn_gate": (96, 32),
    "blk.0.ffn_up": (96, 32), "blk.0.ffn_down": (32, 96), "blk.0.attn_norm": (32,),
    "blk.0.ffn_norm": (32,), "output_norm": (32,),
}  # fmt: skip
NORMS = {
    "blk.0.attn_norm": "model.layers.0.input_layernorm.weight",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm.weight",
    "output_norm": "model.norm.weight",
}


def add_metadata(writer: gguf.GGUFWriter) -> None:
    """All kinds of values."""
    sizes = {
        "context_length": 8, "embedding_length": 32, "block_count": 1, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16,
    }  # fmt: skip
    for key, value in sizes.items():
        writer.add_uint32(f"gemma.{key}", value)
    writer.add_float32("gemma.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32("gemma.rope.freq_base", 1e4)
    writer.add_string("gemma.rope.scaling.type", "linear")
    writer.add_float32("gemma.rope.scaling.factor", 2.0)
    writer.add_uint16("split.count", 1)
    writer.add_tokenizer_model("llama")
    pieces = [b"<pad>", b"<eos>", b"<bos>", b"<unk>", b"a", b"b", b"ab", b"\xe2\x96\x81"]
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0])
    writer.add_token_types([3, 3, 3, 2, 1, 1, 1, 1])
    for i, name in enumerate(("pad", "eos", "bos", "unk")):
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_chat_template("{{ messages }}")
    writer.add_string("gemma_hub.config", '{"initializer_range": 0.5}')


def write(path: Path, kind: str, *, keeps_norms: bool, alignment: int) -> list[range]:
    """A complete file of one layer; says where its structure is: all before the tensors' data."""
    writer = gguf.GGUFWriter(path, "gemma")
    add_metadata(writer)
    writer.add_custom_alignment(alignment)
    draw = np.random.default_rng(0).normal
    arrays = {name: draw(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    for name, array in arrays.items():
        raw = None
        if name in NORMS:
            array = array + np.float32(1)
        elif kind == "Q8_0":
            raw = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quants.quantize(array, raw)
        else:
            array = array.astype(np.float16)
        writer.add_tensor(f"{name}.weight", array, raw_dtype=raw)
    blob = b""
    if keeps_norms:
        blob = safetensors.numpy.save({new: arrays[old] for old, new in NORMS.items()})
        writer.add_array(KEPT, blob)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data_starts = int(min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors))
    if not keeps_norms:
        return [range(data_starts)]
    # The kept norms are data too: 3 of 32 float32, at the end of the blob.
    end = path.read_bytes().index(blob) + len(blob)
    return [range(end - 3 * 32 * 4), range(end, data_starts)]


class GgufFuzzer:
    """Three files: float16, float16 with its norms kept exactly, and Q8_0."""

    def __init__(self, root: Path) -> None:
        os.environ["GEMMA_HUB_CACHE"] = str(root / "cache")
        self._path = root / "damaged.gguf"
        self._files: list[tuple[bytes, list[range], dict[str, bytes]]] = []
        kinds = (("F16", False, 32), ("F16", True, 16), ("Q8_0", False, 64))
        for i, (kind, keeps_norms, alignment) in enumerate(kinds):
            path = root / f"valid{i}.gguf"
            structure = write(path, kind, keeps_norms=keeps_norms, alignment=alignment)
            opened = Gguf().open(path)
            assert not any(KEPT in note for note in opened.notes)
            weights = {n: opened.weights.read(n).tobytes() for n in opened.weights.names()}
            self._files.append((path.read_bytes(), structure, weights))
        # The same random norms, as the sums alone give them.
        self._sums = {name: self._files[0][2][name] for name in NORMS.values()}
        assert all(self._files[1][2][name] != self._sums[name] for name in NORMS.values())

    def damage(self, draw: random.Random) -> str:
        content, structure, self._expected = draw.choice(self._files)
        new = damaged(content, draw, structure, order="little", words=WORDS, bombs=BOMBS)
        replace(self._path, new)
        return "header"

    def check(self) -> str:
        try:
            opened = Gguf().open(self._path)
        except (CheckpointError, ConfigError) as error:
            assert len(str(error)) < 20_000
            return "refused"
        # Without the norms that were kept it is a file like any other, and says so or cannot know.
        was_ignored = any(note.startswith(f"Its {KEPT}") for note in opened.notes)
        is_kept = KEPT in GgufFile(self._path).metadata and not was_ignored
        expected = self._expected if is_kept else self._expected | self._sums
        for name, content in expected.items():
            assert opened.weights.read(name).tobytes() == content, name
        return "loaded"


if __name__ == "__main__":
    main(GgufFuzzer, __doc__)
