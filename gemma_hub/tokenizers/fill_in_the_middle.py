"""CodeGemma's prompts for code between a prefix and a suffix."""

from dataclasses import dataclass

from gemma_hub.errors import TokenizerError
from gemma_hub.tokenizers.text import TextCodec

_PREFIX, _MIDDLE, _SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
_FILE_SEPARATOR = "<|file_separator|>"


@dataclass(frozen=True, slots=True)
class FillInTheMiddle:
    """The ids of CodeGemma's tokens.

    Attributes:
        prefix, middle, suffix: in front of the code before, of the code to write, of that after.
        stops: ids that end what the model writes, but for <eos>.
    """

    prefix: int
    middle: int
    suffix: int
    stops: tuple[int, ...]

    @classmethod
    def of(cls, codec: TextCodec) -> "FillInTheMiddle":
        """The ids in a vocabulary.

        Raises:
            TokenizerError: it has no such tokens.
        """
        names = (_PREFIX, _MIDDLE, _SUFFIX)
        ids = [codec.id(name) for name in names]
        missing = [name for name, i in zip(names, ids, strict=True) if i not in codec.special_ids]
        if missing:
            raise TokenizerError(
                f"This vocabulary has no {' and no '.join(missing)}; only CodeGemma's has them. "
                "Load the tokenizer of a CodeGemma checkpoint."
            )
        prefix, middle, suffix = own = tuple(i for i in ids if i is not None)
        separator = codec.id(_FILE_SEPARATOR)
        return cls(prefix, middle, suffix, own if separator is None else (*own, separator))

    def prompt(self, codec: TextCodec, before: str, after: str) -> list[int]:
        """Ids of a prompt without <bos>; the code is plain text whatever it spells."""
        first, second = codec.encode([before, after], allow_special=False)
        return [self.prefix, *first, self.suffix, *second, self.middle]
