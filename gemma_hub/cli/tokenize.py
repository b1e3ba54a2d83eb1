"""`gemma-hub tokenize`: how a text is cut into tokens."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from gemma_hub.cli.console import err, out, table, waiting, write
from gemma_hub.cli.sources import local_source

if TYPE_CHECKING:
    from gemma_hub.tokenizers import TokenizerInterface


def tokenize(
    source: Annotated[
        str,
        typer.Argument(help="A checkpoint, a vocabulary file, an installed name, or an id."),
    ],
    text: Annotated[str, typer.Argument(help="The text; - reads standard input.")],
    fast: Annotated[
        bool | None,
        typer.Option(
            help="By the tokenizers package, or by sentencepiece; the tokens are the same.",
            show_default="by the file that is there",
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Keep text that spells a special token plain text.")
    ] = False,
    around: Annotated[
        bool, typer.Option(help="Put <bos> around the text, as models get it.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object with every token.")
    ] = False,
) -> None:
    """Show the tokens of a text: place, id, piece, span in characters, and the characters."""
    if text == "-":
        text = sys.stdin.read()
    path = local_source(source, "tokenizer")
    with waiting(f"Loading {source}"):
        tokenizer = _opened(path, fast)
    ids, spans = tokenizer.encode_with_offsets(
        text, add_special_tokens=around, allow_special=not plain
    )
    tokens = [
        {
            "id": token_id,
            "piece": tokenizer.id_to_token(token_id),
            "start": start,
            "end": end,
            "text": text[start:end],
            "special": token_id in tokenizer.special_token_ids,
        }
        for token_id, (start, end) in zip(ids, spans, strict=True)
    ]
    if as_json:
        record = {
            "source": source,
            "text": text,
            "tokens": tokens,
            "tokenizer": type(tokenizer).__name__,
            "library": tokenizer.codec.engine.library,
        }
        write(json.dumps(record, ensure_ascii=False, indent=2) + "\n")
        return
    _show(tokens)
    err().print(
        f"{len(tokens)} tokens for {len(text)} characters, by {type(tokenizer).__name__} "
        f"({tokenizer.codec.engine.library})",
        style="dim",
    )


def _opened(source: str, fast: bool | None) -> "TokenizerInterface":
    from gemma_hub.source import resolved
    from gemma_hub.tokenizers import GemmaTokenizer, open_tokenizer

    if fast:
        from gemma_hub.tokenizers import GemmaTokenizerFast

        return GemmaTokenizerFast.from_pretrained(source)
    tokenizer = open_tokenizer(resolved(source)) if fast is None else None
    if tokenizer is not None:
        return tokenizer
    return GemmaTokenizer.from_pretrained(source)


def _show(tokens: list[dict[str, Any]]) -> None:
    """A line for each token; characters are quoted as in JSON, so that spaces are seen."""
    listed = table("place", "id", "piece", "span", "characters")
    for place, token in enumerate(tokens):
        piece = json.dumps(token["piece"], ensure_ascii=False)[1:-1]  # a newline as \n
        listed.add_row(
            str(place),
            str(token["id"]),
            Text(piece, style="bold" if token["special"] else ""),
            f"{token['start']}-{token['end']}" if token["end"] else "",
            Text(json.dumps(token["text"], ensure_ascii=False) if token["end"] else ""),
        )
    out().print(listed)
