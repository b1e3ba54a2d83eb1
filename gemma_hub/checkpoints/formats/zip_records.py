"""Where the records of a zip archive are, for archives that compress nothing: those of torch.save.

The directory at the end of the file is checked against the file: every record is stored as it is,
has one name, and begins where the one before it ends. So nothing overlaps, nothing is hidden, and a
damaged header cannot move a content by some bytes.
"""

import struct
from dataclasses import dataclass
from mmap import mmap

# No Gemma comes near these; the limits keep a damaged file from taking the time or the memory.
MAX_RECORDS = 10_000
_MAX_NAME = 256  # bytes

LOCAL = struct.Struct("<4s5H3L2H")
"""Signature, version, flags, method, time, date, CRC, 2 sizes, lengths of name and extra field."""
CENTRAL = struct.Struct("<4s6H3L5H2L")
"""Signature, 2 versions, flags, method, time, date, CRC, 2 sizes, lengths of name, extra field and
comment, disk, 2 attributes, offset."""
END = struct.Struct("<4s4H2LH")
"""Signature, 2 disks, 2 counts, size and offset of the directory, length of the comment."""
END64 = struct.Struct("<4sQ2H2L4Q")
"""Signature, size of the rest, 2 versions, 2 disks, 2 counts, size and offset of the directory."""
LOCATOR = struct.Struct("<4sLQL")
"""Signature, disk, offset of END64, number of disks."""
_DESCRIPTORS = {form.size: form for form in (struct.Struct("<4s3L"), struct.Struct("<4sL2Q"))}
# Signature, CRC, 2 sizes: behind a record whose header was written before its size was known.
LOCAL_SIGNATURE, CENTRAL_SIGNATURE = b"PK\x03\x04", b"PK\x01\x02"
DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
END_SIGNATURE, END64_SIGNATURE, LOCATOR_SIGNATURE = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF
"""Stand for a number that is too large for its field, and is in the zip64 part."""
ZIP64_FIELD = 1
"""Id of the extra field with the large numbers."""

_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 1, 1 << 3, 1 << 11


class MalformedZip(Exception):
    """What is wrong, and where."""


@dataclass(frozen=True, slots=True)
class Record:
    """One file of an archive.

    Attributes:
        header: offset of its header.
        start: offset of its content.
        size: of its content, in bytes.
        crc: CRC-32 of its content; 0 where the writer did not compute it.
        is_described: whether a descriptor with its size follows it.
    """

    header: int
    start: int
    size: int
    crc: int
    is_described: bool


def read_records(pages: mmap) -> dict[str, Record]:
    """{path in the archive: record}.

    Raises:
        MalformedZip: it is no archive, or not one that torch.save writes.
    """
    first, last, count = _directory(pages)
    records: dict[str, Record] = {}
    at = first
    for _ in range(count):
        if at + CENTRAL.size > last:
            raise MalformedZip(f"its directory says {count} records and is shorter")
        name, record, at = _entry(pages, at, last)
        if name in records:
            raise MalformedZip(f"it has the record {name!r} twice")
        records[name] = record
    if at != last:
        raise MalformedZip(f"its directory says {count} records and goes on after them")
    _check_order(pages, records, first)
    return records


def _check_order(pages: mmap, records: dict[str, Record], directory: int) -> None:
    """Check that the records follow one another, from the start of the file to the directory."""
    ordered = sorted(records.items(), key=lambda item: item[1].header)
    if not ordered or ordered[0][1].header:
        raise MalformedZip("it does not begin with a record")
    ends = [*(record.header for _, record in ordered[1:]), directory]
    for (name, record), end in zip(ordered, ends, strict=True):
        after = record.start + record.size
        if not record.is_described and after == end:
            continue
        form = _DESCRIPTORS.get(end - after) if record.is_described else None
        stated = (DESCRIPTOR_SIGNATURE, record.crc, record.size, record.size)
        if form is None or form.unpack_from(pages, after) != stated:
            raise MalformedZip(f"its record {name!r} does not end where the next one begins")


def _directory(pages: mmap) -> tuple[int, int, int]:
    """Offsets of the directory's start and end, and its number of records."""
    end = len(pages) - END.size
    if end < 0 or pages[end : end + 4] != END_SIGNATURE:
        raise MalformedZip("there is no directory at its end: it is cut short, or no zip archive")
    _, disk, other_disk, here, count, size, start, _ = END.unpack_from(pages, end)
    last = end
    locator = end - LOCATOR.size
    if locator >= END64.size and pages[locator : locator + 4] == LOCATOR_SIGNATURE:
        last = locator - END64.size
        stated = (here, count, size, start)
        here, count, size, start = _end64(pages, locator, last)
        limits = (FULL16, FULL16, FULL32, FULL32)
        real = (here, count, size, start)
        if any(s not in (r, limit) for s, r, limit in zip(stated, real, limits, strict=True)):
            raise MalformedZip("the two ends of its directory contradict one another")
    if disk or other_disk or here != count:
        raise MalformedZip("it is one part of an archive in several")
    if start + size != last:
        raise MalformedZip(f"its directory of {size} bytes at byte {start} is not at its end")
    if count > MAX_RECORDS:
        raise MalformedZip(f"it has {count:,} records; expected at most {MAX_RECORDS:,}")
    return start, last, count


def _end64(pages: mmap, locator: int, at: int) -> tuple[int, int, int, int]:
    _, disk, offset, disks = LOCATOR.unpack_from(pages, locator)
    signature, rest, _, _, *more = END64.unpack_from(pages, at)
    own_disk, other_disk, here, count, size, start = more
    is_one_part = not disk and disks <= 1 and not own_disk and not other_disk
    if (signature, offset, rest) != (END64_SIGNATURE, at, END64.size - 12) or not is_one_part:
        raise MalformedZip("the end of its directory (zip64) is damaged")
    return here, count, size, start


def _entry(pages: mmap, at: int, last: int) -> tuple[str, Record, int]:
    """One entry of the directory: name, record, and where the next begins."""
    signature, _, _, flags, method, _, _, *more = CENTRAL.unpack_from(pages, at)
    crc, packed, size, name_length, extra_length, comment_length, disk, _, _, header = more
    name_start = at + CENTRAL.size
    extra_start = name_start + name_length
    following = extra_start + extra_length + comment_length
    if signature != CENTRAL_SIGNATURE or following > last or name_length > _MAX_NAME:
        raise MalformedZip(f"its directory is damaged at byte {at}")
    raw_name = pages[name_start:extra_start]
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedZip(f"the name at byte {name_start} is no UTF-8") from error
    if method:
        raise MalformedZip(f"its record {name!r} is compressed, which torch.save never does")
    if flags & ~(_SIZES_FOLLOW | _UTF8):
        kind = "encrypted" if flags & _ENCRYPTED else f"marked with flags 0x{flags:04x}"
        raise MalformedZip(f"its record {name!r} is {kind}, which torch.save never does")
    extra = pages[extra_start : extra_start + extra_length]
    size, packed, header = _large(name, extra, [size, packed, header])
    if packed != size or disk:
        raise MalformedZip(f"its record {name!r} has {packed} bytes, and {size} when unpacked")
    start = _content(pages, name, raw_name, header, (flags, crc, size))
    if start + size > len(pages):
        raise MalformedZip(f"its record {name!r} goes past the end of the file")
    is_described = bool(flags & _SIZES_FOLLOW)
    return name, Record(header, start, size, crc, is_described), following


def _large(name: str, extra: bytes, numbers: list[int]) -> list[int]:
    """The numbers, with those that did not fit their field taken from the extra field."""
    if FULL32 not in numbers:
        return numbers
    at = 0
    while at + 4 <= len(extra):
        field, length = struct.unpack_from("<2H", extra, at)
        content = extra[at + 4 : at + 4 + length]
        if field == ZIP64_FIELD and len(content) >= 8 * numbers.count(FULL32):
            values = iter(struct.unpack(f"<{len(content) // 8}Q", content[: len(content) // 8 * 8]))
            return [next(values) if number == FULL32 else number for number in numbers]
        at += 4 + length
    raise MalformedZip(f"its record {name!r} lacks the sizes that zip64 needs")


def _content(
    pages: mmap, name: str, raw_name: bytes, header: int, stated: tuple[int, int, int]
) -> int:
    """Offset of a record's content; its own header must say what the directory says."""
    flags, crc, size = stated
    if header + LOCAL.size > len(pages):
        raise MalformedZip(f"its record {name!r} begins after the end of the file")
    signature, _, own_flags, method, _, _, *more = LOCAL.unpack_from(pages, header)
    own_crc, packed, own_size, name_length, extra_length = more
    name_start = header + LOCAL.size
    # Where the sizes follow the content, a writer has none yet for the header.
    blank = {0} if flags & _SIZES_FOLLOW else set()
    fits = (
        (signature, own_flags, method) == (LOCAL_SIGNATURE, flags, 0)
        and pages[name_start : name_start + name_length] == raw_name
        and own_crc in {crc, *blank}
        and {packed, own_size} <= {min(size, FULL32), FULL32, *blank}
    )
    if not fits:
        raise MalformedZip(f"the header of its record {name!r} is damaged")
    return int(name_start + name_length + extra_length)
