"""Train the checkpoint "tiny" and put it into gemma_hub_tiny/checkpoint.

    python plugins/tiny/train.py train --corpus .../fairy_tales.txt
    python plugins/tiny/train.py export --corpus .../fairy_tales.txt

The corpus is not part of the repository; the model card in the checkpoint says where it comes from.
This script and `training/` are not part of the wheel. They need the torch backend.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from gemma_hub.config import GemmaConfig
from training import card, corpus, vocabulary
from training.loop import Data, Run, Settings

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT.parent / "shared" / "data" / "corpus" / "fairy_tales.txt"
CHECKPOINT = Path(__file__).resolve().parent / "gemma_hub_tiny" / "checkpoint"

# Grouped queries, and heads * head_dim != hidden_size: the paths on which ports go wrong.
CONFIG = GemmaConfig(
    vocab_size=vocabulary.SIZE,
    hidden_size=224,
    intermediate_size=704,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=48,
    max_position_embeddings=2048,
    dtype="bfloat16",
)

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
CorpusOption = Annotated[Path, typer.Option(help="The file fairy_tales.txt.")]
FolderOption = Annotated[Path, typer.Option(help="Where the run's state is kept.")]


def prepare(path: Path) -> Data:
    training, held_out = corpus.split(corpus.read(path))
    return Data(training, held_out, vocabulary.train(story.text for story in training))


@app.command()
def train(
    corpus_file: Annotated[Path, typer.Option("--corpus")] = CORPUS,
    folder: FolderOption = ROOT / "runs" / "tiny",
    steps: int = 2400,
    minutes: Annotated[float, typer.Option(help="Stop after this long.")] = 120.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run there.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Needs a C++ compiler.")] = False,
    threads: int = 2,
) -> None:
    """Train; the state goes to FOLDER/state.pt."""
    torch.set_num_threads(threads)
    data = prepare(corpus_file)
    run = (
        Run.load(CONFIG, data, folder)
        if resume
        else Run(CONFIG, Settings(steps=steps), data, folder)
    )
    run.train(minutes, compiled)
    if run.curve:
        loss = run.curve[-1]["held_out"]
        typer.echo(f"Held-out loss {loss:.4f} nats per token after {run.seconds:.0f} s.")


@app.command()
def export(
    corpus_file: Annotated[Path, typer.Option("--corpus")] = CORPUS,
    folder: FolderOption = ROOT / "runs" / "tiny",
    checkpoint: Annotated[Path, typer.Option(help="Where it goes.")] = CHECKPOINT,
) -> None:
    """Write the weights of the run so far, and their card, as a checkpoint."""
    run = Run.load(CONFIG, prepare(corpus_file), folder)
    card.export(run, checkpoint)
    typer.echo((checkpoint / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    app()
