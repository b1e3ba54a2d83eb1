"""The config of a checkpoint whose format has no place for one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_hub.config import GemmaConfig, read_json_object
from gemma_hub.errors import CheckpointError, ConfigError

_PADDED = {256_128: 256_000}  # rows in the released Gemma 1 files: entries of the vocabulary
COMPANIONS = """
    tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
    chat_template.jinja generation_config.json
""".split()
"""Files of a Hugging Face folder that go wherever its weights go."""


def config_beside(folder: Path) -> GemmaConfig | None:
    """The config in a Hugging Face config.json of `folder`; None if it has no such file.

    Raises:
        ConfigError: the file is there and wrong.
    """
    path = folder / "config.json"
    if not path.is_file() or "model_type" not in read_json_object(path, ConfigError):
        return None
    return GemmaConfig.from_pretrained(path)


def companions(folder: Path) -> dict[str, Path]:
    """{name: file} of the tokenizer's and the generation's files in a folder."""
    return {name: path for name in COMPANIONS if (path := folder / name).is_file()}


def config_from_sizes(
    what: Path, *, embedding_rows: int, sizes: Mapping[str, int]
) -> tuple[GemmaConfig, tuple[str, ...]]:
    """A Gemma config from what the shapes of the tensors tell, and a note on what they do not.

    Args:
        what: path of the checkpoint, for messages.
        embedding_rows: rows of the embedding. Those of the released models are padded.
        sizes: fields of `GemmaConfig` by name: all sizes but vocab_size.

    Raises:
        CheckpointError: a size is impossible.
    """
    values: dict[str, Any] = dict(sizes)
    values["vocab_size"] = _PADDED.get(embedding_rows, embedding_rows)
    try:
        config = GemmaConfig(**values)
    except ConfigError as error:
        raise CheckpointError(
            f"{what}: the shapes of its tensors are no Gemma's: {error} Pass the model's config."
        ) from error
    told = ", ".join(f"{name}={getattr(config, name)}" for name in ("vocab_size", *sizes))
    note = (
        f"There is no config.json; the shapes say {told}, and everything else is as in the "
        "released Gemma models (RoPE base 10,000, norm epsilon 1e-6, ids 0, 1, 2)."
    )
    return config, (note,)
