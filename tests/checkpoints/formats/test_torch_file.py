"""Files of torch.save: what is read of them, what is written, and hostile ones. No torch here."""

import io
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gemma_hub.checkpoints.formats import torch_writer
from gemma_hub.checkpoints.formats.torch_file import TorchFile
from gemma_hub.checkpoints.formats.torch_writer import MAX_TENSORS, write_torch
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, ArrayWeights

FUZZ = Path(__file__).with_name("fuzz_torch.py")
VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)

# -- pickles, put together from the instructions that torch.save writes ----------------------------


def plain(value):
    """The instructions for a value without tensors."""
    return pickle.dumps(value, 2)[2:-1]


def named(name):
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def group(*items):
    return b"(" + b"".join(items) + b"t"


def storage(key="0", kind="torch.FloatStorage", count=6, word="storage", device="cpu"):
    return group(*map(plain, (word,)), named(kind), *map(plain, (key, device, count))) + b"Q"


NO_GRADIENT_NO_HOOKS = (b"\x89", b"}")


def tensor(stored=None, offset=0, shape=(2, 3), strides=(3, 1), more=NO_GRADIENT_NO_HOOKS):
    parts = [stored or storage(), *map(plain, (offset, shape, strides)), *more]
    return named("torch._utils._rebuild_tensor_v2") + group(*parts) + b"R"


def table(**items):
    return b"}(" + b"".join(plain(key) + value for key, value in items.items()) + b"u"


def program(value):
    return b"\x80\x02" + value + b"."


def archive(data=None, folder="archive/", compression=zipfile.ZIP_STORED, **changes):
    """The bytes of an archive; a record of None is left out."""
    records = {"data.pkl": program(table(a=tensor()) if data is None else data)}
    records |= {"byteorder": b"little", "data/0": VALUES.tobytes(), "version": b"3\n"}
    records |= {name.replace("__", "/").replace("_", "."): v for name, v in changes.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as out:
        for name, content in records.items():
            if content is not None:
                out.writestr(folder + name, content)
    return buffer.getvalue()


def opened(content, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    return TorchFile(path)


# -- good ones -------------------------------------------------------------------------------------


def test_tensors_are_views_that_are_writable(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    with path.open("wb") as out:
        list(write_torch(out, ArrayWeights({"a": VALUES}), ["a"]))
    content = path.read_bytes()
    file = TorchFile(path)
    found = file.read("a", slice(0, 1))
    assert np.array_equal(found, VALUES[:1])
    found[0, 0] = 9
    assert file.read("a")[0, 0] == 9  # in this process's pages, so it is no copy
    assert path.read_bytes() == content


@pytest.mark.parametrize("index", [None, 1, slice(1, 2), (slice(None), slice(0, 2)), (1, 2)])
def test_parts_are_read(index, tmp_path):
    expected = VALUES if index is None else VALUES[index]
    assert np.array_equal(opened(archive(), tmp_path).read("a", index), expected)


def test_every_kind_of_view(tmp_path):
    views = {
        "transposed": (tensor(shape=(3, 2), strides=(1, 3)), VALUES.T),
        "part": (tensor(offset=1, shape=(2, 2), strides=(3, 1)), VALUES[:, 1:]),
        "every_other": (tensor(shape=(2, 2), strides=(3, 2)), VALUES[:, ::2]),
        "scalar": (tensor(offset=5, shape=(), strides=()), VALUES[1, 2]),
        "empty": (tensor(shape=(0, 5), strides=(5, 1)), np.zeros((0, 5), np.float32)),
        "at_the_end": (tensor(offset=6, shape=(0,), strides=(1,)), np.zeros(0, np.float32)),
        "one_axis": (tensor(shape=(6, 1), strides=(1, 10**9)), VALUES.reshape(6, 1)),
        "parameter": (
            named("torch._utils._rebuild_parameter")
            + group(tensor(), b"\x88", named("collections.OrderedDict") + b")R")
            + b"R",
            VALUES,
        ),
    }
    file = opened(archive(table(**{name: data for name, (data, _) in views.items()})), tmp_path)
    assert list(file.tensors) == list(views)
    for name, (_, expected) in views.items():
        assert file.tensors[name].shape == expected.shape, name
        assert np.array_equal(file.read(name), expected), name


KINDS = {
    "float64": "Double", "float32": "Float", "bfloat16": "BFloat16", "float16": "Half",
    "int64": "Long", "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte",
    "bool": "Bool", "complex64": "ComplexFloat", "complex128": "ComplexDouble",
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_type(name, tmp_path):
    array = np.arange(6).astype(DTYPES.get(name) or name)
    stored = storage(kind=f"torch.{KINDS[name]}Storage")
    data = table(a=tensor(stored, shape=(6,), strides=(1,)))
    file = opened(archive(data, data__0=array.tobytes()), tmp_path)
    assert file.tensors["a"].dtype == name
    assert file.read("a").dtype == array.dtype
    assert file.read("a").tobytes() == array.tobytes()


def test_a_stride_that_is_never_stepped_may_be_anything(tmp_path):
    stored = storage(kind="torch.DoubleStorage", count=3)
    shapes = {(3, 1): (1, 2**60), (0, 5): (2**60, 1), (1, 3): (2**60, 1)}
    data = {f"{i}": tensor(stored, 0, *item) for i, item in enumerate(shapes.items())}
    file = opened(archive(table(**data), data__0=np.arange(3.0).tobytes()), tmp_path)
    for i, shape in enumerate(shapes):
        found = file.read(str(i))
        assert found.shape == shape
        assert found.tobytes() == np.arange(3.0)[: found.size].tobytes()


def test_tables_in_tables_and_what_is_no_tensor(tmp_path):
    values = {"n": 3, "x": 1.5, "t": "text", "none": None, "yes": True, "big": 1 << 70, 7: ()}
    metadata = named("collections.OrderedDict") + b")R" + plain({"_metadata": {"": 1}}) + b"b"
    data = table(
        outer=table(**{"a.b": tensor()}),
        listed=b"](" + tensor() + plain(values) + b"e" + tensor() + b"a",
        module=metadata,
    )
    file = opened(archive(data), tmp_path)
    assert list(file.tensors) == ["outer/a.b", "listed/0", "listed/2"]


def test_a_shared_storage_and_a_far_memo(tmp_path):
    data = b"}(" + plain("a") + tensor() + b"r\xff\xff\xff\xff"
    data += plain("b") + b"j\xff\xff\xff\xff" + plain("c") + tensor() + b"u"
    tracemalloc.start()
    file = opened(archive(data), tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert file.tensors["a"] == file.tensors["b"] == file.tensors["c"]


def test_a_part_off_its_alignment_is_copied(tmp_path):
    # Padded names move the content of the records on byte by byte.
    shifts = {i: archive(folder="a" * (i + 1) + "/") for i in range(8)}
    kinds = {opened(content, tmp_path).tensors["a"].start % 4 for content in shifts.values()}
    assert kinds == {0, 1, 2, 3}
    for content in shifts.values():
        found = opened(content, tmp_path).read("a")
        assert np.array_equal(found, VALUES)
        assert found.flags.aligned
        assert found.flags.writeable


def test_a_checksum_that_was_not_computed(tmp_path):
    content = archive()
    for record in zipfile.ZipFile(io.BytesIO(content)).infolist():
        content = content.replace(struct.pack("<L", record.CRC), bytes(4))
    assert np.array_equal(opened(content, tmp_path).read("a"), VALUES)


# -- writing ---------------------------------------------------------------------------------------


def arrays():
    draw = np.random.default_rng(1).normal
    found = {f"{name}.weight": draw(size=(3, 5)).astype(t) for name, t in DTYPES.items()}
    return {**found, "scalar": np.array(2.0, np.float32), "line": np.arange(300.0)}


@pytest.mark.parametrize("wrapper", [None, "model_state_dict"])
@pytest.mark.parametrize("large", [torch_writer.LARGE, 50])
def test_what_is_written(large, wrapper, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_writer, "LARGE", large)  # the sizes in the fields of zip64
    monkeypatch.setattr(torch_writer, "_WRITTEN_AT_ONCE", 16)
    weights = ArrayWeights(arrays())
    path = tmp_path / "out.bin"
    with path.open("wb") as file:
        sizes = list(write_torch(file, weights, weights.names(), wrapper))
    assert sum(sizes) == sum(array.nbytes for array in arrays().values())
    assert max(sizes) == 16
    with zipfile.ZipFile(path) as other:
        assert other.testzip() is None  # every checksum
        assert {info.compress_type for info in other.infolist()} == {zipfile.ZIP_STORED}
        records = {info.filename: info for info in other.infolist()}
    assert records["archive/data/5"].file_size == 2400
    for info in records.values():  # the numbers in a record's own header, too
        start = info.header_offset + 30 + len(info.filename)
        numbers = struct.pack("<2H2Q", 1, 16, info.file_size, info.file_size)
        is_large = info.file_size >= large
        assert (path.read_bytes()[start : start + 20] == numbers) == is_large, info.filename
    file = TorchFile(path)
    start = f"{wrapper}/" if wrapper else ""
    assert list(file.tensors) == [start + name for name in arrays()]
    for name, array in arrays().items():
        stored = file.tensors[start + name]
        assert stored.start % 64 == 0, name
        assert stored.shape == array.shape
        assert file.read(start + name).tobytes() == array.tobytes()


def test_too_many_tensors_for_a_file(tmp_path):
    many = ArrayWeights({str(i): np.zeros(0) for i in range(MAX_TENSORS + 1)})
    with (tmp_path / "x").open("wb") as file:
        with pytest.raises(CheckpointError, match="too many for one file"):
            list(write_torch(file, many, many.names()))
        file.seek(0)
        list(write_torch(file, many, many.names()[:MAX_TENSORS]))
    assert len(TorchFile(tmp_path / "x").tensors) == MAX_TENSORS


# -- hostile pickles -------------------------------------------------------------------------------


def laughs(depth):
    """A list of two lists, which are one list of two lists, and so on."""
    data = b"]q\x00"
    for i in range(depth):
        data += b"](" + f"h{chr(i)}h{chr(i)}".encode() + b"eq" + bytes([i + 1])
    return group(data)


DEEP = tensor()
for _ in range(20):
    DEEP = table(a=DEEP)

PICKLES = [
    ("ends after 2 bytes", b"\x80\x02"),
    ("ends after .* bytes, in a value", program(table(a=tensor()))[:-9]),
    ("does not end with one value", program(b"NN")),
    ("does not end with one value", program(b"}") + b"."),
    ("does not end with one value", program(b"}(")),
    ("is 0x95", b"\x80\x02\x95" + bytes(8) + b"}."),
    ("protocol 4", b"\x80\x04}."),
    ("byte 2 of its pickle is 0x00", program(b"\0")),
    ("is 0x69", program(b"(ios\nsystem\n")),  # INST
    ("is 0x6f", program(b"(o")),  # OBJ
    ("is 0x81", program(b")\x81")),  # NEWOBJ
    ("is 0x82", program(b"\x82\x01")),  # EXT1
    ("takes a value where there is none", program(b"R")),
    ("byte 2 of its pickle takes", program(b"s")),
    ("byte 3 of its pickle takes", program(b"}u")),
    ("takes a value where there is none", program(b"t")),
    ("takes a value where there is none", program(b"q\0")),
    ("recalls 7", program(b"h\x07")),
    ("its pickle ends after", program(b"X\xff\xff\xff\xff")),
    ("no UTF-8", program(b"X\x01\0\0\0\xff")),
    ("begins a name without an end", program(b"c" + b"x" * 300)),
    ("begins a name without an end", program(b"cos")),
    ("appends to a dict", program(b"}Na")),
    ("keys and values to what is no dict", program(b"](KKu")),
    ("keys and values to what is no dict", program(b"}(Nu")),
    ("a key of a dict is a tuple", program(b"})Ns")),
    ("is a NoneType; expected a text", program(b"}NNs")),
    ("'a' twice", program(b"}" + (plain("a") + b"Ns") * 2)),
    ("calls NoneType", program(b"N)R")),
    ("calls _StorageType, which is no function", program(named("torch.FloatStorage") + b")R")),
    ("calls 'text'", program(plain("text") + b")R")),
    ("calls Maker", program(named("collections.OrderedDict") + b"NR")),
    ("attributes of a list", program(b"]}b")),
    ("more than 200,000 instructions", program(b"N" * 200_000)),
    ("more than 100,000 values", program(table(a=plain([None] * 100_001)))),
    ("more than 100,000 values", program(table(a=laughs(15), b=plain(list(range(90_000)))))),
    ("more than 100,000 values", program(table(a=b"]q\0(" + b"h\0" * 60_000 + b"e"))),
    ("more than 16 tables", program(DEEP)),
    ("more than 16 tables", program(b"}q\5" + plain("a") + b"h\5s")),
    ("more than 512 characters", program(table(**{"a" * 300: table(**{"b" * 300: tensor()})}))),
    ("'a/b' twice", program(table(**{"a/b": tensor(), "a": table(b=tensor())}))),
    ("holds a TorchTensor", program(tensor())),
    ("holds a list", program(plain([1]))),
    ("made of 1 values; expected none", program(named("collections.OrderedDict") + b"N\x85R")),
    ("made of 4 values", program(table(a=tensor(more=())))),
    ("made of a list, not", program(table(a=tensor(b"]")))),
    ("not made of a tensor", program(named("torch._utils._rebuild_parameter") + b"NNN\x87R")),
    ("not one to a storage", program(b"NQ")),
    ("not one to a storage", program(group(b"N", b"N") + b"Q")),
    ("reference in it is to a 'module'", program(storage(word="module"))),
    ("is to a dict", program(group(b"}", named("torch.FloatStorage"), b"}}}") + b"Q")),
    ("lacks key, device or size", program(storage(key=0))),
    ("lacks key, device or size", program(storage(count=6.0))),
    ("lacks key, device or size", program(storage(count=True))),
    ("storage '1' is not there", program(storage(key="1"))),
    (r"storage '../data.pkl' is not there", program(storage(key="../data.pkl"))),
    ("has 24 bytes; expected 7", program(storage(count=7))),
    ("expected -6 elements", program(storage(count=-6))),
    (f"expected {1 << 62} elements", program(storage(count=1 << 62))),
    ("6 elements of float64", program(storage(kind="torch.DoubleStorage"))),
    ("said to be of two types", program(storage() + storage(kind="torch.IntStorage"))),
    ("shape of a tensor in it holds -2", program(tensor(shape=(-2, -3)))),
    ("shape of a tensor in it holds 2.0", program(tensor(shape=(2.0, 3)))),
    ("shape of a tensor in it holds bool", program(tensor(shape=(True, 3)))),
    ("strides of a tensor in it holds -1", program(tensor(strides=(3, -1)))),
    ("offset of a tensor in it holds -1", program(tensor(offset=-1))),
    ("offset of a tensor in it holds NoneType", program(tensor(offset=None))),
    ("shape of a tensor in it is no tuple", program(tensor(shape=[2, 3]))),
    ("or too long", program(tensor(shape=(1,) * 17, strides=(1,) * 17))),
    ("2 axes and 1 strides", program(tensor(strides=(3,)))),
    ("larger than its storage of 6", program(tensor(offset=1))),
    ("with strides .4, 1. from 0, is larger", program(tensor(strides=(4, 1)))),
    ("is larger than its storage of 6", program(tensor(shape=(10**9, 3), strides=(0, 1)))),
    ("from 7, is larger", program(tensor(offset=7, shape=(0,), strides=(1,)))),
    ("no memory can hold", program(tensor(shape=(0, 2**59, 2**59), strides=(1, 1, 1)))),
    ("tensor in it holds 2305843009213693952", program(tensor(shape=(2**61,), strides=(1,)))),
]


@pytest.mark.parametrize(("reason", "data"), PICKLES, ids=[reason for reason, _ in PICKLES])
def test_hostile_pickles(reason, data, tmp_path):
    content = archive(data_pkl=data)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin is not a complete.*{reason}"):
        opened(content, tmp_path)
    assert time.process_time() - start < 1


CODE = [
    "os.system", "posix.system", "builtins.eval", "builtins.getattr", "subprocess.Popen",
    "torch.load", "torch.nn.Linear", "torch._utils._rebuild_tensor_v3", "torch.jit.load",
    "collections.defaultdict", "numpy.core.multiarray._reconstruct", "_codecs.encode",
    "torch._utils._rebuild_tensor_v2.__globals__", "pickle.loads", "torch.UntypedStorage",
]  # fmt: skip


@pytest.mark.parametrize("name", CODE)
def test_code_is_named_and_not_run(name, tmp_path):
    command = f"touch {tmp_path / 'was_here'}"
    data = table(a=named(name) + plain((command,)) + b"R")
    with pytest.raises(CheckpointError, match=f"refers to {name}, which is code") as caught:
        opened(archive(data), tmp_path)
    assert "Nothing was executed" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_what_pickle_itself_would_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'was_here')!r}, 'w')",))

    for protocol in range(6):
        with pytest.raises(CheckpointError):
            opened(archive(data_pkl=pickle.dumps({"a": Evil()}, protocol)), tmp_path)
    with pytest.raises(CheckpointError, match=r"refers to \S+exec, which is code"):
        opened(archive(data_pkl=pickle.dumps({"a": Evil()}, 2)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_as_many_tensors_as_are_written_are_read_in_time(tmp_path):
    items = b"".join(plain(f"{i:x}") + tensor() for i in range(MAX_TENSORS))
    content = archive(b"}(" + items + b"u")
    start = time.process_time()
    assert len(opened(content, tmp_path).tensors) == MAX_TENSORS
    assert time.process_time() - start < 1


def test_one_tensor_made_again_and_again_is_refused_in_time(tmp_path):
    rebuild = named("torch._utils._rebuild_tensor_v2")
    arguments = tensor().removeprefix(rebuild).removesuffix(b"R")
    made = rebuild + b"q\7" + arguments + b"q\x08R" + b"h\7h\x08R" * 20_000
    content = archive(b"(" + made + b"t")
    start = time.process_time()
    with pytest.raises(CheckpointError, match="makes more than 20,000 tensors"):
        opened(content, tmp_path)
    assert time.process_time() - start < 1


# -- hostile archives ------------------------------------------------------------------------------


def changed(find, put, nth=0, content=None):
    """An archive with one of the places where `find` is changed."""
    content = archive() if content is None else content
    at = -1
    for _ in range(nth + 1):
        at = content.index(find, at + 1)
    return content[:at] + put + content[at + len(find) :]


def in_entry(offset, size, value, name=b"archive/data/0", nth=1):
    """An archive with a number in a record's header (nth 0) or entry of the directory (1) changed.

    Offsets are those of the fields before the name.
    """
    content = archive()
    at = content.index(name)
    if nth:
        at = content.index(name, at + 1)
    at += offset
    return content[:at] + value.to_bytes(size, "little") + content[at + size :]


def prefixed(before, after):
    """An archive with something before its records, or after them; the directory knows it."""
    content = archive()
    start = struct.unpack_from("<L", content, len(content) - 6)[0]
    records, directory, end = content[:start], content[start:-22], content[-22:]
    end = end[:16] + struct.pack("<L", start + len(before + after)) + end[20:]
    for name in ("data.pkl", "byteorder", "data/0", "version") if before else ():
        at = directory.index(f"archive/{name}".encode()) - 4
        header = struct.unpack_from("<L", directory, at)[0] + len(before)
        directory = directory[:at] + struct.pack("<L", header) + directory[at + 4 :]
    return before + records + after + directory + end


def duplicated():
    buffer = io.BytesIO(archive())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(buffer, "a") as out:
            out.writestr("archive/data/0", VALUES.tobytes())
    return buffer.getvalue()


def large(content=None, start=0, count=4, size=None):
    """An archive with an end for zip64; its numbers may be wrong."""
    content = archive() if content is None else content
    end = content[-22:]
    own_size, own_start = struct.unpack_from("<2L", end, 12)
    at = len(content) - 22
    rest = struct.pack("<2H2L4Q", 45, 45, 0, 0, 4, count, size or own_size, own_start + start)
    more = b"PK\x06\x06" + struct.pack("<Q", 44) + rest
    return content[:at] + more + b"PK\x06\x07" + struct.pack("<LQL", 0, at, 1) + end


ENDING = archive()[-22:]
ARCHIVES = [
    ("is empty", b""),
    ("it is cut short, or no zip archive", b"no archive"),
    ("it is cut short, or no zip archive", archive()[:-1]),
    ("it is cut short, or no zip archive", archive() + b"\0"),
    ("it is cut short, or no zip archive", bytes(2000)),
    ("directory of 0 bytes at byte 0 is not at its end", b"x" * 99 + b"PK\5\6" + bytes(18)),
    ("it does not begin with a record", b"PK\5\6" + bytes(18)),
    ("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    ("torch before 1.6", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."),
    ("is compressed, which torch.save never does", archive(compression=zipfile.ZIP_DEFLATED)),
    # A bomb.
    (
        "is compressed, which torch.save never does",
        archive(data__1=bytes(9 << 20), compression=zipfile.ZIP_DEFLATED),
    ),
    ("'archive/data/0' twice", duplicated()),
    ("is encrypted", in_entry(-46 + 8, 2, 1)),
    ("marked with flags 0x2000", in_entry(-46 + 8, 2, 0x2000)),
    ("header of its record 'archive/data/0' is damaged", in_entry(-30 + 8, 2, 8, nth=0)),
    ("header of its record 'archive/data/0' is damaged", in_entry(-30, 4, 0, nth=0)),
    ("header of its record 'archive/data/0' is damaged", in_entry(-30 + 18, 4, 25, nth=0)),
    ("header of its record 'archive/data/0' is damaged", in_entry(0, 1, ord("b"), nth=0)),
    ("header of its record 'archive/data/0' is damaged", in_entry(-46 + 16, 4, 1)),
    ("has 25 bytes, and 24 when unpacked", in_entry(-46 + 20, 4, 25)),
    ("begins after the end of the file", in_entry(-46 + 42, 4, 10**9)),
    ("header of its record 'archive/data/0' is damaged", in_entry(-46 + 42, 4, 0)),
    ("does not end where the next one begins", in_entry(-30 + 28, 2, 4, nth=0)),  # extra field
    ("'archive/version' does not end where", prefixed(b"", b"hidden")),
    ("it does not begin with a record", prefixed(b"MZ", b"")),
    ("lacks the sizes that zip64 needs", in_entry(-46 + 42, 4, 0xFFFFFFFF)),
    ("its directory is damaged at", in_entry(-46, 1, 0)),
    ("its directory is damaged at", in_entry(-46 + 28, 2, 60_000)),
    ("is no UTF-8", in_entry(0, 1, 0xFF)),
    ("goes on after them", archive()[:-22] + ENDING[:8] + b"\3\0\3\0" + ENDING[12:]),
    ("says 5 records and is shorter", archive()[:-22] + ENDING[:8] + b"\5\0\5\0" + ENDING[12:]),
    ("in several", archive()[:-22] + ENDING[:4] + b"\1\0" + ENDING[6:]),
    ("not at its end", archive()[:-22] + ENDING[:16] + b"\0\0\0\0" + ENDING[20:]),
    ("contradict one another", large(count=5)),
    ("contradict one another", large(start=1)),
    ("contradict one another", large(size=7)),
    ("zip64. is damaged", changed(b"PK\6\6", b"PK\6\5", content=large())),
    ("not in one folder", archive(folder="")),
    ("a TorchScript archive", archive(constants_pkl=b"\x80\x02).")),
    ("no record data.pkl", archive(data_pkl=None)),
    ("no record version", archive(version=None)),
    ("version is b'11'", archive(version=b"11\n")),
    ("version is b'x'", archive(version=b"x")),
    ("its version has", archive(version=b"3" * 17)),
    ("byte order is b'big'", archive(byteorder=b"big")),
    ("data.pkl has 8,388,609 bytes", archive(data_pkl=bytes((8 << 20) + 1))),
    ("its data.pkl does not fit its checksum", changed(b"FloatStorage", b"IntegStorage")),
    ("storage '0' is not there", archive(data__0=None)),
]


@pytest.mark.parametrize(("reason", "content"), ARCHIVES, ids=[reason for reason, _ in ARCHIVES])
def test_hostile_archives(reason, content, tmp_path):
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin.*{reason}"):
        opened(content, tmp_path)
    assert time.process_time() - start < 1


def test_an_archive_with_the_end_of_zip64_is_read(tmp_path):
    assert np.array_equal(opened(large(), tmp_path).read("a"), VALUES)


def test_records_that_overlap(tmp_path):
    # Both headers and both entries say that data/0 goes on into the next record.
    content = archive()
    for nth, field in ((0, -30 + 18), (1, -46 + 20)):
        at = content.index(b"archive/data/0")
        at = content.index(b"archive/data/0", at + 1) if nth else at
        at += field
        content = content[:at] + struct.pack("<2L", 100, 100) + content[at + 8 :]
    with pytest.raises(
        CheckpointError, match="'archive/data/0' does not end where the next one begins"
    ):
        opened(content, tmp_path)


def test_many_records_are_refused_in_time(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for i in range(10_001):
            out.writestr(f"archive/data/{i}", b"")
    start = time.process_time()
    with pytest.raises(CheckpointError, match="10,001 records; expected at most 10,000"):
        opened(buffer.getvalue(), tmp_path)
    assert time.process_time() - start < 1


def test_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="is not a file"):
            TorchFile(path)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(CheckpointError, match="is not a file"):
        TorchFile(loop)


def test_a_short_fuzz():
    command = [sys.executable, str(FUZZ), "--runs", "1500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
