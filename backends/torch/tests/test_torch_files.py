"""Files of torch.save: torch, Transformers and gemma_pytorch's rules read ours, and we theirs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from gemma_hub.checkpoints.formats import torch_writer
from gemma_hub.checkpoints.formats.gemma_pytorch import GemmaPytorch
from gemma_hub.checkpoints.formats.interface import Opened, WriteOptions
from gemma_hub.checkpoints.formats.pytorch_bin import PytorchBin
from gemma_hub.checkpoints.formats.torch_file import TorchFile
from gemma_hub.checkpoints.formats.torch_writer import write_torch
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, ArrayWeights, parameter_shapes

HEADS = {"mqa": (3, 1, 8), "gqa": (4, 2, 6), "mha": (3, 3, 8), "narrow": (4, 1, 16)}
LAYERS = 3
TORCH_DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16,
    "float16": torch.float16, "int64": torch.int64, "int32": torch.int32, "int16": torch.int16,
    "int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool, "complex64": torch.complex64,
    "complex128": torch.complex128,
}  # fmt: skip


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def make_opened(heads: str = "gqa", dtype: str = "float32") -> Opened:
    N, K, H = HEADS[heads]
    config = GemmaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=LAYERS,
        num_attention_heads=N, num_key_value_heads=K, head_dim=H, dtype=dtype,
        max_position_embeddings=64,
    )  # fmt: skip
    draw = np.random.default_rng(5).normal
    shapes = parameter_shapes(config).items()
    arrays = {name: (0.3 * draw(size=shape)).astype(DTYPES[dtype]) for name, shape in shapes}
    return Opened(path=Path(), config=config, task="causal_lm", weights=ArrayWeights(arrays))


def written(form: Any, opened: Opened, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    form.write(folder, opened, WriteOptions(**options))
    return folder


def assert_same(found: Any, expected: Any) -> None:
    assert set(found.names()) == set(expected.names())
    for name in expected.names():
        assert found.dtype(name) == expected.dtype(name), name
        assert found.read(name).tobytes() == expected.read(name).tobytes(), name


# -- torch.save, read by us ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_every_type_of_torch_is_read(name: str, tmp_path: Path) -> None:
    tensor = torch.arange(24).reshape(4, 6).to(TORCH_DTYPES[name])
    torch.save({"a": tensor}, tmp_path / "x.bin")
    file = TorchFile(tmp_path / "x.bin")
    assert file.tensors["a"].dtype == name
    assert file.read("a").tobytes() == bits(tensor)


def test_every_kind_of_tensor_is_read(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(5, 4, 3)
    tensors = {
        "whole": base,
        "same": base,
        "transposed": base.permute(2, 0, 1),
        "part": base[1:4, ::2, 1],
        "scalar": base[4, 3, 2],
        "empty": torch.zeros(0, 7),
        "parameter": torch.nn.Parameter(base),
        "learning": torch.ones(3, requires_grad=True),
    }
    torch.save(tensors, tmp_path / "x.bin")
    file = TorchFile(tmp_path / "x.bin")
    assert list(file.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert file.tensors[name].shape == tuple(tensor.shape), name
        assert np.array_equal(file.read(name), tensor.detach().numpy()), name
    assert file.tensors["whole"] == file.tensors["same"]


def test_state_dicts_and_training_checkpoints_are_read(tmp_path: Path) -> None:
    model = torch.nn.TransformerEncoderLayer(16, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(saved, tmp_path / "x.bin")
    file = TorchFile(tmp_path / "x.bin")
    for name, tensor in model.state_dict().items():
        assert file.read(f"model/{name}").tobytes() == bits(tensor)
    moment = optimizer.state_dict()["state"][0]["exp_avg"]
    assert file.read("optimizer/state/0/exp_avg").tobytes() == bits(moment)


@pytest.mark.parametrize("crc", [True, False])
def test_files_with_and_without_checksums_are_read(crc: bool, tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(crc)
    try:
        torch.save({"a": torch.arange(9), "e": torch.zeros(0), "b": torch.ones(7)}, tmp_path / "x")
    finally:
        torch.serialization.set_crc32_options(before)
    assert TorchFile(tmp_path / "x").read("a").tolist() == list(range(9))


def test_what_is_more_than_tensors_is_named(tmp_path: Path) -> None:
    kinds = {
        "torch.nn.modules.linear.Linear": lambda p: torch.save(torch.nn.Linear(2, 2), p),
        "torch._utils._rebuild_tensor_v3": lambda p: torch.save(
            {"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, p
        ),
        "before 1.6": lambda p: torch.save(
            {"a": torch.ones(2)}, p, _use_new_zipfile_serialization=False
        ),
        "protocol 4": lambda p: torch.save({"a": torch.ones(2)}, p, pickle_protocol=4),
        "expected a dict": lambda p: torch.save(torch.ones(2), p),
    }
    for reason, save in kinds.items():
        save(tmp_path / "x.bin")
        with pytest.raises(CheckpointError, match=reason):
            TorchFile(tmp_path / "x.bin")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_named(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        scripted = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    scripted.save(tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="is a TorchScript archive, which holds code"):
        TorchFile(tmp_path / "x.bin")


# -- ours, read by torch ---------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("wrapper", [None, "model_state_dict"])
@pytest.mark.parametrize("large", [torch_writer.LARGE, 50])
def test_torch_loads_what_is_written(
    large: int, wrapper: str | None, mmap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_writer, "LARGE", large)
    draw = np.random.default_rng(1).normal
    arrays = {name: draw(size=(5, 7)).astype(dtype) for name, dtype in DTYPES.items()}
    arrays |= {"scalar": np.array(2.0, np.float32), "long": draw(size=100_000)}
    weights = ArrayWeights(arrays)
    with (tmp_path / "x.bin").open("wb") as file:
        assert sum(write_torch(file, weights, weights.names(), wrapper)) > 800_000
    loaded = torch.load(tmp_path / "x.bin", weights_only=True, mmap=mmap)
    loaded = loaded if wrapper is None else loaded[wrapper]
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert tuple(loaded[name].shape) == array.shape
        assert loaded[name].dtype == TORCH_DTYPES[array.dtype.name]
        assert bits(loaded[name]) == array.tobytes()
        assert loaded[name].data_ptr() % 64 == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", HEADS)
def test_pytorch_bin_there_and_back_through_torch(heads: str, dtype: str, tmp_path: Path) -> None:
    opened = make_opened(heads, dtype)
    folder = written(PytorchBin(), opened, tmp_path / "ours")
    loaded = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name in opened.weights.names():
        assert bits(loaded[name]) == opened.weights.read(name).tobytes()
    # As Transformers saved it: the head is the embedding, by another name.
    torch.save(loaded | {"lm_head.weight": loaded["model.embed_tokens.weight"]}, folder / "x")
    (folder / "x").replace(folder / "pytorch_model.bin")
    again = PytorchBin().open(folder)
    assert list(again.dropped) == ["lm_head.weight"]
    assert_same(again.weights, opened.weights)


@pytest.mark.parametrize("size", [None, 6000])
def test_transformers_loads_a_folder(size: int | None, tmp_path: Path) -> None:
    opened = make_opened("narrow")
    folder = written(PytorchBin(), opened, tmp_path / "bin", max_shard_bytes=size)
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        model, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        prefix = "" if kind is transformers.AutoModel else "model."
        state = model.state_dict()
        for name in opened.weights.names():
            tensor = state[prefix + name.removeprefix("model.")]
            assert bits(tensor) == opened.weights.read(name).tobytes(), name


# -- gemma_pytorch ---------------------------------------------------------------------------------


class OfGemmaPytorch(torch.nn.Module):
    """The parameters and the table of gemma_pytorch's GemmaForCausalLM, by its names."""

    def __init__(self, config: GemmaConfig, quant: bool = False) -> None:
        super().__init__()
        D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.quant = quant
        self.embedder = self.matrix(config.vocab_size, D)
        self.model = torch.nn.Module()
        self.model.norm = self.vector(D)
        self.model.layers = torch.nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            layer = torch.nn.Module()
            layer.self_attn, layer.mlp = torch.nn.Module(), torch.nn.Module()
            layer.self_attn.qkv_proj = self.matrix((N + 2 * K) * H, D)
            layer.self_attn.o_proj = self.matrix(D, N * H)
            layer.mlp.gate_proj, layer.mlp.up_proj = self.matrix(F, D), self.matrix(F, D)
            layer.mlp.down_proj = self.matrix(D, F)
            layer.input_layernorm, layer.post_attention_layernorm = self.vector(D), self.vector(D)
            self.model.layers.append(layer)
        table = torch.polar(torch.ones(8, H // 2), torch.ones(8, H // 2))
        self.register_buffer("freqs_cis", table)

    def vector(self, size: int) -> torch.nn.Module:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.full((size,), torch.nan))
        return module

    def matrix(self, rows: int, columns: int) -> torch.nn.Module:
        module = torch.nn.Module()
        if self.quant:
            data = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
            module.weight = torch.nn.Parameter(data, requires_grad=False)
            module.weight_scaler = torch.nn.Parameter(torch.rand(rows))
        else:
            module.weight = torch.nn.Parameter(torch.full((rows, columns), torch.nan))
        return module

    def load_weights(self, path: Path) -> None:
        """By gemma_pytorch's rules for a file; what is missing stays NaN."""
        state = torch.load(path, mmap=True, weights_only=True)["model_state_dict"]
        report = self.load_state_dict(state, strict=False)
        assert report.missing_keys == ["freqs_cis"]
        assert report.unexpected_keys == []


@pytest.mark.parametrize("heads", HEADS)
def test_gemma_pytorch_there_and_back_through_torch(heads: str, tmp_path: Path) -> None:
    opened = make_opened(heads)
    folder = written(GemmaPytorch(), opened, tmp_path / "ours")
    model = OfGemmaPytorch(opened.config)
    model.load_weights(folder / "model.ckpt")
    N, K, H = HEADS[heads]
    parts = model.model.layers[1].self_attn.qkv_proj.weight.split([N * H, K * H, K * H])
    for letter, part in zip("qkv", parts, strict=True):
        expected = opened.weights.read(f"model.layers.1.self_attn.{letter}_proj.weight")
        assert bits(part) == expected.tobytes()
    torch.save({"model_state_dict": model.state_dict()}, folder / "model.ckpt")
    again = GemmaPytorch().open(folder)
    assert list(again.dropped) == ["freqs_cis"]
    assert_same(again.weights, opened.weights)


def test_gemma_pytorch_in_shards(tmp_path: Path) -> None:
    opened = make_opened()
    folder = written(GemmaPytorch(), opened, tmp_path / "ours", max_shard_bytes=8000)
    model = OfGemmaPytorch(opened.config)
    shards = sorted(folder.glob("pytorch_model-*.bin"))
    assert len(shards) > 2
    for shard in shards:
        state = torch.load(shard, map_location="cpu", weights_only=True)
        assert not model.load_state_dict(state, strict=False).unexpected_keys
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "one.ckpt")
    again = GemmaPytorch().open(tmp_path / "one.ckpt", opened.config)
    assert_same(again.weights, opened.weights)


def test_int8_of_gemma_pytorch(tmp_path: Path) -> None:
    opened = make_opened("gqa")
    torch.manual_seed(3)
    model = OfGemmaPytorch(opened.config, quant=True)
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "q.ckpt")
    again = GemmaPytorch().open(tmp_path / "q.ckpt", opened.config)
    assert "quantised (int8)" in again.notes[0]
    linear = model.model.layers[2].mlp.down_proj
    # The expression of its Linear and its Embedding.
    expected = linear.weight * linear.weight_scaler.unsqueeze(-1)
    assert bits(expected) == again.weights.read("model.layers.2.mlp.down_proj.weight").tobytes()
    expected = model.embedder.weight * model.embedder.weight_scaler.unsqueeze(-1)
    assert bits(expected) == again.weights.read("model.embed_tokens.weight").tobytes()
    attention = model.model.layers[0].self_attn.qkv_proj
    expected = (attention.weight * attention.weight_scaler.unsqueeze(-1))[24:36]
    assert bits(expected) == again.weights.read("model.layers.0.self_attn.k_proj.weight").tobytes()
