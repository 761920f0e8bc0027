"""Reads chats, data sets and documents; each record becomes a conversation or is reported.

Files are read one by one, on all cores where there is much to read, and what was made of a file is
taken over from the last output as long as the file is the same: one new file costs one file. An
index in the cache says which lines of an output came from which file; it is no part of the output,
because the same lines may come from other files.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal

from pydantic import Field

from runner import disk, processes
from runner.chat import files, jsonl
from runner.chat.conversation import Ids, Rejected, content_hash
from runner.chat.formats.reading import Options
from runner.errors import PreconditionError, RunnerError
from runner.sources import SourceFile
from runner.stages.stage import Dirs, Metrics, Sizes, Stage, Written

PARALLEL_BYTES = 16_000_000
"""Less than this is read faster here than by processes that have to be started first."""
TASK_BYTES = 4_000_000
INDEX_VERSION = 1
MADE_OF_SOURCES = 1.25
"""Bytes of conversations to one byte of files. Measured: 0.06 to 0.6 for exports of programs, 0.5
to 1.15 for data sets, 1.05 for data/quickstart; 2.4 for parquet, which is compressed."""


class SourceChanged(RunnerError):
    """A file is not the one that was planned with: the engine plans again with what is there."""


class Ingest(Stage):
    """Read conversations and documents from files."""

    stage: Literal["ingest"]
    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files, folders and globs to read, relative to the workspace."""
    format: Literal[
        "auto",
        "ai_studio",
        "anthropic",
        "character",
        "chatgpt",
        "claude_ai",
        "claude_code",
        "documents",
        "grok",
        "instruct",
        "lm_studio",
        "messages",
        "oasst",
        "open_webui",
        "preferences",
        "prompt_completion",
        "self_instruct",
        "sender",
        "sharegpt",
        "sillytavern",
        "telegram",
    ] = "auto"
    """Read every record as this format instead of telling it by its shape."""
    text_column: Annotated[str, Field(min_length=1)] = "text"
    """The column or key that holds the text of a document, in parquet and JSON Lines files."""
    branches: Literal["newest", "all"] = "newest"
    """Of a conversation that was continued in several ways: the newest way, or every one."""
    sidechains: bool = False
    """Claude Code: read the sessions of sub-agents too."""
    persona: str = ""
    """Chats between people: whose messages are the replies to learn; else who exported them."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Stop when more than this share of all records cannot be read."""

    version = 2
    outside_key = (*Stage.outside_key, "sources")
    libraries = ("pyarrow",)
    writes = "conversations"
    shows: ClassVar[Mapping[str, str]] = {
        "": "conversations.jsonl",
        "rejected": "rejected.jsonl",
    }

    def source_patterns(self) -> tuple[str, ...]:
        return self.sources

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        made = sizes.previous or round(MADE_OF_SOURCES * sizes.sources)
        parts = Written("conversations, file by file", made, temporary=True)
        return Written("conversations", made), parts

    def run(self, dirs: Dirs) -> Metrics:
        options = Options(
            branches=self.branches,
            sidechains=self.sidechains,
            text_column=self.text_column,
            persona=self.persona,
        )
        known = parts_of(dirs.previous, dirs.cache) if dirs.previous else {}
        new = [source for source in dirs.sources if (source.name, source.sha256) not in known]
        scratch = dirs.output / "parts"
        scratch.mkdir()
        for done, part in enumerate(parsed(new, self.format, options, scratch), 1):
            known[part.name, part.sha256] = part
            if done % 100 == 0 or done == len(new):
                dirs.emit({"event": "progress", "done": done, "total": len(new), "unit": "files"})
        parts = [known[source.name, source.sha256] for source in dirs.sources]
        remember(write(parts, dirs.output), dirs.output, dirs.cache)
        shutil.rmtree(scratch)
        good = sum(len(part.ids) for part in parts)
        bad = sum(part.bad for part in parts)
        refuse_bad(good, dirs.output / "rejected.jsonl", dirs.scratch, self.max_bad_fraction)
        if bad:
            text = f"{bad} records could not be read; `runner cat RECIPE {self.name or 'ingest'}"
            dirs.emit({"event": "warning", "text": f"{text} --rejected` lists them"})
        return {
            "files": len(parts),
            "files_read": len(new),
            "conversations": good,
            "rejected": bad,
            "left_out": sum(part.left_out for part in parts),
        }


@dataclass(frozen=True)
class Part:
    """What was made of one file: a stretch of lines of conversations and one of rejected records.

    `name` and `sha256` are those of the file; `ids` are those that the lines have; the stretches
    are in `conversations.jsonl` and `rejected.jsonl` of `folder`.
    """

    name: str
    sha256: str
    ids: tuple[str, ...]
    bad: int
    left_out: int
    bytes: int
    rejected_bytes: int
    folder: Path
    start: int
    rejected_start: int


def parts_of(artifact: Path, cache: Path) -> dict[tuple[str, str], Part]:
    """What is known of the files that an output was made from; nothing where that is lost."""
    try:
        body, _, digest = _index(artifact, cache).read_bytes().rpartition(b"\n")
    except OSError:
        return {}
    if digest != _digest(body):
        return {}  # damaged, or as another version wrote it
    found: dict[tuple[str, str], Part] = {}
    start = rejected_start = 0
    for name, content, ids, bad, left_out, size, rejected_size in json.loads(body):
        found[name, content] = Part(
            name=name,
            sha256=content,
            ids=tuple(ids),
            bad=bad,
            left_out=left_out,
            bytes=size,
            rejected_bytes=rejected_size,
            folder=artifact,
            start=start,
            rejected_start=rejected_start,
        )
        start += size
        rejected_start += rejected_size
    return found


def remember(parts: Sequence[Part], artifact: Path, cache: Path) -> None:
    """Writes down for the next time which stretches of the output are from which file."""
    path = _index(artifact, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [[p.name, p.sha256, p.ids, p.bad, p.left_out, p.bytes, p.rejected_bytes] for p in parts]
    body = json.dumps(rows, separators=(",", ":")).encode()
    disk.write_whole(path, body + b"\n" + _digest(body))


def _digest(body: bytes) -> bytes:
    return sha256(b"%d:%b" % (INDEX_VERSION, body)).hexdigest().encode()


def _index(artifact: Path, cache: Path) -> Path:
    """Named by the content of the output, so that it never speaks of another one."""
    digests = []
    for name in ("conversations.jsonl", "rejected.jsonl"):
        with (artifact / name).open("rb") as file:
            digests.append(file_digest(file, "sha256").hexdigest()[:32])
    return cache / "ingest" / f"{'-'.join(digests)}.json"


@dataclass(frozen=True)
class Task:
    """Some files for one process, and the folder for what is made of them."""

    sources: tuple[SourceFile, ...]
    format: str
    options: Options
    folder: Path


def parsed(
    sources: Sequence[SourceFile], format: str, options: Options, scratch: Path
) -> Iterator[Part]:
    """What is in each file; in other processes, and any order, where there is much to read."""
    sizes = [_size(source) for source in sources]
    tasks = [
        Task(group, format, options, scratch / str(number))
        for number, group in enumerate(_grouped(sources, sizes))
    ]
    if sum(sizes) < PARALLEL_BYTES or len(tasks) == 1:
        for task in tasks:
            yield from _part_by_part(task)
    else:
        for found in processes.mapped(_all_parts, tasks):
            yield from found


def _grouped(
    sources: Sequence[SourceFile], sizes: Sequence[int]
) -> Iterator[tuple[SourceFile, ...]]:
    group: list[SourceFile] = []
    total = 0
    for source, size in zip(sources, sizes, strict=True):
        group.append(source)
        total += size
        if total >= TASK_BYTES:
            yield tuple(group)
            group, total = [], 0
    if group:
        yield tuple(group)


def _all_parts(task: Task) -> list[Part]:
    return list(_part_by_part(task))


def _part_by_part(task: Task) -> Iterator[Part]:
    task.folder.mkdir()
    with (
        (task.folder / "conversations.jsonl").open("wb") as good,
        (task.folder / "rejected.jsonl").open("wb") as bad,
    ):
        for source in task.sources:
            yield _part(source, task, good, bad)
            good.flush()
            bad.flush()


def _part(source: SourceFile, task: Task, good: BinaryIO, bad: BinaryIO) -> Part:
    start, rejected_start = good.tell(), bad.tell()
    ids: list[str] = []
    bad_count = left_out = 0
    with _Unchanged(source) as file:
        for found in files.read(source.name, file, task.format, task.options):
            if isinstance(found, Rejected):
                bad.write(_line(found.record()))
                bad_count += not found.understood
                left_out += found.understood
            else:
                record = found.record()
                ids.append(content_hash(record))
                good.write(_line({"id": ids[-1], **record}))
    return Part(
        name=source.name,
        sha256=source.sha256,
        ids=tuple(ids),
        bad=bad_count,
        left_out=left_out,
        bytes=good.tell() - start,
        rejected_bytes=bad.tell() - rejected_start,
        folder=task.folder,
        start=start,
        rejected_start=rejected_start,
    )


def write(parts: Sequence[Part], output: Path) -> list[Part]:
    """Writes the parts in order, with the ids that the order gives; the parts as written."""
    numbered = Ids()
    written: list[Part] = []
    with (
        (output / "conversations.jsonl").open("wb") as good,
        (output / "rejected.jsonl").open("wb") as bad,
        _Copier(good, "conversations.jsonl") as conversations,
        _Copier(bad, "rejected.jsonl") as rejected,
    ):
        for part in parts:
            rejected.add(part.folder, part.rejected_start, part.rejected_bytes)
            ids = tuple([numbered.next(id.partition("~")[0]) for id in part.ids])
            if ids == part.ids:
                conversations.add(part.folder, part.start, part.bytes)
                written.append(part)
            else:
                size = conversations.renamed(part.folder, part.start, part.ids, ids)
                written.append(replace(part, ids=ids, bytes=size))
    return written


class _Copier:
    """Copies stretches of files to `out`; what lies side by side is copied at once."""

    def __init__(self, out: BinaryIO, name: str) -> None:
        self._out = out
        self._name = name
        self._from: tuple[Path, int, int] | None = None
        self._open: dict[Path, BinaryIO] = {}

    def __enter__(self) -> _Copier:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        for file in self._open.values():
            file.close()

    def add(self, folder: Path, start: int, size: int) -> None:
        if self._from and self._from[0] is folder and self._from[2] == start:
            self._from = (folder, self._from[1], start + size)
        else:
            self._flush()
            self._from = (folder, start, start + size)

    def renamed(self, folder: Path, start: int, old: Sequence[str], new: Sequence[str]) -> int:
        """Copies the lines of `old` with other ids; the bytes written."""
        self._flush()
        file = self._file(folder)
        file.seek(start)
        written = 0
        for was, now in zip(old, new, strict=True):
            rest = file.readline()[len(f'{{"id":"{was}') :]
            written += self._out.write(f'{{"id":"{now}'.encode()) + self._out.write(rest)
        return written

    def _flush(self) -> None:
        if self._from:
            folder, start, stop = self._from
            file = self._file(folder)
            file.seek(start)
            while start < stop:
                data = file.read(min(stop - start, 1 << 22))
                if not data:
                    raise RunnerError(f"{folder / self._name} is shorter than it should be")
                self._out.write(data)
                start += len(data)
        self._from = None

    def _file(self, folder: Path) -> BinaryIO:
        if folder not in self._open:
            self._open[folder] = (folder / self._name).open("rb")
        return self._open[folder]


class _Unchanged:
    """The source opened, and known to hold the bytes that were planned with, until it is closed."""

    def __init__(self, source: SourceFile) -> None:
        self._source = source

    def __enter__(self) -> BinaryIO:
        try:
            self._file = open(self._source.path, "rb", opener=disk.at_once)
        except OSError as error:
            raise SourceChanged(
                f"{self._source.name} cannot be read: {error.strerror}",
                hint="make it readable, run again",
            ) from error
        self._before = os.fstat(self._file.fileno())
        is_file = stat.S_ISREG(self._before.st_mode)
        if not is_file or file_digest(self._file, "sha256").hexdigest() != self._source.sha256:
            self._file.close()
            raise self._changed()
        self._file.seek(0)
        return self._file

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        after = os.fstat(self._file.fileno())
        self._file.close()
        if kind is None and _signature(after) != _signature(self._before):
            raise self._changed()

    def _changed(self) -> SourceChanged:
        return SourceChanged(
            f"{self._source.name} changed while it was being read",
            hint="run again when nothing writes to it any more",
        )


def _signature(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _size(source: SourceFile) -> int:
    try:
        return Path(source.path).stat().st_size
    except OSError:
        return 0  # opening it will say why


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def refuse_bad(good: int, rejected: Path, scratch: Path, max_bad_fraction: float) -> None:
    """Raises when nothing could be read, or less than the recipe allows.

    What was read right but says nothing counts for neither. The list of what was rejected is then
    kept in `scratch`, because the output is not.
    """
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    for record in jsonl.read(rejected):
        if good and "understood" in record:
            continue
        reasons[record["reason"]] += 1
        first.setdefault(record["reason"], f"{record['path']}{_place(record)}")
    bad = reasons.total()
    if good and bad <= max_bad_fraction * (good + bad):
        return
    if not reasons:
        raise PreconditionError("ingest: no conversation in the sources", hint=_READABLE)
    scratch.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(rejected, scratch / rejected.name)
    what = "; ".join(
        f"{count} × {reason} (first in {first[reason]})" for reason, count in reasons.most_common(3)
    )
    others = len(reasons) - 3
    more = f"; and {others} other reason{'' if others == 1 else 's'}" if others > 0 else ""
    listed = f"all are listed in {scratch / rejected.name}"
    if not good:
        raise PreconditionError(
            f"ingest: no conversation in the sources: {what}{more}", hint=f"{listed}; {_READABLE}"
        )
    raise RunnerError(
        f"ingest: {bad} of {good + bad} records cannot be read ({bad / (good + bad):.0%}), more "
        f"than the max_bad_fraction of {max_bad_fraction}: {what}{more}",
        hint=f"{listed}; mend or move the files, or raise max_bad_fraction",
    )


_READABLE = "docs/data.md lists what can be read; `format:` forces one format"


def _place(record: Mapping[str, Any]) -> str:
    if "line" in record:
        return f" line {record['line']}"
    return f" record {record['index']}" if "index" in record else ""
