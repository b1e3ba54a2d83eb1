"""`gemma-hub generate-many`: continue every prompt of a file."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gemma_hub.cli import generation_options as options
from gemma_hub.cli import texts
from gemma_hub.cli.console import progress_bar, waiting, write
from gemma_hub.cli.files import checked_file, whole_text
from gemma_hub.cli.prompt_file import Prompt, PromptFile

if TYPE_CHECKING:
    from gemma_hub.generation.many import Progress
    from gemma_hub.tasks.causal_lm import CausalLM


def generate_many(
    context: typer.Context,
    source: texts.Source,
    file: Annotated[str, typer.Argument(help="A prompt on each line; - is standard input.")],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write here, all or nothing, and not to standard output.",
            dir_okay=False,
            callback=checked_file,
        ),
    ] = None,
    jsonl: Annotated[
        bool | None,
        typer.Option(
            help='Whether a line is an object with "prompt" or "input_ids".',
            show_default="by the suffix .jsonl",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that run at once.")] = 8,
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
    seed: options.Seed = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Write the log-probability of each new token too.")
    ] = False,
) -> None:
    """Continue every prompt of a file: writes a JSON object on a line for each, in their order."""
    settings = options.chosen_settings(context)
    backend_options = texts.backend_options(option)
    path = None if file == "-" else Path(file)
    _check_output(output, path)
    lines = PromptFile(path, jsonl if jsonl is not None else file.endswith(".jsonl"))
    # A file is read before the model is, so that a wrong line is found first.
    read = lines.read() if lines.is_stream else list(lines.read())
    model = texts.loaded(source, "causal_lm", backend, dtype, device, backend_options)
    lm = cast("CausalLM", model)
    prompts: Iterable[Prompt] = lines.checked(read, lm, settings.max_new_tokens)
    if not lines.is_stream:
        with waiting(f"Checking {file}"):
            prompts = list(prompts)
    keywords = options.as_keywords(settings)
    with (
        nullcontext(write) if output is None else whole_text(output) as write_line,
        _progress(output, prompts) as progress,
    ):
        for record in _records(lm, prompts, batch_size=batch_size, progress=progress, **keywords):
            write_line(json.dumps(record, ensure_ascii=False) + "\n")


def _check_output(output: Path | None, path: Path | None) -> None:
    """Refuse to replace what is no file of results."""
    if output is None or not output.exists():
        return
    if not output.is_file():
        raise typer.BadParameter(f"{output} is no regular file; leave --output out.")
    if path is not None and path.exists() and output.samefile(path):
        raise typer.BadParameter("--output is the file of the prompts; choose another name.")


def _records(
    lm: "CausalLM", prompts: Iterable[Prompt], **arguments: Any
) -> Iterator[dict[str, Any]]:
    """What `generate --json` says of each prompt, without what is not there for these settings."""
    is_list = isinstance(prompts, list)
    given, kept = (prompts, iter(prompts)) if is_list else itertools.tee(prompts)
    results = lm.generate_many(given, **arguments)
    # The results come first: a prompt of a stream is kept once it was read for them.
    for index, (result, prompt) in enumerate(zip(results, kept, strict=True)):
        text = {"prompt": prompt} if isinstance(prompt, str) else {}
        said = dataclasses.asdict(result).items()
        yield {"index": index, **text, **{name: each for name, each in said if each is not None}}


@contextmanager
def _progress(output: Path | None, prompts: Iterable[Prompt]) -> Iterator["Progress | None"]:
    """A bar, unless the results themselves show how far it is: those that go to a terminal."""
    if output is None and sys.stdout.isatty():
        yield None
        return
    with progress_bar() as bar:
        if bar is None:
            yield None
            return

        def show(done: int, total: int | None) -> None:
            bar(f"{done} prompts" if total is None else f"{done} of {total} prompts", done, total)

        show(0, len(prompts) if isinstance(prompts, list) else None)
        yield show
