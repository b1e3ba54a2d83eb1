"""The ordinary folder, config.json and *.safetensors, as one checkpoint format among the others."""

from collections.abc import Mapping
from pathlib import Path

from gemma_hub.checkpoints.description import stated_task
from gemma_hub.checkpoints.folder import INDEX_FILE, SINGLE_FILE, checkpoint_folder, weight_files
from gemma_hub.checkpoints.formats.interface import Opened, Progress, WriteOptions
from gemma_hub.checkpoints.formats.stated import companions
from gemma_hub.checkpoints.new_head import HEAD
from gemma_hub.checkpoints.reader import canonical_tensors, open_checkpoint
from gemma_hub.checkpoints.safetensors_file import SafetensorsFile
from gemma_hub.checkpoints.writer import MAX_SHARD_BYTES, write_folder
from gemma_hub.config import GemmaConfig
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import Weights, parameter_shapes


class HuggingFace:
    """Folders that `open_checkpoint` reads and `save_checkpoint` writes."""

    name = "huggingface"
    file_name: str | None = None
    layouts: tuple[str, ...] = ()

    def detect(self, path: Path) -> bool:
        """Whether the folder has safetensors under the names that this layout has for them."""
        try:
            return any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
        except (OSError, ValueError):
            return False

    def open(self, path: Path, config: GemmaConfig | None = None) -> Opened:
        """Open the folder for the task that its config.json states; see `CheckpointFormat`."""
        folder = checkpoint_folder(path)
        if config is not None and config != GemmaConfig.from_pretrained(folder):
            raise CheckpointError(
                f"{folder / 'config.json'} is the config of this checkpoint, and another was "
                "given. Leave it out; if the file is wrong, edit the file."
            )
        # open_checkpoint says it best where there is no config.json.
        task = stated_task(folder) if (folder / "config.json").is_file() else "causal_lm"
        checkpoint = open_checkpoint(folder, task)
        return Opened(
            path=folder,
            config=checkpoint.config,
            task=task,
            weights=checkpoint.weights,
            dropped=_dropped(folder, checkpoint.config, task),
            files=companions(folder),
        )

    def objections(self, config: GemmaConfig, task: str, options: WriteOptions) -> tuple[str, ...]:
        """It holds every model, and has no padded rows."""
        if options.pad_vocab_to is None:
            return ()
        return (
            f"Its embedding has one row for each of the {config.vocab_size} entries of the "
            f"vocabulary, and pad_vocab_to is {options.pad_vocab_to}. Leave that out.",
        )

    def tensors(self, opened: Opened, options: WriteOptions) -> Weights:
        """The parameters as they are: this format's names are the canonical ones."""
        return opened.weights

    def write(
        self,
        folder: Path,
        opened: Opened,
        options: WriteOptions,
        progress: Progress | None = None,
    ) -> None:
        """Write the same files as `save_checkpoint`; see `CheckpointFormat`."""
        if reasons := self.objections(opened.config, opened.task, options):
            raise CheckpointError(" ".join(reasons))
        size = options.max_shard_bytes
        write_folder(
            folder,
            opened.config,
            opened.weights,
            opened.task,
            opened.files,
            MAX_SHARD_BYTES if size is None else size,
            progress,
        )


def _dropped(folder: Path, config: GemmaConfig, task: str) -> Mapping[str, str]:
    """{stored name: reason} of the tensors that are no parameter; the folder was checked before."""
    files = [SafetensorsFile(path) for path in weight_files(folder).paths]
    tensors = canonical_tensors(files, config)
    used = parameter_shapes(config, task)
    canonical = {tensor.name: name for name, tensor in tensors.items()}
    return {
        stored: _reason(canonical.get(stored), config, task)
        for file in files
        for stored in file.tensors
        if canonical.get(stored) not in used
    }


def _reason(name: str | None, config: GemmaConfig, task: str) -> str:
    if name is None:
        return "a constant that follows from the config"
    if name == "lm_head.weight" and task == "causal_lm" and config.tie_word_embeddings:
        return "a second copy of the embedding, which the head is tied to"
    kind = "a classifier" if name in HEAD else "a causal language model"
    return f"the head of {kind}, which the task {task!r} has no use for"
