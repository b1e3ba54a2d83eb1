"""Texts on which two tokenizers could disagree: a fixed list, and random ones for a vocabulary."""

import random
from collections.abc import Callable, Iterable, Sequence

SCRIPTS = """
Straße naïve café Ærø Łódź İstanbul ǅ ﬁne Việt Nam ʻokina
Ωμέγα ἀρχή  Москва Ђорђе  Հայաստան  საქართველო Ⴀ Ა
עִבְרִית  العَرَبِيَّة  فارسی  اردو  ܣܘܪܝܝܐ  ދިވެހި  ﷽ ﷺ
हिन्दी क्षत्रिय  বাংলা  ਪੰਜਾਬੀ  ગુજરાતી  ଓଡ଼ିଆ  தமிழ்  తెలుగు  ಕನ್ನಡ  മലയാളം  සිංහල
ไทย ภาษา  ພາສາລາວ  བོད་སྐད་  མ་རྒྱ༎  မြန်မာ  ភាសាខ្មែរ  አማርኛ  ᏣᎳᎩ ꭰ  ᠮᠣᠩᠭᠣᠯ  ᓄᓇᕗᑦ  ᚠᚢᚦ
한국어 한국어  日本語 カタカナ ﾊﾝｶｸ ひらがな  漢字 𠮷野家  𐌲𐌿𐍄𐌹𐍃𐌺  𒀭𒈹  𓂀𓃭  ꦗꦮ  ⵜⵉⴼⵉ  ߒߞߏ
""".strip()
CODE = [
    "def f(x: int) -> dict[str, Any]:\n    return {'a': [x] * 3}  # <unused1>\r\n",
    "class A:\n\tdef __init__(self):\n\t\tself._x = '''\n\n\n'''\n        if a <b> c: pass\n",
    "int main(void) { printf(\"%d\\n\", 0x1F); return 0; }\t/* ▁ */\r\n#include <s>\n",
    '{"key": [1, 2.5e-3, null, true], "π": "\\u00e9", "<eos>": {"": []}}',
    "# Title\n\n* item\n  * nested `code`\n    - [ ] a\n\n| a | b |\n|---|---|\n\n```\n<eos>\n```",
    "<!DOCTYPE html>\n<html>\n  <body class='x'><h1>&nbsp;</h1><p>a<br/>b</p></body></html>\n",
    "<table><tr><td>1</td></tr></table> <s>struck</s> <h1>x</h1> <b><i></i></b><code><td",
]  # fmt: skip
SPACES = [
    *(f"a{' ' * n}b" for n in range(2, 81)),
    *("\n" * n + "x" for n in (1, 2, 30, 31, 32, 33, 70)),
    *("\t" * n for n in (1, 2, 30, 31, 32, 70)),
    *(f"x{' ' * n}\n{' ' * n}\t{' ' * n}\n\n{'▁' * n} " for n in (1, 2, 15, 30, 31, 32, 33, 80)),
    "mixed \n \t \n\n  \t\t x\r\n\r\v\f\x85\u2028\u2029\u00a0\u3000end ",
    "▁", "▁▁", " ▁ ", "▁ ▁▁  ▁a▁", "a▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁b",
]  # fmt: skip
SYMBOLS = [
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇪🇺🇫🇷🇺 👍🏽👍🏿🏿 ☃️ ❤️‍🔥 🧙‍♂️ #️⃣ 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "e\u0301" * 3 + "Z" + "".join(map(chr, range(0x300, 0x370))) + "o\u0308\u0304 \u0301",
    "".join(map(chr, range(32))) + "\x7f" + "".join(map(chr, range(0x80, 0xA0))),
    "\x00", "a\x00b\x00\x00", "\ufeffBOM\ufeff", "\ufffd", "a\ufffd\ufffd b\ufffd",
    "\ufdd0 \ufffe\uffff \U0001ffff \U0010ffff \ue000 \u200b\u200d\u2060 \u202eabc\u202c",
    "digits 1234567890 3.14 ⅷ ١٢٣ ४५ 𝟘𝟙 ½ ①",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ababababababa ----------======== ........ hahahahaha",
]  # fmt: skip
SPECIAL = [
    "<bos>a<eos><pad><unk><mask>", "<eos", "<<eos>>", "<eos>>", "x<start_of_turn>y<end_of_turn>z",
    "<start_of_turn><end_of_turn>x", "<start_of_<end_of_turn>turn>", "[@BOS@][@BOS@", "<eos><eos",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", "king<eos>king", "<unused0>0>",
    "<0x41> <0xE2><0x96><0x81> <0xZZ>", " <bos> ▁<eos>▁ ", "<start▁of▁turn> <start of turn>",
    "[a]<[a]>[[a]]<[a]<x>y<x>", "<sos><s<s><so", "<eos>é<eos>\n\n<eos>  <eos>",
]  # fmt: skip
FIXED = [
    "", " ", "a", "Once upon a time there was a king.",
    *SCRIPTS.splitlines(), *CODE, *SPACES, *SYMBOLS, *SPECIAL,
]  # fmt: skip

_PLANES = [
    (0x20, 0x7F), (0x80, 0x250), (0x300, 0x370), (0x370, 0x600), (0x600, 0x700), (0x900, 0xE00),
    (0xE00, 0x1100), (0x1200, 0x1400), (0x2000, 0x2100), (0x2190, 0x2800), (0x3040, 0x3100),
    (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xE100), (0xFB00, 0x10000), (0x1F300, 0x1FB00),
    (0x10330, 0x10350), (0x12000, 0x12100), (0x20000, 0x20100), (0, 0x20), (0xE000, 0x110000),
]  # fmt: skip


class RandomTexts:
    """An endless supply for one vocabulary; the same seed gives the same texts."""

    def __init__(self, pieces: Iterable[str], special: Sequence[str], seed: int) -> None:
        """Make texts of these pieces, spelled with "▁", and of the special ones among others."""
        self._random = random.Random(seed)
        pieces = list(pieces)
        byte = [piece for piece in pieces if piece.startswith("<0x")]
        there = set(pieces) - {*byte, *special}
        self._known = {piece.replace("▁", " ") for piece in there}
        self._words = [piece.replace("▁", " ") for piece in pieces if piece in there] or ["a"]
        self._special = [*special, *byte[:3], "<", ">", "[", "]", "turn>", "▁", "\n", " "]
        self._kinds: list[Callable[[], str]] = [
            self._pieces, self._alphabet, self._characters, self._periods, self._spaces,
            self._borders, self._specials, self._fixed,
        ]  # fmt: skip

    def text(self) -> str:
        """The next text."""
        if self._random.random() < 0.8:
            return self._random.choice(self._kinds)()
        mixture = "".join(self._random.choice(self._kinds)() for _ in range(3))
        start = self._random.randrange(len(mixture) // 2 + 1)
        return mixture[start : len(mixture) - self._random.randrange(3)]

    def ids(self, size: int) -> list[int]:
        """Ids of a vocabulary of that size."""
        return [self._random.randrange(size) for _ in self._some(12)]

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
        return cut * self._random.randint(1, 9) + a

    def _spaces(self) -> str:
        odd = [" ", "  ", "\t", "\n", "\n\n", "▁", "▁▁", "a", "\r\n"]
        odd += [self._random.choice(" \n\t▁") * self._random.randint(2, 80)]
        return "".join(self._random.choice(odd) for _ in self._some(12))

    def _borders(self) -> str:
        """A piece that overlaps itself: it could be merged at two places, but only at one."""
        for _ in range(20):
            word = self._random.choice(self._words)
            # Both ends are the same piece, and so is what each leaves over.
            sizes = [
                size for size in range(1, len(word))
                if word[:size] == word[-size:]
                and {word[:size], word[size:], word[:-size]} <= self._known
            ]  # fmt: skip
            if sizes:
                break
        else:
            return word + word[::-1] + word[1:]
        rest = word[self._random.choice(sizes) :]
        around = [self._random.choice(self._words)[: self._random.randint(0, 3)] for _ in "ab"]
        return around[0] + word + rest * self._random.randint(1, 5) + around[1]

    def _specials(self) -> str:
        parts = (
            self._random.choice(self._special if self._random.random() < 0.5 else self._words)
            for _ in self._some(10)
        )
        whole = "".join(parts)
        return whole[self._random.randint(0, 2) :]

    def _fixed(self) -> str:
        """A stretch of a fixed text, with something put into it."""
        text = self._random.choice(FIXED)
        start = self._random.randrange(len(text) + 1)
        end = self._random.randint(start, len(text))
        put = self._random.choice([*self._special, self._random.choice(self._words)])
        return text[start:end] + put + text[end : end + 20]
