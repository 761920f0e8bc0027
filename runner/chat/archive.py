"""The data files in a `.zip` export, read without unpacking to disk.

The archive may come from anyone: its list of members is checked before anything is unpacked, and
what a header says about a size is checked again while the member is read. The standard library's
zipfile is not used, because it takes the sizes, the count and the names as they come. The format:
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import io
import re
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from runner.chat.json_values import Unreadable

MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
"""How an archive starts: with a member, or empty."""
DATA_KINDS = (".json", ".jsonl", ".ndjson", ".txt", ".md", ".markdown", ".parquet")
MAX_MEMBERS = 100_000
MAX_TOTAL_BYTES = 20 * 2**30
MAX_RATIO = 100
"""Text packs to a tenth of its size; what packs to less than a hundredth is a bomb."""
FREE_BYTES = 4 * 2**20
"""Of a member that the ratio does not count for: a short file of one repeated line is no bomb."""

_FREE_TOTAL_BYTES = 16 * FREE_BYTES
_MAX_LIST_BYTES = 32 * 2**20
_MAX_NAME_BYTES = 4096
_READ_BYTES = 2**16

_ARCHIVE_KINDS = (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".zst", ".7z", ".rar")
_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ", 98: "PPMd"}
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_UTF_8 = 0x800

_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_END_64_PLACE = struct.Struct("<4sIQI")
_LISTED = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_END_MAGIC, _END_64_MAGIC, _END_64_PLACE_MAGIC = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_LISTED_MAGIC, _LOCAL_MAGIC = b"PK\x01\x02", b"PK\x03\x04"

# control characters, and marks that turn the direction in which a name is shown
_TRICKS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Member:
    """A data file in an archive."""

    name: str
    bytes: int
    _entry: _Entry = field(repr=False)
    _archive: BinaryIO = field(repr=False)

    def open(self) -> BinaryIO:
        """The member's bytes from the start; cannot be sought.

        A damaged member makes `read` raise `Unreadable`; its check sum is known at the end only.
        """
        return cast(BinaryIO, _Reader(self._entry, self._archive))


@dataclass(frozen=True)
class Refused:
    """Why a member is not read; without a name it is about the whole archive."""

    reason: str
    name: str = ""


@dataclass(frozen=True)
class _Entry:
    """One line of the archive's list of members."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed_bytes: int
    bytes: int
    mode: int
    offset: int
    limit: int
    """Where the list of members starts, which no member reaches."""

    @property
    def least_end(self) -> int:
        return self.offset + _LOCAL.size + len(self.raw_name) + self.packed_bytes


class _Damaged(Exception):
    pass


def members(archive: Path | BinaryIO) -> Iterator[Member | Refused]:
    """The data files in an archive by name (code points), and what is not read.

    Hidden files and folders are not mentioned; members of other kinds in one sentence at the end.
    A file has to be seekable. Of a path, members can be read until the iteration ends.
    """
    if isinstance(archive, Path):
        with archive.open("rb") as file:
            yield from members(file)
        return
    try:
        entries = list(_entries(archive))
    except _Damaged as damage:
        yield Refused(str(damage))
        return
    if reason := _refused_whole(entries):
        yield Refused(reason)
        return
    times = Counter(entry.name for entry in entries)
    overlapping = set(_overlapping(entries))
    others: Counter[str] = Counter()
    for entry in sorted(entries, key=lambda entry: entry.name):
        if _is_hidden(entry.name) or entry.name.endswith("/"):
            continue
        if not entry.name.lower().endswith((*DATA_KINDS, *_ARCHIVE_KINDS)):
            others[_kind(entry.name)] += 1
        elif times[entry.name] > 1:
            times[entry.name] *= -1
            yield Refused("stands in the archive more than once", entry.name)
        elif times[entry.name] == 1:
            reason = _refused(entry, entry.offset in overlapping)
            yield Refused(reason, entry.name) if reason else _member(entry, archive)
    if others:
        yield Refused(_passed_over(others))


def _member(entry: _Entry, archive: BinaryIO) -> Member:
    return Member(entry.name, entry.bytes, entry, archive)


def _entries(file: BinaryIO) -> Iterator[_Entry]:
    """The archive's list of members, which stands at its end."""
    count, start, size = _list_place(file)
    if count > MAX_MEMBERS or size > _MAX_LIST_BYTES:
        raise _Damaged(f"has more than {MAX_MEMBERS:,} members, or a list of them of over 32 MiB")
    file.seek(start)
    listed = file.read(size)
    position = found = 0
    while position < size:
        if found >= MAX_MEMBERS:
            raise _Damaged(f"has more than {MAX_MEMBERS:,} members")
        if size - position < _LISTED.size:
            raise _Damaged("is damaged: its list of members breaks off")
        head = _LISTED.unpack_from(listed, position)
        magic, _, _, flags, method, _, _, crc, packed, unpacked = head[:10]
        name_bytes, extra_bytes, comment_bytes, _, _, attributes, offset = head[10:]
        position += _LISTED.size
        if magic != _LISTED_MAGIC or position + name_bytes + extra_bytes + comment_bytes > size:
            raise _Damaged("is damaged: its list of members cannot be read")
        raw_name = listed[position : position + name_bytes]
        extra = listed[position + name_bytes : position + name_bytes + extra_bytes]
        position += name_bytes + extra_bytes + comment_bytes
        unpacked, packed, offset = _wide(extra, unpacked, packed, offset)
        found += 1
        yield _Entry(
            name=_decoded(raw_name, flags),
            raw_name=raw_name,
            flags=flags,
            method=method,
            crc=crc,
            packed_bytes=packed,
            bytes=unpacked,
            mode=attributes >> 16,
            offset=offset,
            limit=start,
        )
    if found % 2**16 != count % 2**16:
        raise _Damaged(f"is damaged: it says that it has {count} members, and lists {found}")


def _list_place(file: BinaryIO) -> tuple[int, int, int]:
    """The count of members, and where the list of them stands: its start and size in bytes."""
    file_bytes = file.seek(0, io.SEEK_END)
    tail_start = max(0, file_bytes - _END.size - 2**16)
    file.seek(tail_start)
    tail = file.read(_END.size + 2**16)
    at = tail.rfind(_END_MAGIC, 0, len(tail) - _END.size + len(_END_MAGIC))
    if at < 0:
        raise _Damaged("is cut short: the list of its members is missing; copy it again")
    _, disk, list_disk, here, count, size, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    if 0xFFFF in (here, count) or 0xFFFFFFFF in (size, start):
        place_at = at - _END_64_PLACE.size
        if place_at >= 0 and tail[place_at : place_at + 4] == _END_64_PLACE_MAGIC:
            _, _, end, _ = _END_64_PLACE.unpack_from(tail, place_at)
            if end > file_bytes - _END_64.size:
                raise _Damaged("is damaged: its end does not stand where it says")
            file.seek(end)
            wide = _END_64.unpack(file.read(_END_64.size))
            if wide[0] != _END_64_MAGIC:
                raise _Damaged("is damaged: its end does not stand where it says")
            disk, list_disk, here, count, size, start = wide[4:]
    if disk or list_disk or here != count:
        raise _Damaged("is one part of several; join them to one archive")
    if start + size > end:
        raise _Damaged("is damaged: the list of its members does not stand where it says")
    return count, start, size


def _wide(extra: bytes, *sizes: int) -> list[int]:
    """Sizes with those that do not fit in 32 bits taken from the extra field for them."""
    wide = list(sizes)
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        values = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if kind != 1:
            continue
        for place, size in enumerate(wide):
            if size == 0xFFFFFFFF and len(values) >= 8:
                wide[place] = int.from_bytes(values[:8], "little")
                values = values[8:]
        break
    return wide


def _decoded(raw_name: bytes, flags: int) -> str:
    """A name in UTF-8, as most write it, or in the code page of the first PCs.

    What is neither gets a backslash, for which it is refused.
    """
    try:
        return raw_name.decode()
    except UnicodeDecodeError:
        return raw_name.decode("utf-8" if flags & _UTF_8 else "cp437", "backslashreplace")


def _refused_whole(entries: Sequence[_Entry]) -> str:
    if not entries:
        return "is an empty archive"
    names = {entry.name for entry in entries}
    if "[Content_Types].xml" in names:
        return "is an Office document, not a chat export; save it as text"
    if "mimetype" in names:
        return "is an e-book or an OpenDocument file, not a chat export; save it as text"
    data = [entry for entry in entries if entry.name.lower().endswith(DATA_KINDS)]
    total = sum(entry.bytes for entry in data)
    if total > MAX_TOTAL_BYTES:
        return f"would unpack to {total:,} bytes; the limit is {MAX_TOTAL_BYTES:,}"
    packed = sum(entry.packed_bytes for entry in data)
    if total > _FREE_TOTAL_BYTES and total > MAX_RATIO * packed:
        return f"would unpack to more than {MAX_RATIO} times its size, as a bomb does"
    return ""


def _refused(entry: _Entry, overlaps: bool) -> str:
    """Why this member is not read; empty if it can be."""
    kind = stat.S_IFMT(entry.mode)
    if len(entry.raw_name) > _MAX_NAME_BYTES or _TRICKS.search(entry.name):
        return "has a name that is too long, or has control characters in it"
    if entry.name.startswith("/") or re.match(r"[A-Za-z]:", entry.name) or "\\" in entry.name:
        return "has a name that is an absolute path or has a backslash in it"
    if ".." in entry.name.split("/"):
        return "has a name that leads out of the archive"
    if kind == stat.S_IFLNK:
        return "is a link, not a file"
    if kind not in (0, stat.S_IFREG):
        return "is a device, a pipe or a folder, not a file"
    if entry.name.lower().endswith(_ARCHIVE_KINDS):
        return "is an archive in an archive; unpack it"
    if entry.flags & _ENCRYPTED or entry.method == 99:
        return "is encrypted; unpack it with its password"
    if entry.method not in (_STORED, _DEFLATED):
        method = _METHODS.get(entry.method, f"method {entry.method}")
        return f"is packed with {method}; only Deflate can be read, pack it again"
    if overlaps or entry.least_end > entry.limit:
        return "is damaged: it shares its bytes with another member, or has none"
    if entry.bytes > FREE_BYTES and entry.bytes > MAX_RATIO * entry.packed_bytes:
        return _bomb()
    return ""


def _overlapping(entries: Iterable[_Entry]) -> Iterator[int]:
    """The offsets of members that share bytes: a small bomb is made of many such."""
    last: _Entry | None = None
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if last is not None and entry.offset < last.least_end:
            yield entry.offset
            yield last.offset
        if last is None or entry.least_end > last.least_end:
            last = entry


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return "__MACOSX" in parts or any(
        part.startswith(".") and not part.startswith("..") and part != "." for part in parts
    )


def _kind(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if len(suffix) <= 12 and suffix[1:].isalnum() else ""


def _passed_over(kinds: Counter[str]) -> str:
    count = sum(kinds.values())
    named = sorted((kind for kind in kinds if kind), key=lambda kind: (-kinds[kind], kind))
    shown = ", ".join(named[:6] + ["…"] * (len(named) > 6))
    which = f" ({shown})" if shown else ""
    if count == 1:
        return f"1 member of another kind{which} was passed over"
    return f"{count:,} members of other kinds{which} were passed over"


def _bomb() -> str:
    return f"unpacks to more than {MAX_RATIO} times its size, as a bomb does"


class _Reader(io.RawIOBase):
    """The bytes of one member, unpacked as they are asked for, whatever its header says."""

    def __init__(self, entry: _Entry, archive: BinaryIO) -> None:
        self._entry = entry
        self._archive = archive
        self._inflate = zlib.decompressobj(-15) if entry.method == _DEFLATED else None
        self._position: int | None = None
        self._packed_left = entry.packed_bytes
        self._waiting = b""
        self._unpacked = 0
        self._crc = 0
        self._done = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        data = b""
        try:
            while size and not data and not self._done:
                data = self._unpack(size)
        except zlib.error as error:
            raise Unreadable(f"is damaged: it cannot be unpacked ({error})") from None
        self._crc = zlib.crc32(data, self._crc)
        self._unpacked += len(data)
        if self._unpacked > self._entry.bytes:
            raise Unreadable("is damaged: it is larger than its header says")
        used = self._entry.packed_bytes - self._packed_left - len(self._waiting)
        if self._unpacked > FREE_BYTES and self._unpacked > MAX_RATIO * used:
            raise Unreadable(_bomb())
        if self._done and not data:
            if self._unpacked < self._entry.bytes:
                raise Unreadable("is damaged: it is shorter than its header says")
            if self._crc != self._entry.crc:
                raise Unreadable(
                    "is damaged: its check sum is wrong, so what was read of it may be wrong too"
                )
        return data

    def _unpack(self, size: int) -> bytes:
        """Up to `size` bytes; none is not the end of the member, that is `_done`."""
        if not self._waiting:
            self._waiting = self._packed()
        if self._inflate is None:
            data, self._waiting = self._waiting[:size], self._waiting[size:]
            self._done = not data
            return data
        ended = not self._waiting
        data = self._inflate.decompress(self._waiting, size)
        self._waiting = self._inflate.unconsumed_tail
        if self._inflate.eof:
            self._done = True
        elif ended and not data:
            raise Unreadable("is damaged: it is cut short")
        return data

    def _packed(self) -> bytes:
        if self._position is None:
            self._position = self._start()
        self._archive.seek(self._position)
        data = self._archive.read(min(_READ_BYTES, self._packed_left))
        self._position += len(data)
        self._packed_left -= len(data)
        return data

    def _start(self) -> int:
        """Where the packed bytes start, after a header that must agree with the list's."""
        entry = self._entry
        self._archive.seek(entry.offset)
        head = self._archive.read(_LOCAL.size)
        if len(head) < _LOCAL.size or not head.startswith(_LOCAL_MAGIC):
            raise Unreadable("is damaged: it does not stand where the archive says")
        _, _, flags, method, _, _, _, _, _, name_bytes, extra_bytes = _LOCAL.unpack(head)
        if (method, flags & _ENCRYPTED) != (entry.method, 0) or (
            self._archive.read(name_bytes) != entry.raw_name
        ):
            raise Unreadable("is damaged: its header and the archive's list of members differ")
        start: int = entry.offset + _LOCAL.size + name_bytes + extra_bytes
        if start + entry.packed_bytes > entry.limit:
            raise Unreadable("is damaged: it is cut short")
        return start
