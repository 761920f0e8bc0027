import io
import itertools
import json
import random
import stat
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.chat import archive
from runner.chat.archive import Member, Refused, members
from runner.chat.json_values import Broken, Value, values
from runner.chat.text_window import Unreadable

CHAT = json.dumps([{"sender": "User", "userInput": "hello"}]).encode()

# where fields stand in a member's own header, and in its line of the list at the end
FLAGS, METHOD, CRC, PACKED, BYTES, NAME = (6, 8), (8, 10), (14, 16), (18, 20), (22, 24), (30, 46)


def packed(*files: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in files:
            file.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


def headers(data: bytes) -> tuple[int, int]:
    """Where the first member's header stands, and where the list of members does."""
    return data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")


def patched(data: bytes, field: tuple[int, int], value: bytes, only: str = "both") -> bytes:
    """The archive with a field of its first member written over, here, in the list or in both."""
    changed = bytearray(data)
    for place, header, offset in zip(("own", "list"), headers(data), field, strict=True):
        if only in ("both", place):
            changed[header + offset : header + offset + len(value)] = value
    return bytes(changed)


def attributes(data: bytes, mode: int) -> bytes:
    return patched(data, (0, 38), struct.pack("<I", mode << 16), "list")


def number(value: int) -> bytes:
    return struct.pack("<I", value)


def named(name: bytes) -> bytes:
    """An archive of one file with that name, which zipfile would not write."""
    return packed(("x" * len(name), CHAT)).replace(b"x" * len(name), name)


def found(data: bytes) -> list[Member | Refused]:
    return list(members(io.BytesIO(data)))


def outcome(data: bytes) -> list[str]:
    """What each member gives: its bytes' sentence, or `read`."""
    said = []
    for item in members(io.BytesIO(data)):
        if isinstance(item, Refused):
            said.append(item.reason)
            continue
        try:
            file = item.open()
            while file.read(2**16):
                pass
            said.append("read")
        except Unreadable as error:
            said.append(str(error))
    return said


def names(data: bytes) -> list[str]:
    return [item.name for item in found(data) if isinstance(item, Member)]


def test_the_data_files_come_by_name() -> None:
    data = packed(("b/z.json", CHAT), ("b/Z.JSONL", CHAT), ("a.md", b"# hi"), ("ж.txt", b"x"))
    assert names(data) == ["a.md", "b/Z.JSONL", "b/z.json", "ж.txt"]
    read = {item.name: item.open().read() for item in found(data) if isinstance(item, Member)}
    assert read["b/z.json"] == CHAT
    assert read["a.md"] == b"# hi"


def test_a_member_says_how_large_it_is() -> None:
    (member,) = found(packed(("a.json", CHAT)))
    assert isinstance(member, Member)
    assert member.bytes == len(CHAT)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_as_they_were_packed(method: int) -> None:
    text = random.Random(1).randbytes(300_000).hex().encode()
    (member,) = found(packed(("a.txt", text), method=method))
    assert isinstance(member, Member)
    assert member.open().read() == text
    assert member.open().read(10) == text[:10]


def test_the_values_of_a_member_are_read_from_it() -> None:
    (member,) = found(packed(("conversations.json", CHAT)))
    assert isinstance(member, Member)
    (value,) = values(member.open())
    assert value == Value({"sender": "User", "userInput": "hello"}, 0)


def test_an_archive_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "export"
    path.write_bytes(packed(("a.json", CHAT)))
    read = [item.open().read() for item in members(path) if isinstance(item, Member)]
    assert read == [CHAT]


def test_members_of_other_kinds_are_summed_up() -> None:
    files = [("a.json", CHAT), ("b.png", b""), ("c.PNG", b""), ("d.html", b""), ("e", b"")]
    _, summary = found(packed(*files))
    assert summary == Refused(
        "4 members of other kinds (.png, .html) were passed over", passed_over=True
    )


def test_one_member_of_another_kind_is_one() -> None:
    (summary,) = found(packed(("a.png", b"")))
    assert summary == Refused("1 member of another kind (.png) was passed over", passed_over=True)


def test_hidden_files_and_folders_are_not_mentioned() -> None:
    data = packed(
        ("__MACOSX/._a.json", b"x"),
        (".DS_Store", b""),
        (".git/x.json", b"{}"),
        ("folder/", b""),
        ("./a.json", CHAT),
    )
    assert names(data) == ["./a.json"]
    assert len(found(data)) == 1


def test_an_archive_of_64_bits_is_read() -> None:
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("a.json", "w", force_zip64=True) as member,
    ):
        member.write(CHAT)
    assert outcome(out.getvalue()) == ["read"]


def test_more_members_than_16_bits_can_count_are_read() -> None:
    data = packed(*((f"{i}.json", b"{}") for i in range(66_000)), method=zipfile.ZIP_STORED)
    assert len(names(data)) == 66_000


def test_an_archive_written_to_a_pipe_is_read() -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError

    out = Pipe()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.json", CHAT)
    assert outcome(out.getvalue()) == ["read"]


def test_a_comment_at_the_end_is_no_hindrance() -> None:
    out = io.BytesIO(packed(("a.json", CHAT)))
    with zipfile.ZipFile(out, "a") as file:
        file.comment = b"made by hand" * 1000
    assert outcome(out.getvalue()) == ["read"]


ONE = packed(("a.json", CHAT))
STORED = packed(("a.json", CHAT), method=zipfile.ZIP_STORED)
LIST, END = headers(ONE)[1], ONE.index(b"PK\x05\x06")


def end_field(offset: int, value: bytes) -> bytes:
    return ONE[: END + offset] + value + ONE[END + offset + len(value) :]


def wide_end(size: int, start: int) -> bytes:
    """An archive whose list has its size and place in 64 bits."""
    wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size, start)
    place = struct.pack("<4sIQI", b"PK\x06\x07", 0, END, 1)
    return ONE[:END] + wide + place + ONE[END:]


def wide_member(offset: int) -> bytes:
    """An archive whose member says in 64 bits where it stands."""
    extra = struct.pack("<2HQ", 1, 8, offset)
    data = patched(
        patched(ONE, (0, 30), struct.pack("<H", 12), "list"), (0, 42), b"\xff" * 4, "list"
    )
    end = bytearray(data[END:])
    end[12:16] = number(END - LIST + len(extra))
    return data[:END] + extra + bytes(end)


def nested(depth: int) -> bytes:
    data = ONE
    for _ in range(depth):
        data = packed(("next.zip", data))
    return data


def overlapping() -> bytes:
    """Two lines of the list for the same bytes."""
    _, listed = headers(ONE)
    line = ONE[listed:END]
    body = ONE[:listed] + line + line.replace(b"a.json", b"b.json")
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2, 2, 2 * len(line), listed, 0)
    return body + end


def bomb(count: int, size: int) -> bytes:
    text = b"0" * size
    return packed(*((f"{i}.json", text) for i in range(count)))


def lying(size: int, says: int) -> bytes:
    """A member of `size` zeros whose header says something else, and gives the right check sum."""
    return patched(packed(("a.json", b"0" * size)), BYTES, number(says))


NAME_TRICKS = {
    "absolute": (b"/etc/a.json", "absolute path"),
    "drive": (b"C:/a.json", "absolute path"),
    "drive and folder": (b"c:a.json", "absolute path"),
    "backslashes": (b"a\\b.json", "backslash"),
    "share": (b"\\\\host\\a.json", "backslash"),
    "up": (b"../a.json", "leads out of the archive"),
    "up inside": (b"a/../../b.json", "leads out of the archive"),
    "up with backslashes": (b"..\\a.json", "backslash"),
    "nul": (b"a.exe\x00.json", "control characters"),
    "line break": (b"a\nb.json", "control characters"),
    "escape sequence": (b"\x1b[2Ja.json", "control characters"),
    "delete": (b"a\x7f.json", "control characters"),
    "right to left": ("a\u202egnp.json".encode(), "control characters"),
    "isolate": ("a\u2066b.json".encode(), "control characters"),
    "long": (b"a" * 5000 + b".json", "too long"),
}
MODES = {
    "link": (stat.S_IFLNK | 0o777, "is a link"),
    "character device": (stat.S_IFCHR | 0o600, "is a device"),
    "block device": (stat.S_IFBLK | 0o600, "is a device"),
    "pipe": (stat.S_IFIFO | 0o600, "is a device, a pipe"),
    "socket": (stat.S_IFSOCK | 0o600, "is a device"),
    "folder": (stat.S_IFDIR | 0o700, "or a folder"),
    "no such kind": (0o170000, "is a device"),
}
METHODS = {
    "shrunk": (1, "method 1"),
    "Deflate64": (9, "Deflate64"),
    "bzip2": (12, "bzip2"),
    "LZMA": (14, "LZMA"),
    "Zstandard": (93, "Zstandard"),
    "PPMd": (98, "PPMd"),
    "AES": (99, "is encrypted"),
    "no such method": (0xFFFF, "method 65535"),
}

HOSTILE: dict[str, tuple[bytes, str]] = {
    **{f"name: {trick}": (named(name), why) for trick, (name, why) in NAME_TRICKS.items()},
    **{f"mode: {kind}": (attributes(ONE, mode), why) for kind, (mode, why) in MODES.items()},
    **{
        f"method: {name}": (patched(ONE, METHOD, struct.pack("<H", method)), why)
        for name, (method, why) in METHODS.items()
    },
    "encrypted": (patched(ONE, FLAGS, b"\x01\x00"), "is encrypted"),
    "patched": (patched(ONE, FLAGS, b"\x20\x00"), "compressed patched data"),
    "strongly encrypted": (patched(ONE, FLAGS, b"\x41\x00"), "is encrypted"),
    "encrypted list": (patched(ONE, FLAGS, b"\x00\x20"), "is encrypted"),
    "encrypted in its own header": (patched(ONE, FLAGS, b"\x01\x00", "own"), "header and the arc"),
    "another method in its own header": (patched(ONE, METHOD, b"\0\0", "own"), "header and the"),
    "another name in its own header": (patched(ONE, NAME, b"b", "own"), "header and the archive"),
    "no name": (patched(ONE, (0, 28), b"\0\0", "list"), "(Truncated central directory)"),
    "not UTF-8 where it says so": (
        patched(packed(("\u00e9.json", CHAT)), NAME, b"\xff\xff"),
        "list of members cannot be read",
    ),
    # damage
    "text altered": (patched(STORED, (40, 0), b"?", "own"), "its check sum is wrong"),
    "packed bytes altered": (patched(ONE, (40, 0), b"\xff\xff\xff", "own"), "is damaged"),
    "check sum altered": (patched(ONE, CRC, b"1234"), "its check sum is wrong"),
    "no member where it says": (patched(ONE, (0, 42), number(3), "list"), "is damaged"),
    "offset behind the end": (patched(ONE, (0, 42), number(2**31), "list"), "is damaged"),
    "own extra field too long": (patched(ONE, (28, 0), b"\xff\xff", "own"), "is cut short"),
    "packed bytes too many": (patched(ONE, PACKED, number(2**30)), "shares its bytes"),
    "packed bytes too few": (patched(ONE, PACKED, number(9)), "its check sum is wrong"),
    "packed bytes none": (patched(ONE, PACKED, number(0)), "its check sum is wrong"),
    "stored, sizes differ": (patched(STORED, BYTES, number(5)), "its check sum is wrong"),
    "stored, too short": (patched(STORED, BYTES, number(500)), "shorter than its header says"),
    "no Deflate": (patched(STORED, METHOD, b"\x08\x00"), "cannot be unpacked"),
    "cut": (ONE[:END], "is cut short: the list of its members is missing"),
    "cut in the list": (ONE[: END - 10], "is cut short"),
    "cut at the start": (ONE[:10], "is cut short"),
    "magic alone": (b"PK\x03\x04", "is cut short"),
    "start missing": (ONE[20:], "is damaged"),
    "list overwritten": (patched(ONE, (0, 0), b"XXXX", "list"), "list of members cannot be read"),
    "empty": (packed(), "is an empty archive"),
    "one part of several": (end_field(4, b"\x01\x00\x01\x00"), "one part of several"),
    "more members than listed": (end_field(8, b"\x02\x00\x02\x00"), "has 2 members, and lists 1"),
    "list too long": (end_field(12, number(2**31)), "(Bad offset for central directory)"),
    "list far away": (end_field(16, number(2**31)), "or has none"),
    "list breaks off": (end_field(12, number(20)), "(Truncated central directory)"),
    "64 bits, list too long": (wide_end(2**63, 0), "(Bad offset for central directory)"),
    "64 bits, list far away": (wide_end(END - LIST, 2**63), "or has none"),
    "64 bits, member far away": (wide_member(2**63), "shares its bytes"),
    "64 bits without a place": (end_field(16, b"\xff" * 4), "or has none"),
    # bombs
    "ratio": (bomb(1, 8_000_000), "more than 100 times its size"),
    "ratio, many small": (bomb(80, 2_000_000), "more than 100 times its size, as a bomb"),
    "says less than it is": (lying(8_000_000, 100), "its check sum is wrong"),
    "says far less, as much packed": (
        patched(lying(8_000_000, 3_000_000), PACKED, number(7000)),
        "its check sum is wrong",
    ),
    "says more than it is": (patched(ONE, BYTES, number(400)), "shorter than its header says"),
    "says more than the limit": (patched(ONE, BYTES, number(2**32 - 2)), "more than 100 times"),
    "same bytes twice": (overlapping(), "shares its bytes"),
    "archive in an archive": (nested(1), "is an archive in an archive"),
    "archives five deep": (nested(5), "is an archive in an archive"),
    "tar in an archive": (packed(("a.tar.gz", b"")), "is an archive in an archive"),
    "same name twice": (
        packed(("a.json", CHAT), ("b.json", CHAT)).replace(b"b.json", b"a.json"),
        "more than once",
    ),
    "Office document": (packed(("[Content_Types].xml", b""), ("a.txt", b"")), "an Office document"),
    "e-book": (packed(("mimetype", b""), ("a.txt", b"")), "is an e-book"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_gives_a_sentence_at_once(name: str) -> None:
    data, reason = HOSTILE[name]
    tracemalloc.start()
    started = time.process_time()
    try:
        said = outcome(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 1
    assert peak < 16_000_000
    assert all(reason in sentence for sentence in said), said
    assert len(said) == (2 if name == "same bytes twice" else 1)


def test_there_are_sixty_hostile_archives() -> None:
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: patched(data, CRC, b"1234"), "its check sum is wrong"),
        (lambda data: patched(data, FLAGS, b"\x01\x00"), "is encrypted"),
        (lambda data: patched(data, NAME, b"/"), "absolute path"),
        (lambda data: attributes(data, stat.S_IFLNK), "is a link"),
        (lambda data: patched(data, (41, 0), b"\xff\xff\xff", "own"), "is damaged"),
    ],
)
def test_the_other_members_survive(damage: Callable[[bytes], bytes], reason: str) -> None:
    first, second = outcome(damage(packed(("aa.json", CHAT), ("b.json", CHAT))))
    assert reason in first
    assert second == "read"


def test_what_was_read_before_the_damage_is_kept_and_the_damage_said() -> None:
    """All but the last piece, which zipfile holds back."""
    lines = b'{"a": 1}\n' * 10_000
    (member,) = found(patched(packed(("a.jsonl", lines)), CRC, b"1234"))
    assert isinstance(member, Member)
    *read, last = values(member.open())
    assert 8000 < len(read) < 10_000
    assert isinstance(last, Broken)
    assert "its check sum is wrong" in last.reason


def test_a_name_in_an_old_code_page_is_read() -> None:
    assert names(named(b"\x81.json")) == ["ü.json"]


def test_the_limit_of_the_total_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 100)
    (refused,) = found(packed(("a.json", CHAT), ("b.json", CHAT), ("c.json", CHAT)))
    assert "would unpack to 126 bytes; the limit is 100" in refused.reason


def test_the_limit_of_members_holds_whatever_the_count_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBERS", 2)
    files = [(f"{i}.json", CHAT) for i in range(3)]
    data = packed(*files)
    end = data.index(b"PK\x05\x06")
    for count in (data[end + 8 : end + 12], b"\x01\x00\x01\x00"):
        (refused,) = found(data[: end + 8] + count + data[end + 12 :])
        assert "has more than 2 members" in refused.reason


def test_a_list_of_far_more_members_than_it_says_is_not_taken_apart() -> None:
    line = ONE[LIST:END]
    data = ONE[:LIST] + line * 150_000
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(data) - LIST, LIST, 0)
    data += end
    tracemalloc.start()
    try:
        (refused,) = found(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "has more than 100,000 members" in refused.reason
    assert peak < 20_000_000


def test_a_list_that_is_as_large_as_the_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "export.zip"
    size = 10 * 2**30
    with path.open("wb") as file:
        file.write(ONE[:LIST])
        file.seek(size)
        wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size - LIST, LIST)
        file.write(wide + struct.pack("<4sIQI", b"PK\x06\x07", 0, size, 1) + ONE[END:])
    tracemalloc.start()
    try:
        (refused,) = members(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        path.unlink()
    assert isinstance(refused, Refused)
    assert "over 32 MiB" in refused.reason
    assert peak < 100_000_000


def test_a_short_file_of_one_line_is_no_bomb() -> None:
    assert outcome(bomb(1, 3_000_000)) == ["read"]


def test_a_bomb_whose_header_lies_about_both_sizes_stops_early() -> None:
    """The list says that much is packed, so that only reading can tell."""
    squeezed = zlib.compressobj(9, wbits=-15)
    body = squeezed.compress(b"0" * 50_000_000) + squeezed.flush()
    filler = random.Random(1).randbytes(1_000_000)
    data = packed(("a.json", body + filler), method=zipfile.ZIP_STORED)
    data = patched(patched(data, METHOD, b"\x08\x00"), BYTES, number(50_000_000))
    started = time.process_time()
    (said,) = outcome(data)
    assert "unpacks to more than 100 times its size" in said
    assert time.process_time() - started < 1


def varied_lines(total: int) -> Iterator[bytes]:
    chance = random.Random(3)
    words = [chance.randbytes(chance.randrange(2, 9)).hex() for _ in range(5000)]
    written = 0
    while written < total:
        line = json.dumps({"text": " ".join(chance.choices(words, k=300))}).encode() + b"\n"
        written += len(line)
        yield line


def test_a_large_member_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "export.zip"
    block = b"".join(varied_lines(1_000_000))
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("a.jsonl", "w") as member,
    ):
        for _ in range(40):
            member.write(block)
    tracemalloc.start()
    try:
        count = 0
        for item in members(path):
            assert isinstance(item, Member)
            count += sum(isinstance(value, Value) for value in values(item.open()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    path.unlink()
    assert count == 40 * block.count(b"\n")
    assert peak < 30_000_000


def test_damage_of_any_kind_gives_members_or_sentences() -> None:
    chance = random.Random(7)
    originals = [
        ONE,
        STORED,
        packed(("a.json", CHAT), ("b/c.txt", b"text " * 500), ("d.png", b"x"), (".e", b"")),
        nested(1),
        overlapping(),
    ]
    started = time.process_time()
    rounds = 0
    while time.process_time() - started < 2:
        data = bytearray(chance.choice(originals))
        for _ in range(chance.randrange(1, 5)):
            at = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    data[at : at + 4] = chance.choice([b"\xff" * 4, b"\0" * 4, b"PK\x05\x06"])
                case 2:
                    del data[at : at + chance.randrange(1, 5)]
                case _:
                    data[at:at] = chance.randbytes(chance.randrange(1, 5))
        for item in members(io.BytesIO(data)):
            if isinstance(item, Member):
                list(itertools.islice(values(item.open()), 10_000))
            else:
                json.dumps([item.reason, item.name], ensure_ascii=False).encode()
                assert item.reason.isprintable()
        rounds += 1
    assert rounds > 100


def test_what_is_no_archive_gives_a_sentence() -> None:
    for data in (b"", b"P", b"no archive at all", b"\0" * 100_000):
        (refused,) = members(io.BytesIO(data))
        assert isinstance(refused, Refused)
        assert "is cut short" in refused.reason
