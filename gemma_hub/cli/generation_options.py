"""What the commands that generate share: their options, and the settings that these make."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gemma_hub.generation.settings import GenerationSettings

MaxNewTokens = Annotated[int, typer.Option(help="Stop after this many new tokens.")]
Temperature = Annotated[
    float, typer.Option(help="0 takes the most probable token; higher is more varied.")
]
TopK = Annotated[int | None, typer.Option(help="Draw from this many most probable tokens.")]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the fewest tokens that together are this probable.")
]
MinP = Annotated[
    float | None,
    typer.Option(help="Draw from tokens at least this times as probable as the first."),
]
TypicalP = Annotated[
    float | None,
    typer.Option(help="Draw from the least surprising tokens that together are this probable."),
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: tokens that are there already become less probable.")
]
NoRepeatNgramSize = Annotated[
    int | None, typer.Option(help="No sequence of so many tokens comes twice.")
]
MinNewTokens = Annotated[int | None, typer.Option(help="Do not end before this many new tokens.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="End before this text; may be given several times.")
]
NumBeams = Annotated[
    int,
    typer.Option(help="Above 1: search for the most probable text with so many beams."),
]
LengthPenalty = Annotated[
    float, typer.Option(help="Of a beam search: above 0 favours long texts, below 0 short ones.")
]
EarlyStopping = Annotated[
    str,
    typer.Option(
        metavar="true|false|never",
        help="End a beam search at so many texts, when no better one is likely, or possible.",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option("--draft", help="A smaller model that proposes tokens: the same text, sooner."),
]
PromptLookup = Annotated[
    int | None,
    typer.Option(help="Propose what followed the last so many tokens before: the same text."),
]
DraftTokens = Annotated[int, typer.Option(help="Tokens that are proposed at once.")]
Seed = Annotated[
    int | None,
    typer.Option(help="Of the draws: the same seed, the same text.", show_default="random"),
]


def chosen_settings(context: typer.Context) -> "GenerationSettings":
    """The settings that the options of a command make.

    Raises:
        InputError: an option's value is wrong.
    """
    from gemma_hub.generation.settings import GenerationSettings

    names = {field.name for field in dataclasses.fields(GenerationSettings)}
    chosen = {name: value for name, value in context.params.items() if name in names}
    if "early_stopping" in chosen:
        words = {"true": True, "false": False}
        chosen["early_stopping"] = words.get(chosen["early_stopping"], chosen["early_stopping"])
    return GenerationSettings(**{**chosen, "stop": chosen["stop"] or ()})


def as_keywords(settings: "GenerationSettings") -> dict[str, Any]:
    """What differs from the defaults."""
    fields = dataclasses.fields(settings)
    given = {field.name: (getattr(settings, field.name), field.default) for field in fields}
    return {name: value for name, (value, default) in given.items() if value != default}


def speed(count: int, seconds: float) -> str:
    """`count` new tokens in words, and how many a second."""
    return f"{count} tokens at {count / max(seconds, 1e-9):.1f} a second"
