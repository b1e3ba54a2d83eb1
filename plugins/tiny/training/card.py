"""From a finished run to the checkpoint folder with its model card."""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from string import Template
from typing import Any

import torch

from gemma_hub import Gemma
from gemma_hub.checkpoints import save_checkpoint
from gemma_hub.parameters import ArrayWeights
from gemma_hub_torch.backend import as_array
from training import corpus
from training.loop import Run, total_loss

# (prompt, settings of `generate`): greedy first, then seeded; chosen by hand.
SAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("The wolf", {"max_new_tokens": 48}),
    ("THE FOX AND THE KING\n\n", {"max_new_tokens": 48}),
    ("Once upon a time", {"max_new_tokens": 80, "temperature": 0.6, "top_p": 0.9, "seed": 7}),
    ("Once upon a time", {"max_new_tokens": 80, "temperature": 0.6, "top_p": 0.9, "seed": 2}),
    ("", {"max_new_tokens": 80, "temperature": 0.6, "top_p": 0.9, "seed": 2}),
]
CHECKED_ROWS = 3  # of the held-out rows, whose loss a test computes again
_CURVE_LINES = 12


def export(run: Run, checkpoint: Path) -> None:
    """Write the run's weights, the vocabulary, the figures and the card to `checkpoint`."""
    rounded = {name: p.to(torch.bfloat16) for name, p in run.module.state_dict().items()}
    run.module.load_state_dict(rounded)  # the losses are those of what is in the file
    folder = run.folder / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    vocabulary = run.folder / "tokenizer.model"
    vocabulary.write_bytes(run.data.vocabulary)
    save_checkpoint(
        folder,
        run.config,
        ArrayWeights({name: as_array(p) for name, p in rounded.items()}),
        files=[vocabulary],
    )
    figures = _figures(run, folder)
    (folder / "training.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(run, folder, figures), encoding="utf-8")
    checkpoint.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():  # file by file, so that whoever has the old one mapped keeps it
        partial = checkpoint / f".{path.name}.partial"
        shutil.copyfile(path, partial)
        partial.replace(checkpoint / path.name)


def _figures(run: Run, folder: Path) -> dict[str, Any]:
    rows = run.held_out_rows
    total = total_loss(run.module, rows)
    tokens = sum(len(row) - 1 for row in rows)
    checked = rows[:CHECKED_ROWS]
    checked_tokens = sum(len(row) - 1 for row in checked)
    return {
        "corpus_sha256": corpus.SHA256,
        "settings": dataclasses.asdict(run.settings),
        "steps_done": run.step,
        "seconds": round(run.seconds),
        "held_out": {
            "tokens": tokens,
            "bytes": run.held_out_bytes,
            "nats_per_token": round(total / tokens, 6),
            "bits_per_byte": round(total / math.log(2) / run.held_out_bytes, 6),
            "overlap": round(corpus.overlap(run.data.training, run.data.held_out), 6),
            "checked_rows": CHECKED_ROWS,
            "checked_nats_per_token": round(total_loss(run.module, checked) / checked_tokens, 6),
        },
        "samples": _samples(folder),
        "curve": run.curve,
    }


def _samples(folder: Path) -> list[dict[str, Any]]:
    lm = Gemma.load(folder, backend="torch", dtype="float32", device="cpu")
    return [
        {"prompt": prompt, **settings, "text": lm.generate(prompt, **settings).text}
        for prompt, settings in SAMPLES
    ]


def _card(run: Run, folder: Path, figures: dict[str, Any]) -> str:
    held_out, config, settings = figures["held_out"], run.config, run.settings
    best = min(run.curve, key=lambda point: point["held_out"])
    every = max(1, math.ceil(len(run.curve) / _CURVE_LINES))
    shown = [
        p
        for p in run.curve[::-1]
        if (run.curve[-1]["step"] - p["step"]) % (every * settings.evaluate_every) == 0 or p is best
    ][::-1]
    return Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8")).substitute(
        parameters=f"{config.num_parameters:,}",
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        attention_width=config.num_attention_heads * config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        corpus_bytes=f"{corpus.BYTES:,}",
        corpus_sha256=corpus.SHA256,
        held_out_tokens=f"{held_out['tokens']:,}",
        held_out_bytes=f"{held_out['bytes']:,}",
        overlap=f"{100 * held_out['overlap']:.1f}",
        steps=f"{run.step:,}",
        rows=settings.rows,
        length=settings.length,
        minutes=round(run.seconds / 60),
        dropout=settings.dropout,
        weight_decay=settings.weight_decay,
        best=f"{best['held_out']:.3f}",
        best_step=f"{best['step']:,}",
        curve="\n".join(
            f"| {p['step']:,} | {p['training']:.3f} | {p['held_out']:.3f} |" for p in shown
        ),
        nats=f"{held_out['nats_per_token']:.4f}",
        bits=f"{held_out['bits_per_byte']:.4f}",
        samples="\n\n".join(map(_sample, figures["samples"])),
        files="\n".join(map(_file_line, sorted(folder.iterdir()))),
    )


def _sample(sample: dict[str, Any]) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in sample.items() if k not in ("prompt", "text"))
    text = (sample["prompt"] + sample["text"]).strip()
    quoted = "\n".join(f"> {line}".rstrip() for line in text.split("\n"))
    return f"`{sample['prompt']!r}, {settings}`\n\n{quoted}"


def _file_line(path: Path) -> str:
    data = path.read_bytes()
    return f"| {path.name} | {len(data):,} | `{hashlib.sha256(data).hexdigest()}` |"
