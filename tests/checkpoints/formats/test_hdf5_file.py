"""HDF5 files: read as h5py reads them, and refused where they are not as Keras writes them."""

import os
import random
import time

import numpy as np
import pytest

from gemma_hub.checkpoints.formats.hdf5_file import Hdf5File, write_hdf5
from gemma_hub.checkpoints.mapped_file import FileWeights
from gemma_hub.errors import CheckpointError
from gemma_hub.parameters import DTYPES, ArrayWeights

h5py = pytest.importorskip("h5py", reason="the files here are made with it")

VALUE = np.arange(6, dtype=np.float32).reshape(2, 3)
NOWHERE = b"\xff" * 8


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.weights.h5"


def made(path, fill, **options):
    with h5py.File(path, "w", **options) as file:
        fill(file)
    return path


def contents(group, prefix=""):
    """{path: value} of all datasets, as h5py reads them."""
    found = {}
    for name, item in group.items():
        if isinstance(item, h5py.Group):
            found |= contents(item, f"{prefix}{name}/")
        else:
            found[prefix + name] = item[()]
    return found


# -- what is read ----------------------------------------------------------------------------------


def test_every_type(path):
    def fill(file):
        for name, dtype in DTYPES.items():
            file[f"{name}/vars/0"] = np.arange(5).astype(dtype)
        file["bfloat16/vars/0"].attrs["dtype"] = "bfloat16"

    file = Hdf5File(made(path, fill))
    for name, dtype in DTYPES.items():
        assert file.tensors[f"{name}/vars/0"].dtype == name
        array = file.read(f"{name}/vars/0")
        assert array.dtype == dtype
        assert np.array_equal(array, np.arange(5).astype(dtype))


@pytest.mark.parametrize("seed", range(20))
def test_any_tree_is_read_as_h5py_reads_it(path, seed):
    """Many links in a group, many groups, names of any length, attributes, any rank."""
    draw = random.Random(seed)

    def fill(file):
        for i in range(draw.choice([1, 9, 60, 700])):
            depth = draw.choice([0, 0, 1, 2, 5])
            parts = [draw.choice(["layers", "a b", "vars", "x" * 255]) for _ in range(depth)]
            shape = tuple(draw.choice([1, 2, 5]) for _ in range(draw.choice([0, 1, 2, 3, 7])))
            dtype = draw.choice(["float16", "float32", "float64"])
            name = "/".join([*parts, f"variable {i}"])
            file[name] = np.random.default_rng(i).normal(size=shape).astype(dtype)
            for j in range(draw.choice([0, 0, 1, 12])):
                file[name].attrs[f"attribute {j}"] = draw.choice(["text", 7, [1.5, 2.5]])

    made(path, fill)
    file = Hdf5File(path)
    with h5py.File(path) as root:
        expected = contents(root)
    assert set(file.tensors) == set(expected)
    for name, value in expected.items():
        assert file.read(name).dtype == value.dtype, name
        assert np.array_equal(file.read(name), value), name


def test_a_tree_of_several_levels(path):
    def fill(file):
        for i in range(3000):
            file[f"{i}"] = np.float32(i)

    file = Hdf5File(made(path, fill))
    assert {name: float(file.read(name)) for name in file.tensors} == {
        f"{i}": float(i) for i in range(3000)
    }


def test_what_was_deleted_is_not_there(path):
    def fill(file):
        for i in range(40):
            file[f"group {i}/x"] = VALUE
        for i in range(0, 40, 3):
            del file[f"group {i}"]

    assert len(Hdf5File(made(path, fill)).tensors) == 26


def test_both_kinds_of_text_mark_bfloat16(path):
    def fill(file):
        for name, text in {"a": "bfloat16", "b": np.bytes_("bfloat16")}.items():
            file[name] = VALUE.astype(DTYPES["bfloat16"])
            file[name].attrs["dtype"] = text

    file = Hdf5File(made(path, fill))
    for name in "ab":
        assert np.array_equal(file.read(name), VALUE.astype(DTYPES["bfloat16"]))


def test_written_files_are_read_by_h5py(path):
    arrays = {f"{name}/vars/0": VALUE.astype(dtype) for name, dtype in DTYPES.items()}
    sizes = list(write_hdf5(path, ArrayWeights(arrays), list(arrays)))
    assert sum(sizes) == sum(array.nbytes for array in arrays.values())
    with h5py.File(path) as root:
        for name, array in arrays.items():
            dataset = root[name]
            assert dataset[()].tobytes() == array.tobytes()
            assert (dataset.chunks, dataset.compression, dataset.external) == (None, None, None)
            marks = {"dtype": "bfloat16"} if "bfloat16" in name else {}
            assert dict(dataset.attrs) == marks
    file = Hdf5File(path)
    for name, array in arrays.items():
        assert file.read(name).tobytes() == array.tobytes()


def test_unaligned_tensors_are_copied(path):
    def fill(file):
        file["a"] = np.zeros(3, np.int8)
        del file["a"]
        file["a"] = np.zeros(3, np.float16)

    content = bytearray(made(path, fill).read_bytes())
    start = Hdf5File(path).tensors["a"].start
    at = content.index(start.to_bytes(8, "little") + (6).to_bytes(8, "little"))
    content[at : at + 8] = (start + 1).to_bytes(8, "little")
    path.write_bytes(with_end(content + b"\0"))
    assert Hdf5File(path).read("a").flags.aligned


def with_end(content):
    """The file with its own length where the superblock has it."""
    return bytes(content[:40]) + len(content).to_bytes(8, "little") + bytes(content[48:])


def test_unknown_names(path):
    weights = FileWeights([Hdf5File(made(path, lambda file: file.update({"layers/a": VALUE})))])
    for ask in (weights.shape, weights.dtype, weights.read):
        with pytest.raises(
            CheckpointError, match=r"no tensor 'layers/b'\. Did you mean 'layers/a'"
        ):
            ask("layers/b")


# -- what is refused -------------------------------------------------------------------------------


def external_link(file):
    file["a"] = h5py.ExternalLink("/etc/passwd", "/x")


def external_storage(file):
    file.create_dataset("a", (2, 3), "f4", external=[("/etc/passwd", 0, 24)])


def virtual(file):
    layout = h5py.VirtualLayout((2, 3), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (2, 3))
    file.create_virtual_dataset("a", layout)


def compact(file):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple((2, 3))
    h5py.h5d.create(file.id, b"a", h5py.h5t.IEEE_F32LE, space, properties).write(
        h5py.h5s.ALL, h5py.h5s.ALL, VALUE
    )


def committed(file):
    file["t"] = np.dtype("f4")


def shared_type(file):
    file["t"] = np.dtype("f4")
    file.create_dataset("a", data=VALUE, dtype=file["t"])
    del file["t"]


def cycle(file):
    file.create_group("a/b")
    file["a/b/c"] = file["a"]


def two_links(file):
    file["a"] = VALUE
    file["b"] = file["a"]


def deep(file):
    file["/".join("abcdefghijklmnopqrs")] = VALUE


def of_other_names(file):
    file["é"] = VALUE


def unfilled(file):
    file.create_dataset("a", (2**20, 2**20), "f4")


def marked(value, mark):
    def fill(file):
        file["a"] = value
        file["a"].attrs["dtype"] = mark

    return fill


def of(value):
    return lambda file: file.update({"a": value})


def chunked(**options):
    return lambda file: file.create_dataset("a", data=VALUE, chunks=(1, 3), **options)


BFLOAT16 = VALUE.astype(DTYPES["bfloat16"])
FILES = {
    "external link": (external_link, "newer kind"),
    "soft link": (of(h5py.SoftLink("/b")), "'a', which leads elsewhere by a name"),
    "external storage": (external_storage, "its values in another file"),
    "virtual dataset": (virtual, "virtual layout"),
    "chunks": (chunked(), "chunked layout"),
    "gzip": (chunked(compression="gzip"), "a filter, such as compression"),
    "lzf": (chunked(compression="lzf"), "a filter"),
    "shuffle": (chunked(shuffle=True), "a filter"),
    "checksums": (chunked(fletcher32=True), "a filter"),
    "resizable": (chunked(maxshape=(None, 3)), "chunked layout"),
    "compact": (compact, "compact layout"),
    "named type": (committed, "neither a group's nor a dataset's"),
    "shared type": (shared_type, "a part elsewhere"),
    "cycle of groups": (cycle, "share bytes"),
    "two links to one": (two_links, "share bytes"),
    "no storage": (unfilled, "a has no values"),
    "no value": (of(h5py.Empty("f4")), "a has a shape of version|a has no values"),
    "deep": (deep, "more than 16 groups within one another"),
    "other names": (of_other_names, "newer kind"),
}


def refused(path, reason):
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"{path.name}.*({reason})"):
        Hdf5File(path)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("kind", FILES)
def test_other_files_are_refused(path, kind):
    fill, reason = FILES[kind]
    refused(made(path, fill), reason)


@pytest.mark.parametrize("libver", ["v108", "latest"])
def test_newer_structures_are_refused(path, libver):
    refused(made(path, of(VALUE), libver=libver), "its superblock is of version [23], expected 0")


def test_a_user_block_is_refused(path):
    refused(made(path, of(VALUE), userblock_size=512), "does not begin like one")
    moved = bytearray(made(path, of(VALUE)).read_bytes())
    moved[24] = 1
    path.write_bytes(moved)
    refused(path, "begins elsewhere")


TYPES = {
    "integers of 4 bytes": VALUE.astype("i4"),
    "floats of another kind of 4 bytes": VALUE.astype(">f4"),
    "floats of another kind of 16 bytes": VALUE.astype("f16") if hasattr(np, "float128") else None,
    "opaque of 2 bytes": BFLOAT16.view("V2"),
    "opaque of 4 bytes": VALUE.view("V4"),
    "variable lengths of 16 bytes": "text",
    "texts of 4 bytes": np.bytes_("text"),
    "compounds of 8 bytes": np.zeros(2, "f4, f4"),
    "enumerations of 1 bytes": np.zeros(2, bool),
}


@pytest.mark.parametrize("dtype", TYPES)
def test_other_types_are_named(path, dtype):
    if TYPES[dtype] is None:
        pytest.skip("there is no such type here")
    assert Hdf5File(made(path, of(TYPES[dtype]))).tensors["a"].dtype == dtype


def test_bfloat16_of_hdf5_s_own_is_named(path):
    """It has the size of float16, and h5py shows it as float32."""

    def fill(file):
        kind = h5py.h5t.IEEE_F16LE.copy()
        kind.set_fields(15, 7, 8, 0, 7)
        kind.set_ebias(127)
        h5py.h5d.create(file.id, b"a", kind, h5py.h5s.create_simple((3,))).write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.ones(3, "f4")
        )

    assert Hdf5File(made(path, fill)).tensors["a"].dtype == "floats of another kind of 2 bytes"


MARKS = {
    "float32, marked as 'bfloat16'": (VALUE, "bfloat16"),
    "opaque of 2 bytes, marked as 'float8'": (BFLOAT16.view("V2"), "float8"),
    "opaque of 4 bytes, marked as 'bfloat16'": (VALUE.view("V4"), "bfloat16"),
}


@pytest.mark.parametrize("dtype", MARKS)
def test_marks_that_do_not_fit_are_named(path, dtype):
    assert Hdf5File(made(path, marked(*MARKS[dtype]))).tensors["a"].dtype == dtype


@pytest.mark.parametrize("mark", [7, ["bfloat16", "bfloat16"], np.zeros(1000)])
def test_marks_that_are_no_texts(path, mark):
    refused(made(path, marked(BFLOAT16.view("V2"), mark)), "'dtype' that is no text")


def test_many_links_are_refused_in_time(path):
    def fill(file):
        group = file.create_group("g")
        for i in range(40_000):
            group.create_group(f"{i:x}")

    refused(made(path, fill), "more than 120,000 structures")


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def good(path):
    def fill(file):
        for i in range(12):
            file[f"g/{i}"] = VALUE + i
        file["g/b"] = BFLOAT16
        file["g/b"].attrs["dtype"] = "bfloat16"

    return bytearray(made(path, fill).read_bytes())


def test_files_that_are_cut_or_appended_to(path, good):
    for size in (0, 1, 8, 95, 96, 200, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        reason = "empty" if size == 0 else "would end at byte 96" if size < 96 else "cut short"
        refused(path, reason)
        if size >= 96:  # and says so itself
            path.write_bytes(with_end(good[:size]))
            refused(path, "would end at byte|that does not begin like one")
    path.write_bytes(good + b"\0")
    refused(path, "appended to")
    path.write_bytes(b"PK\3\4" * 100)
    refused(path, "does not begin like one")


def word(number):
    return number.to_bytes(8, "little")


def tree_into_itself(content):
    at = content.index(b"TREE", content.index(b"TREE") + 1)
    content[at + 5] = 1
    content[at + 32 : at + 40] = word(at)
    return content


def node_of_many(content):
    at = content.index(b"SNOD")
    content[at + 6 : at + 8] = b"\xff\xff"
    return content


def heap_of_all(content):
    at = content.index(b"HEAP")
    content[at + 8 : at + 16] = b"\xff" * 7 + b"\x7f"
    return content


def root_is_elsewhere(content):
    content[64:72] = word(2**63)
    return content


def message_without_end(content):
    header = int.from_bytes(content[64:72], "little")
    content[header + 18 : header + 20] = b"\xff\xff"
    return content


def continued_by_itself(content):
    header = int.from_bytes(content[64:72], "little")
    content[header + 16 : header + 20] = b"\x10\0\x10\0"
    content[header + 24 : header + 40] = word(header + 16) + word(24)
    return content


def driver(content):
    content[48:56] = word(96)
    return content


def huge_shape(content):
    at = content.index(word(2) + word(3))
    content[at : at + 16] = word(2**62) * 2
    return content


def layouts(content):
    """Where the messages are that say where the values of a dataset are."""
    return [i for i in range(len(content)) if content[i : i + 4] == b"\x08\0\x18\0"]


def other_data(content):
    """The values of one dataset are said to be where another's are."""
    one, other = layouts(content)[1:3]
    content[one + 10 : one + 18] = content[other + 10 : other + 18]
    return content


def half_of_other_data(content):
    one, other = layouts(content)[1:3]
    start = int.from_bytes(content[other + 10 : other + 18], "little") + 8
    content[one + 10 : one + 18] = word(start)
    return content


def short_layout(content):
    at = layouts(content)[0]
    content[at + 2 : at + 4] = b"\x08\0"
    return content


def nowhere(content):
    at = layouts(content)[0]
    content[at + 10 : at + 18] = NOWHERE
    return content


DAMAGES = {
    "g have a branch that|share bytes": tree_into_itself,
    "would end at byte": node_of_many,
    "links of the root group would end at byte 9,": heap_of_all,
    "header of the root group would end": root_is_elsewhere,
    "in the middle of a message": message_without_end,
    "header of the root group and the header of the root group share": continued_by_itself,
    "names a driver": driver,
    "and has 24 bytes": huge_shape,
    "g/./? and g/./? share bytes": half_of_other_data,
    "share bytes": other_data,
    "ends before a number": short_layout,
    "has no values": nowhere,
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damages(path, good, reason):
    path.write_bytes(DAMAGES[reason](good))
    refused(path, reason)


def test_a_folder_or_nothing_is_no_file(tmp_path):
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="is not a file"):
            Hdf5File(place)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="all files can be opened")
def test_a_file_that_cannot_be_opened(path, good):
    path.chmod(0)
    refused(path, "cannot be opened")
