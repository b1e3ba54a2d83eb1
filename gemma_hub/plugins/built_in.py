"""The checkpoint formats of the core itself, in the order in which a path is tried with them."""

from gemma_hub.plugins.spec import FormatSpec

_HERE = "gemma_hub.checkpoints.formats"

# What a reader requires is as in the extras of pyproject.toml.
FORMATS = (
    FormatSpec(
        name="huggingface",
        api_version="1.0",
        factory=f"{_HERE}.huggingface:HuggingFace",
        summary="Folder of config.json and *.safetensors, as Transformers 4 and 5 write",
    ),
    FormatSpec(
        name="pytorch_bin",
        api_version="1.0",
        factory=f"{_HERE}.pytorch_bin:PytorchBin",
        summary="Folder of config.json and pytorch_model*.bin, as Transformers once wrote",
    ),
    FormatSpec(
        name="gemma_pytorch",
        api_version="1.0",
        factory=f"{_HERE}.gemma_pytorch:GemmaPytorch",
        summary="Checkpoint (*.ckpt) of Google's gemma_pytorch",
    ),
    FormatSpec(
        name="orbax",
        api_version="1.0",
        factory=f"{_HERE}.orbax:Orbax",
        requires=("tensorstore>=0.1.60",),
        summary="Orbax folder of Google's JAX library gemma",
    ),
    FormatSpec(
        name="keras",
        api_version="1.0",
        factory=f"{_HERE}.keras:KerasPreset",
        requires=("h5py>=3.10",),
        summary="Preset folder of KerasHub: config.json and model.weights.h5",
    ),
    FormatSpec(
        name="gguf",
        api_version="1.0",
        factory=f"{_HERE}.gguf:Gguf",
        requires=("gguf>=0.17",),
        summary="One *.gguf file, as llama.cpp reads",
    ),
    FormatSpec(
        name="flax_msgpack",
        api_version="1.0",
        factory=f"{_HERE}.flax_msgpack:FlaxMsgpack",
        summary="Folder of config.json and flax_model.msgpack, as Transformers once wrote",
    ),
)
