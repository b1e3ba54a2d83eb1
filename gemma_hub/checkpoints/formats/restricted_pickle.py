"""The part of pickle that a file of tensors needs, read by hand: nothing in it can be executed.

A pickle is a program for a stack machine. This machine has the instructions that `torch.save`
writes (protocol 2), makes texts, numbers, tuples, lists and dicts, and knows the globals that it is
given and no others. It keeps what the file spells and nothing that the file merely claims: a memo
is a table, not an array of a size that the file names.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# No Gemma comes near these; the limits keep a damaged file from taking the time or the memory.
_MAX_INSTRUCTIONS = 200_000
_MAX_CALLS = 20_000
_MAX_GLOBAL = 256  # bytes of the name of a global
_PROTOCOL = 2


class MalformedPickle(Exception):
    """What is wrong, and where."""


class ForbiddenGlobal(MalformedPickle):
    """The pickle refers to something that is not needed for tensors, and may be code."""


@dataclass(frozen=True, slots=True)
class Maker:
    """A global that may be called.

    Attributes:
        name: as the pickle has it, "module.name".
        make: what is called with the arguments; it trusts none, and raises a MalformedPickle.
    """

    name: str
    make: Callable[[tuple[object, ...]], object]


def read_pickle(
    data: bytes, known: Mapping[str, object], persistent: Callable[[object], object]
) -> object:
    """What a pickle spells.

    Args:
        data: the pickle; its size is for the caller to bound.
        known: {"module.name": what it stands for}; a `Maker` if it may be called.
        persistent: from a persistent id to what it stands for; raises a MalformedPickle.

    Returns:
        Texts, whole numbers, floats, booleans, None, tuples, lists, dicts with texts or whole
        numbers as keys, and what `known` and `persistent` made. It may refer to itself.

    Raises:
        ForbiddenGlobal: it refers to a global that is not known.
        MalformedPickle: it is no such pickle.
    """
    return _Machine(data, known, persistent).run()


def shown(value: object) -> str:
    """A value in an error message: a text or a number as it is, anything else by its kind.

    Never the content of a list or a dict, which might refer to itself, or print without an end.
    """
    return repr(value)[:80] if type(value) in (str, int, float) else type(value).__name__


class _Machine:
    def __init__(
        self, data: bytes, known: Mapping[str, object], persistent: Callable[[object], object]
    ) -> None:
        self._data, self._at = data, 0
        self._known, self._persistent = known, persistent
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}
        self._calls = 0

    def run(self) -> object:
        instructions = {code: getattr(self, name) for code, name in _INSTRUCTIONS.items()}
        stop = ord(".")
        for _ in range(_MAX_INSTRUCTIONS):
            start = self._at
            code = self._number(1)
            if code == stop:
                return self._result()
            if code not in instructions:
                raise MalformedPickle(
                    f"byte {start} of its pickle is 0x{code:02x}, which is no instruction that "
                    f"torch.save writes with protocol {_PROTOCOL}"
                )
            try:
                instructions[code]()
            except IndexError as error:
                raise MalformedPickle(
                    f"byte {start} of its pickle takes a value where there is none"
                ) from error
        raise MalformedPickle(f"its pickle has more than {_MAX_INSTRUCTIONS:,} instructions")

    def _result(self) -> object:
        if self._at != len(self._data) or len(self._stack) != 1 or self._marks:
            raise MalformedPickle("its pickle does not end with one value")
        return self._stack[0]

    # -- bytes -------------------------------------------------------------------------------------

    def _take(self, size: int) -> bytes:
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise MalformedPickle(f"its pickle ends after {len(self._data)} bytes, in a value")
        return self._data[start : self._at]

    def _number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + _MAX_GLOBAL)
        if end < 0:
            raise MalformedPickle(f"byte {self._at} of its pickle begins a name without an end")
        line = self._take(end - self._at)
        self._at = end + 1
        return line.decode("ascii", "backslashreplace")

    # -- values ------------------------------------------------------------------------------------

    def protocol(self) -> None:
        number = self._number(1)
        if number != _PROTOCOL:
            raise MalformedPickle(
                f"its pickle has protocol {number}; expected {_PROTOCOL}, which torch.save writes"
            )

    def none(self) -> None:
        self._stack.append(None)

    def true(self) -> None:
        self._stack.append(True)

    def false(self) -> None:
        self._stack.append(False)

    def byte(self) -> None:
        self._stack.append(self._number(1))

    def two_bytes(self) -> None:
        self._stack.append(self._number(2))

    def four_bytes(self) -> None:
        self._stack.append(self._number(4, signed=True))

    def long(self) -> None:
        self._stack.append(self._number(self._number(1), signed=True))

    def real(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def text(self) -> None:
        start, raw = self._at, self._take(self._number(4))
        try:
            # As pickle itself decodes it: a name may hold half of a surrogate pair.
            self._stack.append(raw.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise MalformedPickle(f"the text at byte {start} of its pickle is no UTF-8") from error

    def empty_tuple(self) -> None:
        self._stack.append(())

    def empty_list(self) -> None:
        self._stack.append([])

    def empty_dict(self) -> None:
        self._stack.append({})

    # -- what is made of values --------------------------------------------------------------------

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[object]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _last(self, count: int) -> tuple[object, ...]:
        if count > len(self._stack):
            raise IndexError
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        return values

    def marked_tuple(self) -> None:
        self._stack.append(tuple(self._since_mark()))

    def tuple_of_one(self) -> None:
        self._stack.append(self._last(1))

    def tuple_of_two(self) -> None:
        self._stack.append(self._last(2))

    def tuple_of_three(self) -> None:
        self._stack.append(self._last(3))

    def append(self) -> None:
        self._extend([self._stack.pop()])

    def appends(self) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[object]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise MalformedPickle(f"its pickle appends to a {type(target).__name__}, not a list")
        target.extend(values)

    def set_item(self) -> None:
        self._set(list(self._last(2)))

    def set_items(self) -> None:
        self._set(self._since_mark())

    def _set(self, pairs: list[object]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            raise MalformedPickle("its pickle gives keys and values to what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is not str and type(key) is not int:
                raise MalformedPickle(f"a key of a dict is a {type(key).__name__}; expected a text")
            if key in target:
                raise MalformedPickle(f"it has {shown(key)} twice")
            target[key] = value

    # -- memo, globals, calls ----------------------------------------------------------------------

    def _remember(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def remember(self) -> None:
        self._remember(self._number(1))

    def remember_far(self) -> None:
        self._remember(self._number(4))

    def _recall(self, place: int) -> None:
        if place not in self._memo:
            raise MalformedPickle(f"its pickle recalls {place}, which it never remembered")
        self._stack.append(self._memo[place])

    def recall(self) -> None:
        self._recall(self._number(1))

    def recall_far(self) -> None:
        self._recall(self._number(4))

    def find_global(self) -> None:
        name = f"{self._line()}.{self._line()}"
        if name not in self._known:
            raise ForbiddenGlobal(name)
        self._stack.append(self._known[name])

    def call(self) -> None:
        maker, arguments = self._last(2)
        if not isinstance(maker, Maker) or not isinstance(arguments, tuple):
            raise MalformedPickle(f"its pickle calls {shown(maker)}, which is no function")
        self._calls += 1
        if self._calls > _MAX_CALLS:
            raise MalformedPickle(f"its pickle makes more than {_MAX_CALLS:,} tensors and tables")
        self._stack.append(maker.make(arguments))

    def find_persistent(self) -> None:
        self._stack.append(self._persistent(self._stack.pop()))

    def set_state(self) -> None:
        # A state dict has `_metadata`, versions of the modules, which no loader needs.
        target, _ = self._last(2)
        if type(target) is not dict:
            raise MalformedPickle(f"its pickle sets the attributes of a {type(target).__name__}")
        self._stack.append(target)


_INSTRUCTIONS: Mapping[int, str] = {
    0x80: "protocol", ord("N"): "none", 0x88: "true", 0x89: "false", ord("K"): "byte",
    ord("M"): "two_bytes", ord("J"): "four_bytes", 0x8A: "long", ord("G"): "real",
    ord("X"): "text", ord(")"): "empty_tuple", ord("]"): "empty_list", ord("}"): "empty_dict",
    ord("("): "mark", ord("t"): "marked_tuple", 0x85: "tuple_of_one", 0x86: "tuple_of_two",
    0x87: "tuple_of_three", ord("a"): "append", ord("e"): "appends", ord("s"): "set_item",
    ord("u"): "set_items", ord("q"): "remember", ord("r"): "remember_far", ord("h"): "recall",
    ord("j"): "recall_far", ord("c"): "find_global", ord("R"): "call", ord("Q"): "find_persistent",
    ord("b"): "set_state",
}  # fmt: skip
