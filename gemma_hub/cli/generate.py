"""`gemma-hub generate`: continue a text."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.text import Text

from gemma_hub.cli import generation_options as options
from gemma_hub.cli import texts
from gemma_hub.cli.console import err, out, waiting, write

if TYPE_CHECKING:
    from gemma_hub.generation.settings import GenerationSettings
    from gemma_hub.outputs import TextPiece
    from gemma_hub.tasks.causal_lm import CausalLM


def generate(
    context: typer.Context,
    source: texts.Source,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads standard input.")],
    backend: texts.Backend = None,
    dtype: texts.Dtype = "auto",
    device: texts.Device = "auto",
    option: texts.Option = None,
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    typical_p: options.TypicalP = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    no_repeat_ngram_size: options.NoRepeatNgramSize = None,
    min_new_tokens: options.MinNewTokens = None,
    stop: options.Stop = None,
    num_beams: options.NumBeams = 1,
    length_penalty: options.LengthPenalty = 1.0,
    early_stopping: options.EarlyStopping = "false",
    draft_source: options.Draft = None,
    prompt_lookup: options.PromptLookup = None,
    draft_tokens: options.DraftTokens = 4,
    seed: options.Seed = None,
    stream: Annotated[
        bool | None,
        typer.Option(help="Write the text as it is made.", show_default="on a terminal"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object with text, ids and settings.")
    ] = False,
) -> None:
    """Continue a text: prints the prompt and what follows it."""
    if as_json and stream:
        raise typer.BadParameter("--json writes one object at the end; leave out --stream.")
    # Checked before the model is loaded; and a seed that is drawn here can be shown.
    settings = options.chosen_settings(context)
    if stream and settings.num_beams > 1:
        raise typer.BadParameter("The text of a beam search comes at its end; leave out --stream.")
    if draft_source and prompt_lookup:
        raise typer.BadParameter("Give one of --draft and --prompt-lookup.")
    backend_options = texts.backend_options(option)
    if prompt == "-":
        prompt = sys.stdin.read()
    lm = _loaded(source, backend, dtype, device, backend_options)
    keywords = options.as_keywords(settings)
    if draft_source is not None:
        keywords["draft"] = _loaded(draft_source, backend, dtype, device, backend_options)
    if as_json:
        _write_json(lm, source, prompt, settings, keywords, draft_source)
        return
    start = time.perf_counter()
    # The prompt is written when the model has accepted it, so that an error leaves no half output.
    if settings.num_beams == 1 and (out().is_terminal if stream is None else stream):
        pieces = lm.stream(prompt, **keywords)
        _write_prompt(prompt)
        count = _write_pieces(pieces)
    else:
        with waiting("Generating"):
            generation = lm.generate(prompt, **keywords)
        _write_prompt(prompt)
        write(generation.text)
        count = len(generation.token_ids)
    write("\n")
    _say_how(lm, settings, count, time.perf_counter() - start)


def _loaded(
    source: str, backend: str | None, dtype: str, device: str, options: dict[str, Any]
) -> "CausalLM":
    return cast("CausalLM", texts.loaded(source, "causal_lm", backend, dtype, device, options))


def _write_prompt(prompt: str) -> None:
    out().print(Text(prompt, style="dim"), end="", soft_wrap=True)


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


def _write_json(
    lm: "CausalLM",
    source: str,
    prompt: str,
    settings: "GenerationSettings",
    keywords: dict[str, Any],
    draft_source: str | None,
) -> None:
    with waiting("Generating"):
        generation = lm.generate(prompt, **keywords)
    record = {
        "source": source,
        "prompt": prompt,
        **dataclasses.asdict(generation),
        "settings": {**dataclasses.asdict(settings), "draft": draft_source},
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
        f"{options.speed(count, seconds)}; {lm.backend.name}, {lm.dtype} on {lm.device}{seed}",
        style="dim",
    )
