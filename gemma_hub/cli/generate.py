"""`gemma-hub generate`: continue a text."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from gemma_hub.cli.console import err, out, waiting, write
from gemma_hub.cli.sources import local_source

if TYPE_CHECKING:
    from gemma_hub.generation.settings import GenerationSettings
    from gemma_hub.outputs import TextPiece
    from gemma_hub.tasks.causal_lm import CausalLM


def generate(
    source: Annotated[
        str, typer.Argument(help="A checkpoint, an installed name: tiny, or a repository id.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")],
    backend: Annotated[
        str | None, typer.Option(help="Backend; see gemma-hub backends.", show_default="torch")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Compute type; auto is the checkpoint's own.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Device, in the framework's words.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many new tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most probable token; higher is more varied.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from this many most probable tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the fewest tokens that together are this probable."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Draw from tokens at least this times as probable as the first."),
    ] = None,
    typical_p: Annotated[
        float | None,
        typer.Option(help="Draw from the least surprising tokens that together are this probable."),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that are there already become less probable.")
    ] = 1.0,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(help="No sequence of so many tokens comes twice.")
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(help="Do not end before this many new tokens.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text; may be given several times."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the draws: the same seed, the same text.", show_default="random"),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(help="Write the text as it is made.", show_default="on a terminal"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object with text, ids and settings.")
    ] = False,
) -> None:
    """Continue a text: prints the prompt and what follows it."""
    from gemma_hub.generation.settings import GenerationSettings

    if as_json and stream:
        raise typer.BadParameter("--json writes one object at the end; leave out --stream.")
    # Checked before the model is loaded; and a seed that is drawn here can be shown.
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        min_new_tokens=min_new_tokens,
        stop=stop or (),
        seed=seed,
    )
    if prompt == "-":
        prompt = sys.stdin.read()
    path = local_source(source)
    with waiting(f"Loading {source}"):
        from gemma_hub.gemma import Gemma

        lm = Gemma.load(path, backend=backend, dtype=dtype, device=device)
    if as_json:
        _write_json(lm, source, prompt, settings)
        return
    start = time.perf_counter()
    # The prompt is written when the model has accepted it, so that an error leaves no half output.
    if out().is_terminal if stream is None else stream:
        pieces = lm.stream(prompt, **_keywords(settings))
        _write_prompt(prompt)
        count = _write_pieces(pieces)
    else:
        with waiting("Generating"):
            generation = lm.generate(prompt, **_keywords(settings))
        _write_prompt(prompt)
        write(generation.text)
        count = len(generation.token_ids)
    write("\n")
    _say_how(lm, settings, count, time.perf_counter() - start)


def _write_prompt(prompt: str) -> None:
    out().print(Text(prompt, style="dim"), end="", soft_wrap=True)


def _keywords(settings: "GenerationSettings") -> dict[str, object]:
    """What differs from the defaults."""
    fields = dataclasses.fields(settings)
    given = {field.name: (getattr(settings, field.name), field.default) for field in fields}
    return {name: value for name, (value, default) in given.items() if value != default}


def _write_pieces(pieces: "Iterator[TextPiece]") -> int:
    """Write the pieces as they come; the number of new tokens."""
    count = 0
    try:
        for piece in pieces:
            count += piece.token_id is not None
            write(piece.text)
    except KeyboardInterrupt:
        write("\n")
        raise
    return count


def _write_json(lm: "CausalLM", source: str, prompt: str, settings: "GenerationSettings") -> None:
    with waiting("Generating"):
        generation = lm.generate(prompt, **_keywords(settings))
    record = {
        "source": source,
        "prompt": prompt,
        **dataclasses.asdict(generation),
        "settings": dataclasses.asdict(settings),
        "backend": lm.backend.name,
        "distribution": lm.backend.distribution,
        "version": lm.backend.version,
        "dtype": lm.dtype,
        "device": lm.device,
    }
    write(json.dumps(record, ensure_ascii=False, indent=2) + "\n")


def _say_how(lm: "CausalLM", settings: "GenerationSettings", count: int, seconds: float) -> None:
    console = err()
    if not (console.is_terminal and sys.stdout.isatty()):
        return
    seed = f", seed {settings.seed}" if settings.temperature > 0 else ""
    console.print(
        f"{count} tokens at {count / max(seconds, 1e-9):.1f} a second; "
        f"{lm.backend.name}, {lm.dtype} on {lm.device}{seed}",
        style="dim",
    )
