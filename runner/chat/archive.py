"""The data files in a `.zip` export, read without unpacking to disk.

The archive may come from anyone: its list of members is checked before anything is unpacked, and
what a header says about a size is checked again while the member is read.
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
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipExtFile, ZipFile, ZipInfo

from runner.chat.text_window import Unreadable

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
_READ_BYTES = 2**14
"""Read at once, which are lost where the check sum behind them is wrong."""
_OWN_HEADER_BYTES = 30

_ARCHIVE_KINDS = (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".zst", ".7z", ".rar")
_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ", 98: "PPMd"}
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_UTF_8 = 0x800
_BOMB = f"unpacks to more than {MAX_RATIO} times its size, as a bomb does"
_DIFFER = "is damaged: its header and the archive's list of members differ"

# control characters, and marks that turn the direction in which a name is shown
_TRICKS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Member:
    """A data file in an archive."""

    name: str
    bytes: int
    _info: ZipInfo = field(repr=False)
    _list: ZipFile = field(repr=False)
    _archive: _Metered = field(repr=False)

    def open(self) -> BinaryIO:
        """The member's bytes from the start; cannot be sought.

        A damaged member makes `read` raise `Unreadable`; its check sum is known at the end only.
        """
        return cast(BinaryIO, _Reader(self._info, self._list, self._archive))


@dataclass(frozen=True)
class Refused:
    """Why a member is not read; without a name it is about the whole archive."""

    reason: str
    name: str = ""
    passed_over: bool = False
    """Nothing is wrong with it: it is just no data."""


class _Damaged(Exception):
    """Why the list of members is not read."""


def members(archive: Path | BinaryIO) -> Iterator[Member | Refused]:
    """The data files in an archive by name (code points), and what is not read.

    Hidden files and folders are not mentioned; members of other kinds in one sentence at the end.
    A file has to be seekable. Of a path, members can be read until the iteration ends.
    """
    if isinstance(archive, Path):
        with archive.open("rb") as file:
            yield from members(file)
        return
    metered = _Metered(archive)
    try:
        listed = _list(metered)
    except _Damaged as damage:
        yield Refused(str(damage))
        return
    infos = [(_name(info), info) for info in listed.infolist()]
    if reason := _refused_whole(infos):
        yield Refused(reason)
        return
    times = Counter(name for name, _ in infos)
    misplaced = set(_misplaced(listed.infolist(), listed.start_dir))
    others: Counter[str] = Counter()
    for name, info in sorted(infos, key=lambda named: named[0]):
        if _is_hidden(name) or name.endswith("/"):
            continue
        if not name.lower().endswith((*DATA_KINDS, *_ARCHIVE_KINDS)):
            others[_kind(name)] += 1
        elif times[name] > 1:
            times[name] *= -1
            yield Refused("stands in the archive more than once", name)
        elif times[name] == 1:
            reason = _refused(name, info, info.header_offset in misplaced)
            member = Member(name, info.file_size, info, listed, metered)
            yield Refused(reason, name) if reason else member
    if others:
        yield Refused(_passed_over(others), passed_over=True)


def _list(archive: _Metered) -> ZipFile:
    count = _count_at_the_end(archive)
    try:
        listed = ZipFile(archive)
    except (BadZipFile, NotImplementedError, ValueError) as error:
        raise _Damaged(f"is damaged: its list of members cannot be read ({error})") from None
    found = len(listed.infolist())
    if count not in (0xFFFF, found % 2**16):
        raise _Damaged(f"is damaged: it says that it has {count} members, and lists {found}")
    return listed


def _count_at_the_end(archive: _Metered) -> int:
    """How many members the archive says it has, of 16 bits; zipfile does not look at it."""
    archive.seek(max(0, archive.seek(0, io.SEEK_END) - 2**16 - 22))
    tail = archive.read()
    at = tail.rfind(b"PK\x05\x06")
    if not 0 <= at <= len(tail) - 22:
        raise _Damaged("is cut short: the list of its members is missing; copy it again")
    disk, list_disk, here, count = struct.unpack_from("<4H", tail, at + 4)
    if not {disk, list_disk} <= {0, 0xFFFF} or here != count:
        raise _Damaged("is one part of several; join them to one archive")
    return cast(int, count)


def _name(info: ZipInfo) -> str:
    """The name with nothing cut off; many write UTF-8 and do not say so."""
    name = info.orig_filename
    if info.flag_bits & _UTF_8:
        return name
    try:
        return name.encode("cp437").decode()
    except UnicodeDecodeError:
        return name


def _refused_whole(infos: Sequence[tuple[str, ZipInfo]]) -> str:
    if not infos:
        return "is an empty archive"
    names = {name for name, _ in infos}
    if "[Content_Types].xml" in names:
        return "is an Office document, not a chat export; save it as text"
    if "mimetype" in names:
        return "is an e-book or an OpenDocument file, not a chat export; save it as text"
    data = [info for name, info in infos if name.lower().endswith(DATA_KINDS)]
    total = sum(info.file_size for info in data)
    if total > MAX_TOTAL_BYTES:
        return f"would unpack to {total:,} bytes; the limit is {MAX_TOTAL_BYTES:,}"
    packed = sum(info.compress_size for info in data)
    if total > _FREE_TOTAL_BYTES and total > MAX_RATIO * packed:
        return f"would unpack to more than {MAX_RATIO} times its size, as a bomb does"
    return ""


def _refused(name: str, info: ZipInfo, is_misplaced: bool) -> str:
    """Why this member is not read; empty if it can be."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    if len(name.encode()) > _MAX_NAME_BYTES or _TRICKS.search(name):
        return "has a name that is too long, or has control characters in it"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or "\\" in name:
        return "has a name that is an absolute path or has a backslash in it"
    if ".." in name.split("/"):
        return "has a name that leads out of the archive"
    if kind == stat.S_IFLNK:
        return "is a link, not a file"
    if kind not in (0, stat.S_IFREG):
        return "is a device, a pipe or a folder, not a file"
    if name.lower().endswith(_ARCHIVE_KINDS):
        return "is an archive in an archive; unpack it"
    if info.flag_bits & _ENCRYPTED or info.compress_type == 99:
        return "is encrypted; unpack it with its password"
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        method = _METHODS.get(info.compress_type, f"method {info.compress_type}")
        return f"is packed with {method}; only Deflate can be read, pack it again"
    if is_misplaced:
        return "is damaged: it shares its bytes with another member, or has none"
    if info.file_size > FREE_BYTES and info.file_size > MAX_RATIO * info.compress_size:
        return _BOMB
    return ""


def _misplaced(infos: Iterable[ZipInfo], limit: int) -> Iterator[int]:
    """The offsets of members that share bytes, as those of small bombs do, or stand outside."""
    last, last_end = -1, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        start = info.header_offset
        end = start + _OWN_HEADER_BYTES + len(info.orig_filename) + info.compress_size
        if start < 0 or end > limit:
            yield start
        if start < last_end:
            yield from (start, last)
        if end > last_end:
            last, last_end = start, end


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


class _Metered:
    """The archive's bytes as zipfile asks for them: counted, and never more than a list may have.

    zipfile reads the list of members at once, however large the archive says that it is.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = 0
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        most = _MAX_LIST_BYTES + 1
        data = self._file.read(min(size, most))  # without a size: the last 64 KiB
        self.bytes += len(data)
        # a line of the list starts with these four bytes; no other read is as long
        if len(data) == most or data.count(b"PK\x01\x02") > MAX_MEMBERS:
            raise _Damaged(f"has more than {MAX_MEMBERS:,} members, or a list of them over 32 MiB")
        return data


class _Reader(io.RawIOBase):
    """The bytes of one member, unpacked as they are asked for, whatever its header says."""

    def __init__(self, info: ZipInfo, listed: ZipFile, archive: _Metered) -> None:
        self._info, self._list, self._archive = info, listed, archive
        self._opened: ZipExtFile | None = None
        self._packed = self._unpacked = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        before = self._archive.bytes
        self._opened = self._opened or self._open()
        try:
            data = self._opened.read1(min(len(buffer), _READ_BYTES))
        except EOFError:
            raise Unreadable("is damaged: it is cut short") from None
        except zlib.error as error:
            raise Unreadable(f"is damaged: it cannot be unpacked ({error})") from None
        except BadZipFile:
            raise Unreadable(
                "is damaged: its check sum is wrong, so what was read of it may be wrong too"
            ) from None
        self._packed += self._archive.bytes - before
        self._unpacked += len(data)
        if self._unpacked > FREE_BYTES and self._unpacked > MAX_RATIO * self._packed:
            raise Unreadable(_BOMB)
        if buffer and not data and self._unpacked < self._info.file_size:
            raise Unreadable("is damaged: it is shorter than its header says")
        buffer[: len(data)] = data
        return len(data)

    def _open(self) -> ZipExtFile:
        """The member behind a header of its own that must agree with the list's."""
        try:
            opened = cast(ZipExtFile, self._list.open(self._info))
        except NotImplementedError as error:
            raise Unreadable(f"cannot be unpacked: {error}") from None
        except (BadZipFile, UnicodeDecodeError):
            raise Unreadable(_DIFFER) from None
        self._archive.seek(self._info.header_offset)
        # zipfile compares the names alone
        _, _, flags, method = struct.unpack("<4s3H", self._archive.read(10))
        if method != self._info.compress_type or flags & _ENCRYPTED:
            raise Unreadable(_DIFFER)
        return opened
