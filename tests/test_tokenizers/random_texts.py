"""Texts on which two tokenizers could disagree: a fixed list, and random ones for a vocabulary."""

import random
from collections.abc import Sequence

SCRIPTS = """
Straße naïve café Ærø Łódź İstanbul ǅ ﬁne
Ωμέγα ἀρχή  Москва Ђорђе  Հայաստան  საქართველო
עִבְרִית  العَرَبِيَّة  فارسی  اردو  ܣܘܪܝܝܐ  ދިވެހި
हिन्दी क्षत्रिय  বাংলা  ਪੰਜਾਬੀ  ગુજરાતી  ଓଡ଼ିଆ  தமிழ்  తెలుగు  ಕನ್ನಡ  മലയാളം  සිංහල
ไทย ภาษา  ພາສາລາວ  བོད་སྐད་  မြန်မာ  ភាសាខ្មែរ  አማርኛ  ᏣᎳᎩ  ᠮᠣᠩᠭᠣᠯ  ᓄᓇᕗᑦ
한국어 한국어  日本語 カタカナ ﾊﾝｶｸ ひらがな  漢字 𠮷野家  𐌲𐌿𐍄𐌹𐍃𐌺  𒀭𒈹  𓂀𓃭
""".strip()
FIXED = [
    "",
    " ",
    "a",
    "Once upon a time there was a king.",
    *SCRIPTS.splitlines(),
    *(f"a{' ' * n}b" for n in (*range(1, 41), 62, 63, 64, 80)),
    *("\n" * n + "x" for n in (1, 2, 30, 31, 32, 33, 70)),
    *("\t" * n for n in (1, 2, 30, 31, 32, 70)),
    "mixed \n \t \n\n  \t\t x\r\n\r\v\f\x85\u2028\u2029\u00a0\u3000end ",
    "▁", "▁▁", " ▁ ", "▁ ▁▁  ▁a▁", "a▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁b",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇪🇺🇫🇷 👍🏽👍🏿 ☃️ ❤️‍🔥 🧙‍♂️",
    "e\u0301" * 3 + "Z" + "".join(map(chr, range(0x300, 0x330))) + "o\u0308\u0304",
    "".join(map(chr, range(32))) + "\x7f" + "".join(map(chr, range(0x80, 0xA0))),
    "\ufeffBOM \ufffd \ufdd0 \uffff \U0010ffff \ue000 \u200b\u200d\u2060",
    "def f(x: int) -> dict[str, Any]:\n    return {'a': [x] * 3}  # <unused1>\r\n",
    "int main(void) { printf(\"%d\\n\", 0x1F); return 0; }\t/* ▁ */",
    '{"key": [1, 2.5e-3, null], "π": "\\u00e9"}',
    "# Title\n\n* item\n  * nested `code`\n\n| a | b |\n|---|---|\n",
    "<table><tr><td>1</td></tr></table> <s>struck</s> <h1>x</h1> <b><i>",
    "digits 1234567890 3.14 ⅷ ١٢٣ ४५",
    "<bos>a<eos><pad><unk><mask>", "<eos", "<<eos>>", "<eos>>", "x<start_of_turn>y<end_of_turn>z",
    "<start_of_turn><end_of_turn>", "<start_of_<end_of_turn>turn>", "[@BOS@][@BOS@", "<unused0>0>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<0x41> <0xE2><0x96><0x81> <0xZZ>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ababababababa ----------======== ........ hahahahaha",
]  # fmt: skip

_PLANES = [
    (0x20, 0x7F), (0x80, 0x250), (0x300, 0x370), (0x370, 0x600), (0x600, 0x700), (0x900, 0xE00),
    (0xE00, 0x1100), (0x1200, 0x1400), (0x2000, 0x2100), (0x2190, 0x2800), (0x3040, 0x3100),
    (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xE100), (0xFB00, 0x10000), (0x1F300, 0x1FB00),
    (0x10330, 0x10350), (0x12000, 0x12100), (0x20000, 0x20100), (0, 0x20),
]  # fmt: skip


class RandomTexts:
    """An endless supply for one vocabulary; the same seed gives the same texts."""

    def __init__(self, pieces: Sequence[str], special: Sequence[str], seed: int) -> None:
        """Make texts of these pieces, spelled with "▁", and of the special ones among others."""
        self._random = random.Random(seed)
        byte = [piece for piece in pieces if piece.startswith("<0x")]
        words = [piece.replace("▁", " ") for piece in pieces if piece not in {*byte, *special}]
        self._words = words or ["a"]
        self._special = [*special, *byte[:3], "<", ">", "[", "turn>", "▁"]
        self._kinds = [
            self._pieces, self._alphabet, self._characters, self._periods, self._spaces,
            self._borders, self._specials,
        ]  # fmt: skip

    def text(self) -> str:
        """The next text."""
        return self._random.choice(self._kinds)()

    def _some(self, most: int) -> range:
        return range(self._random.randint(1, most))

    def _pieces(self) -> str:
        return "".join(self._random.choice(self._words) for _ in self._some(20))

    def _alphabet(self) -> str:
        few = self._random.sample("abehlotinst -=_.*#/\\0123 \n", self._random.randint(1, 4))
        return "".join(self._random.choice(few) for _ in self._some(60))

    def _characters(self) -> str:
        first, last = self._random.choice(_PLANES)
        return "".join(
            chr(self._random.randrange(first, last)) if self._random.random() < 0.9 else " "
            for _ in self._some(30)
        )

    def _periods(self) -> str:
        a, b = self._random.choice(self._words), self._random.choice(self._words)
        cut = a[: self._random.randint(0, len(a))] + b[self._random.randint(0, len(b)) :]
        return cut * self._random.randint(1, 9)

    def _spaces(self) -> str:
        odd = [" ", "  ", "\t", "\n", "\n\n", "▁", "▁▁", "a", " " * self._random.randint(2, 80)]
        return "".join(self._random.choice(odd) for _ in self._some(12))

    def _borders(self) -> str:
        """A piece that begins as it ends, overlapping itself: merges at two places compete."""
        word = self._random.choice(self._words)
        for size in range(len(word) - 1, 0, -1):
            if word[:size] == word[-size:]:
                return self._random.choice("ab ") + word + word[size:] * self._random.randint(1, 4)
        return word + word[::-1] + word[1:]

    def _specials(self) -> str:
        parts = (
            self._random.choice(self._special if self._random.random() < 0.5 else self._words)
            for _ in self._some(10)
        )
        return "".join(parts)
