import base64
import io
import json
import math
import random
import subprocess
import sys
import time
import tracemalloc
import uuid
import zipfile
from contextlib import suppress
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from runner.chat import archive, parquet
from runner.chat.json_values import Broken, Value
from runner.chat.parquet import UnknownColumns, rows
from runner.errors import PreconditionError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared test data")


def written(table: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), out, **options)
    return out.getvalue()


def read(data: bytes, text_column: str | None = None) -> list[Any]:
    found = rows(io.BytesIO(data), text_column)
    return [item.value if isinstance(item, Value) else item.reason for item in found]


def one(array: Any) -> Any:
    """What a column's only value becomes."""
    (row,) = read(written({"text": ["x"], "it": array}))
    return row.get("it", "left out")


def test_a_column_of_text_makes_each_row_a_document() -> None:
    table = {"text": ["a", "b"], "id": [1, 2]}
    found = list(rows(io.BytesIO(written(table))))
    assert found == [Value({"text": "a", "id": 1}, 0), Value({"text": "b", "id": 2}, 1)]


def test_another_column_can_be_named_for_the_text() -> None:
    table = {"id": [1], "body": ["a"], "text": ["something else"]}
    assert read(written(table), "body") == [{"text": "a", "id": 1}]


def test_rows_of_chats_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert read(written({"messages": [messages]})) == [{"messages": messages}]


def test_fields_that_are_null_are_left_out() -> None:
    calls = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool": "x"}]
    assert read(written({"messages": [calls], "system": [None]})) == [{"messages": calls}]


def test_a_text_that_is_null_stays() -> None:
    assert read(written({"text": pa.array([None, "a"], pa.string())})) == [
        {"text": None},
        {"text": "a"},
    ]


def test_without_a_known_column_the_error_lists_them() -> None:
    with pytest.raises(UnknownColumns) as caught:
        list(rows(io.BytesIO(written({"sentence": ["a"], "level": ["b"]}))))
    error = caught.value
    assert isinstance(error, PreconditionError)
    assert error.message == (
        "has no column 'text' and none of a chat; its columns are sentence, level"
    )
    assert error.hint == "set `text_column:` to the one that holds the text"
    assert error.columns == ("sentence", "level")


def test_a_named_column_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UnknownColumns, match="has no column 'body'; its columns are text"):
        read(written({"text": ["a"]}), "body")


def test_the_index_that_pandas_adds_is_left_out() -> None:
    table = {"text": ["a"], "__index_level_0__": [7]}
    assert read(written(table)) == [{"text": "a"}]


def test_the_columns_of_a_document_keep_their_order() -> None:
    (row,) = read(written({"z": [1], "body": ["a"], "b": [2]}), "body")
    assert list(row) == ["text", "z", "b"]


BERLIN = pa.timestamp("ms", "Europe/Berlin")
NANOSECONDS = pa.timestamp("ns")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([datetime(2024, 5, 6, 7, 8, 9)]), "2024-05-06T07:08:09"),
        (pa.array([1_234_567_890_123_456_789], NANOSECONDS), "2009-02-13T23:31:30.123456"),
        (pa.array([0], BERLIN), "1970-01-01T00:00:00+00:00"),
        (pa.array([0], pa.timestamp("s", "Nowhere/At_All")), "1970-01-01T00:00:00+00:00"),
        (pa.array([[1_000]], pa.list_(NANOSECONDS)), ["1970-01-01T00:00:00.000001"]),
        (pa.array([{"t": 1}], pa.struct([("t", NANOSECONDS)])), {"t": "1970-01-01T00:00:00"}),
        (pa.array([0], NANOSECONDS).dictionary_encode(), "1970-01-01T00:00:00"),
        (pa.array([date(2024, 5, 6)]), "2024-05-06"),
        (pa.array([3_600_000_000_001], pa.time64("ns")), "01:00:00"),
        (pa.array([timedelta(seconds=1.5)]), 1.5),
        (pa.array([1_500_000_000], pa.duration("ns")), 1.5),
        (pa.array([Decimal("1.50")]), "1.50"),
        (pa.array([b"old text"]), "old text"),
        (pa.array([b"\xff\x00"]), base64.b64encode(b"\xff\x00").decode()),
        (pa.array([math.nan]), "left out"),
        (pa.array([math.inf]), "left out"),
        (pa.array([[math.nan, 1.0]]), [None, 1.0]),
        (pa.array([1.5], pa.float16()), 1.5),
        (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
        (pa.array([True]), True),
        (pa.array([[("a", 1), ("b", 2)]], pa.map_(pa.string(), pa.int8())), {"a": 1, "b": 2}),
        (pa.array([[(1, "a")]], pa.map_(pa.int8(), pa.string())), [[1, "a"]]),
        (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), [1, 2]),
        (pa.array(["a"], pa.large_string()), "a"),
        (pa.array(["a"]).dictionary_encode(), "a"),
        (pa.array([uuid.UUID(int=1).bytes], pa.uuid()), str(uuid.UUID(int=1))),
        (pa.nulls(1), "left out"),
    ],
)
def test_every_kind_of_column_becomes_plain_data(array: Any, expected: Any) -> None:
    found = one(array)
    assert found == expected
    assert type(found) is type(expected)
    json.dumps(found, allow_nan=False)


def test_a_time_beyond_the_calendar_costs_its_row() -> None:
    column = pa.array([0, 2**60, 0], pa.timestamp("ms"))
    first, second, third = read(written({"text": ["a", "b", "c"], "t": column}))
    assert second.startswith("row 1 cannot be read: ")
    assert (first["text"], third["text"]) == ("a", "c")


def not_utf_8(texts: list[bytes]) -> Any:
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    buffers = [None, pa.array(offsets, pa.int32()).buffers()[1], pa.py_buffer(b"".join(texts))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


def test_text_that_is_no_utf_8_costs_its_row() -> None:
    data = written({"text": not_utf_8([b"a", b"\xff", b"c"])})
    assert read(data) == [{"text": "a"}, "row 1 has text that is not UTF-8", {"text": "c"}]


def test_rows_after_a_broken_one_keep_their_index() -> None:
    found = list(rows(io.BytesIO(written({"text": not_utf_8([b"\xff", b"c"])}))))
    assert found[1] == Value({"text": "c"}, 1)


def test_a_column_that_is_there_twice_is_said() -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    assert read(written(table)) == ["has the column 'text' twice"]


def test_a_table_of_very_many_columns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_COLUMNS", 2)
    assert read(written({"text": ["a"], "b": [1], "c": [2]})) == ["has more than 2 columns"]


def test_a_column_nested_without_end_is_refused() -> None:
    kind, value = pa.int8(), 1
    for _ in range(45):
        kind, value = pa.list_(kind), [value]
    (reason,) = read(written({"text": ["a"], "deep": pa.array([value], kind)}))
    assert "deeply nested" in reason


def test_a_table_without_rows_gives_none() -> None:
    assert read(written({"text": pa.array([], pa.string())})) == []


def test_rows_of_all_groups_are_counted_through() -> None:
    table = {"text": [str(number) for number in range(2500)]}
    found = list(rows(io.BytesIO(written(table, row_group_size=700))))
    assert found == [Value({"text": str(number)}, number) for number in range(2500)]


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_table_that_is_cut_short_is_one_sentence(kept: int) -> None:
    (reason,) = read(written({"text": ["a"]})[:kept])
    assert reason.startswith("is not a Parquet file that can be read: ")


def test_damage_inside_says_which_rows_are_lost() -> None:
    chance = random.Random(1)
    texts = [chance.randbytes(20).hex() for _ in range(3000)]
    data = bytearray(
        written(
            {"text": texts},
            row_group_size=1000,
            compression="none",
            use_dictionary=False,
            write_page_checksum=True,
        )
    )
    data[data.index(texts[1500].encode())] ^= 1
    *kept, last = rows(io.BytesIO(data))
    assert len(kept) == 1000
    assert isinstance(last, Broken)
    assert last.reason.endswith("; the rows from 1000 on are lost")


def test_a_file_that_is_not_there_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(rows(tmp_path / "no.parquet"))


def test_a_table_in_an_archive_is_read(tmp_path: Path) -> None:
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.parquet", written({"text": ["a"]}))
    found = [
        row
        for member in archive.members(path)
        if isinstance(member, archive.Member)
        for row in rows(member.open())
    ]
    assert found == [Value({"text": "a"}, 0)]


def test_a_table_in_an_archive_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    monkeypatch.setattr(parquet, "MAX_UNSEEKABLE_BYTES", 100)
    (item,) = rows(Pipe(written({"text": ["a"]})))
    assert isinstance(item, Broken)
    assert "is a table of more than 100 bytes in an archive" in item.reason


def test_a_large_table_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    chance = random.Random(2)
    words = [chance.randbytes(4).hex() for _ in range(4000)]
    texts = [" ".join(chance.choices(words, k=1000)) for _ in range(5_000)]
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False)
    del texts
    before = pa.total_allocated_bytes()
    largest = 0
    tracemalloc.start()
    try:
        count = 0
        for item in rows(path):
            count += isinstance(item, Value)
            largest = max(largest, pa.total_allocated_bytes() - before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = path.stat().st_size
    path.unlink()
    assert count == 5_000
    assert size > 35_000_000
    assert peak + largest < 30_000_000


def test_pyarrow_is_imported_with_the_first_file_alone() -> None:
    code = "import sys, runner.chat.parquet; assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_damage_of_any_kind_gives_rows_or_sentences() -> None:
    chance = random.Random(11)
    messages = [[{"role": "user", "content": "hi"}], []]
    originals = [
        written({"text": ["a", "b" * 100], "n": [1, None]}),
        written({"messages": messages, "t": pa.array([0, 1], NANOSECONDS)}, compression="zstd"),
        written({"text": ["a", "a"]}, compression="none", write_page_checksum=True),
    ]
    started = time.process_time()
    rounds = 0
    while time.process_time() - started < 3:
        data = bytearray(chance.choice(originals))
        for _ in range(chance.randrange(1, 5)):
            at = chance.randrange(len(data))
            if chance.random() < 0.7:
                data[at] = chance.randrange(256)
            else:
                del data[at : at + chance.randrange(1, 5)]
        with suppress(UnknownColumns):
            for item in rows(io.BytesIO(data)):
                if isinstance(item, Value):
                    json.dumps(item.value, allow_nan=False, ensure_ascii=False).encode()
                else:
                    assert item.reason.isprintable()
        rounds += 1
    assert rounds > 100


@needs_shared
def test_a_real_table_of_documents_is_read() -> None:
    found = list(rows(SHARED / "derived_parquet" / "c4_demo.parquet"))
    assert len(found) == 300
    assert all(isinstance(item, Value) and item.value["text"] for item in found)


@needs_shared
def test_a_real_table_without_a_column_called_text_asks_for_one() -> None:
    path = SHARED / "DenisSud__TOS" / "data" / "train-00000-of-00001.parquet"
    with pytest.raises(UnknownColumns, match="its columns are sentence, unfairness_level"):
        list(rows(path))
    found = list(rows(path, "sentence"))
    assert len(found) == 5378
    assert isinstance(found[0], Value)
    assert list(found[0].value) == ["text", "unfairness_level"]


BOMB = "expands to more than 100 times its size, as a bomb does"


def repeated(kind: str) -> Any:
    text = "a" * 1_000_000
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    if kind == "text":
        return {"text": [text] * 300}
    if kind == "categories":
        return {"text": pa.array([text]).dictionary_encode().take(pa.array([0] * 300))}
    if kind == "messages":
        return {"messages": [messages] * 150}
    if kind == "one row":
        return {"messages": [messages * 150]}
    return {"text": ["a"], "numbers": [[1] * 30_000_000]}


@pytest.mark.parametrize("kind", ["text", "categories", "messages", "one row", "numbers"])
def test_a_text_that_is_stored_once_and_used_without_end_is_refused(kind: str) -> None:
    data = written(repeated(kind), compression="zstd")
    assert len(data) < 5000
    before = pa.total_allocated_bytes()
    largest = 0
    tracemalloc.start()
    try:
        reasons = []
        for item in rows(io.BytesIO(data)):
            reasons.append(item.reason if isinstance(item, Broken) else "")
            largest = max(largest, pa.total_allocated_bytes() - before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reasons == [BOMB]
    assert peak + largest < 100_000_000


def test_a_text_that_is_used_often_is_no_bomb() -> None:
    table = {"text": ["a" * 10_000] * 5000}
    data = written(table, compression="zstd")
    assert len(data) < 5000
    assert read(data) == [{"text": "a" * 10_000}] * 5000


def test_what_was_read_before_the_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "FREE_BYTES", 1_000_000)
    texts = [str(number) * 1000 for number in range(10_000)]
    data = written({"text": texts}, compression="zstd", use_dictionary=False, row_group_size=500)
    monkeypatch.setattr(parquet, "MAX_RATIO", 10)
    *kept, last = read(data)
    assert kept == [{"text": text} for text in texts[: len(kept)]]
    assert kept
    reason = "expands to more than 10 times its size, as a bomb does"
    assert last == f"{reason}; the rows from {len(kept)} on are lost"
