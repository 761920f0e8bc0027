"""A remote: a place that machines share, so that what one of them made, no other needs to make.

It holds artifacts and facts under the names that they have in the store, so that a folder, a bucket
or a server over SSH will do; fsspec speaks to all of them. Nothing there is ever overwritten or
deleted: names come from content, so two machines that write at once write the same. A remote is not
trusted: what comes from it is hashed while it comes, and no name in it leads out of a folder.

    objects/<2>/<hash>/…         the files of an artifact
    objects/<2>/<hash>.json      the manifest that closes it: path, bytes and sha256 of each file
    facts/<2>/<key>/<hash>.json  what the stage of that key gave
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path, PurePosixPath
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

from runner import disk
from runner.engine import key as keys
from runner.engine.words import did_you_mean, escaped, shown
from runner.errors import PreconditionError, RecipeError

T = TypeVar("T")

CHUNK_BYTES: Final = 8 << 20
"""Read or sent at a time; two are under way at once where a store takes files in parts."""
PARTS_MAX: Final = 9_000
"""S3 takes 10,000 parts of one file."""
MANIFEST_BYTES_MAX: Final = 16 << 20
FACT_BYTES_MAX: Final = 1 << 20
FACTS_MAX: Final = 1_000
"""Of one key; there is one for each time that its stage was made anew."""
PAUSES_S: Final = (0.25, 0.5, 1.0)
"""Waited before a failed request is tried again."""
TIMEOUT_S: Final = 10


class RemoteError(PreconditionError):
    """The remote cannot be used: the network, the credentials, a package, the place itself."""


class DamagedRemote(RemoteError):
    """What the remote has under a hash is not what the hash says, or not all of it."""


@dataclass(frozen=True)
class _Protocol:
    package: str = ""
    extra: str = ""
    renames: bool = False
    """Files appear while they are written, so they are written beside and renamed."""
    has_host: bool = True
    takes_user: bool = False
    credentials: str = "check who may read and write there"


_S3 = _Protocol(
    package="s3fs",
    extra="s3",
    credentials="set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
)
_GS = _Protocol(
    package="gcsfs",
    extra="gs",
    credentials="set GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
)
_SSH = _Protocol(
    package="paramiko",
    extra="ssh",
    renames=True,
    takes_user=True,
    credentials="try `ssh` to that host once: its key must be known, and yours in the ssh agent",
)
_PROTOCOLS: Final = {
    "file": _Protocol(renames=True, has_host=False),
    "memory": _Protocol(has_host=False),
    "s3": _S3,
    "gs": _GS,
    "gcs": _GS,
    "sftp": _SSH,
    "ssh": _SSH,
}

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_HASH: Final = re.compile(r"[0-9a-f]{64}")


def opened(url: str, root: Path) -> Remote:
    """The remote at a folder, which is relative to `root`, or at a `protocol://…` address.

    Raises RecipeError for an address that cannot be one, RemoteError where a package is missing or
    a server does not answer; a store like S3 is not asked before something is wanted of it.
    """
    if why := refusal(url):
        raise RecipeError(f"remote {named(url)} {why}")
    scheme, protocol = _protocol(url)
    path, options = _place(url, scheme, root)
    return _retried(
        lambda: Remote(_connected(url, scheme, options), path, named(url), protocol),
        named(url),
        protocol,
        "cannot be opened",
    )


def refusal(url: str) -> str:
    """Why the text can be no remote, as the end of a sentence; nothing when it can. No secrets."""
    if not url.strip():
        return "must not be empty; write a folder, or an address like s3://bucket/folder"
    if not url.isprintable():
        return "has invisible characters; delete them"
    found = _SCHEME.match(url)
    if not found:
        if re.match(r"[\w.@-]+:", url) and not re.match(r"[A-Za-z]:[\\/]", url):
            return "is no folder; for a server over SSH write ssh://HOST/FOLDER"
        if re.match(r"~[^/\\]", url):
            return "names another user's folder; write where that is"
        return ""
    scheme = found[1].lower()
    if scheme not in _PROTOCOLS:
        near = did_you_mean(scheme, _PROTOCOLS)
        known = "a folder, s3://, gs:// or ssh://"
        return f"begins with {shown(scheme)}, which is none that is known{near}; write {known}"
    protocol = _PROTOCOLS[scheme]
    before_at, at, _ = url.partition("://")[2].rpartition("@")
    if at and (":" in before_at or not protocol.takes_user):
        return f"must not hold credentials, which belong in the environment; {protocol.credentials}"
    if "?" in url or "#" in url:
        return "must not have a `?` or `#`; write the address without what follows it"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "has a host or port that is none; correct it"
    if protocol.has_host and not parts.hostname:
        return f"names no {'host' if protocol.takes_user else 'bucket'}; write it after {scheme}://"
    if protocol.takes_user and not parts.path.strip("/"):
        return "names no folder; write it after the host"
    if ".." in parts.path.split("/"):
        return "must not have `..` in an address; write where it leads"
    return ""


def named(url: str) -> str:
    """The address as messages have it: without credentials and queries."""
    return escaped(_without_secrets(re.sub(r"^[^/]*:[^/]*@", "", url)))


class Remote:
    """An open remote. Every method raises RemoteError when the remote does not do what it should.

    It may be used by several threads at once.
    """

    def __init__(self, files: Any, root: str, name: str, protocol: _Protocol) -> None:
        self._files = files
        self._root = root.rstrip("/")
        self._protocol = protocol
        self.name = name

    def facts(self, key: str) -> dict[str, bytes]:
        """What is known of a key: the hash of each output that it gave → the fact's JSON."""
        folder = self._facts(key)
        found: dict[str, int] = {}
        for entry in self._try(lambda: self._listed(folder), "cannot be read"):
            name = PurePosixPath(str(entry["name"])).name
            output = name.removesuffix(".json")
            size = entry["size"] or 0
            is_fact = entry["type"] == "file" and name != output and _HASH.fullmatch(output)
            if is_fact and 0 < size <= FACT_BYTES_MAX:
                found[output] = size
        return {
            output: self._small(f"{folder}/{output}.json", found[output])
            for output in sorted(found)[:FACTS_MAX]
        }

    def holds(self, output: str) -> bool:
        """Whether the whole artifact is there: its manifest, which is written last."""
        return self._size(self._manifest(output)) is not None

    def fetch(self, output: str, folder: Path) -> None:
        """Fills the empty folder with the artifact, each file checked against its hash.

        Raises DamagedRemote where the remote has something else, with what came left in the
        folder, and PreconditionError where it does not fit on the disk.
        """
        files = self._files_of(output)
        disk.check_room(folder, sum(file.bytes for file in files))
        for file in files:
            path = folder.joinpath(*file.path.split("/"))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._download(output, file, path)
            except FileExistsError:  # on this file system, two names of the manifest are one
                raise self._damaged(output, f"{shown(file.path)} is there twice") from None
            except OSError as error:
                if full := disk.full(error, folder, file.bytes):
                    raise full from error
                raise

    def is_complete(self, output: str) -> bool:
        """Whether every file of the artifact is there with its size."""
        try:
            files = self._files_of(output)
        except DamagedRemote:
            return False
        return all(self._size(f"{self._object(output)}/{one.path}") == one.bytes for one in files)

    def upload(self, output: str, folder: Path, *, anew: bool = False) -> None:
        """Brings the artifact to the remote, its manifest last.

        What is there already stays, but `anew` for an artifact that is known to be damaged there.
        """
        if self.holds(output) and not anew:
            return
        files = _described(folder)
        if keys.of_files((file.path, file.sha256) for file in files) != output:
            raise PreconditionError(
                f"{folder} does not hold what its name says, so it is not uploaded",
                hint="something changed its files; delete the folder, and `apply` makes it again",
            )
        for file in files:
            if why := _refused(file.path):
                raise PreconditionError(f"{folder}/{shown(file.path)} cannot be uploaded: {why}")
        for file in files:
            path = f"{self._object(output)}/{file.path}"
            self._upload_file(path, folder / file.path, file.bytes, anew=anew)
        self._write(self._manifest(output), _manifest_of(files))

    def publish(self, key: str, output: str, fact: bytes) -> None:
        """Makes the fact known that the key gave the output, which must be there already."""
        if not self.holds(output):
            raise RemoteError(
                f"remote {self.name} has no whole copy of {output[:12]}, "
                "so a fact about it is not published",
                hint="upload the artifact first",
            )
        path = f"{self._facts(key)}/{_hash(output)}.json"
        if self._size(path) is None:
            self._write(path, fact)

    # Names

    def _object(self, output: str) -> str:
        return f"{self._root}/objects/{_hash(output)[:2]}/{output}"

    def _manifest(self, output: str) -> str:
        return f"{self._object(output)}.json"

    def _facts(self, key: str) -> str:
        return f"{self._root}/facts/{_hash(key)[:2]}/{key}"

    # Reading

    def _listed(self, folder: str) -> list[dict[str, Any]]:
        try:
            return list(self._files.ls(folder, detail=True))
        except FileNotFoundError as error:
            if "bucket does not exist" in str(error).lower():
                raise
            return []

    def _size(self, path: str) -> int | None:
        """The bytes of a file; None where there is none."""

        def size() -> int | None:
            # Not `exists`: it says no when the network is down.
            try:
                found = self._files.info(path)
            except FileNotFoundError:
                return None
            return int(found["size"] or 0) if found["type"] == "file" else None

        return self._try(size, "cannot be read")

    def _small(self, path: str, size: int) -> bytes:
        """The file, of which no more than `size` bytes are read."""
        if size == 0:
            return b""  # a range of nothing is an error in S3
        return bytes(
            self._try(lambda: self._files.cat_file(path, start=0, end=size), "cannot be read")
        )

    def _files_of(self, output: str) -> tuple[_File, ...]:
        """The checked manifest of an artifact."""
        path = self._manifest(output)
        size = self._size(path)
        if size is None:
            raise self._damaged(output, "it is not there, or an upload did not finish")
        if size > MANIFEST_BYTES_MAX:
            raise self._damaged(output, f"its manifest has {size:,} bytes")
        data = self._small(path, size)
        try:
            files = _parsed(data)
        except ValueError as error:
            raise self._damaged(output, f"its manifest {error}") from None
        if keys.of_files((file.path, file.sha256) for file in files) != output:
            raise self._damaged(output, "its manifest names other files")
        return files

    def _download(self, output: str, file: _File, to: Path) -> None:
        came, digest = 0, hashlib.sha256()
        with to.open("xb") as local, closing(self._stream(output, file.path)) as chunks:
            for chunk in chunks:
                came += len(chunk)
                if came > file.bytes:
                    break
                digest.update(chunk)
                local.write(chunk)
        if came != file.bytes:
            what = "is longer than" if came > file.bytes else f"has {came:,} of"
            raise self._damaged(output, f"{shown(file.path)} {what} its {file.bytes:,} bytes")
        if digest.hexdigest() != file.sha256:
            raise self._damaged(output, f"the content of {shown(file.path)} was changed")

    def _stream(self, output: str, name: str) -> Generator[bytes, None, None]:
        """The bytes of a file; after a failure it goes on from where it was."""
        path = f"{self._object(output)}/{name}"
        offset = failures = 0
        while True:
            try:
                with self._files.open(
                    path, "rb", block_size=CHUNK_BYTES, cache_type="none"
                ) as file:
                    file.seek(offset)
                    if hasattr(file, "prefetch"):  # else SFTP waits for each 32 KiB
                        file.prefetch(max_concurrent_requests=64)
                    while chunk := file.read(CHUNK_BYTES):
                        yield chunk
                        offset += len(chunk)
                        failures = 0
                return
            except FileNotFoundError:
                raise self._damaged(output, f"{shown(name)} is not there") from None
            except Exception as error:
                _pause_or_raise(error, failures, self.name, self._protocol, "cannot be read")
                failures += 1

    # Writing

    def _upload_file(self, path: str, file: Path, size: int, *, anew: bool) -> None:
        there = None if anew else self._size(path)
        if there == size:
            return  # brought by an upload that did not finish; files appear whole
        if there is not None:
            raise DamagedRemote(
                f"remote {self.name} has {there:,} bytes instead of {size:,} at {escaped(path)}",
                hint="`runner push` brings the artifact again",
            )
        options: dict[str, Any] = {}
        if self._protocol in (_S3, _GS):
            options["chunksize"] = max(CHUNK_BYTES, -(-size // PARTS_MAX))
        if self._protocol is _S3:
            options["max_concurrency"] = 2
        # Not `open` for writing: an error inside its `with` still commits what was written.
        self._place(path, lambda to: self._files.put_file(str(file), to, **options))

    def _write(self, path: str, data: bytes) -> None:
        self._place(path, lambda to: self._files.pipe_file(to, data))

    def _place(self, path: str, write: Callable[[str], object]) -> None:
        """Lets `write` make a file that appears whole under its name, or not at all."""
        if self._protocol.renames:
            self._try(lambda: self._renamed(path, write), "cannot be written")
        else:
            self._try(lambda: write(path), "cannot be written")

    def _renamed(self, path: str, write: Callable[[str], object]) -> None:
        parent, _, name = path.rpartition("/")
        beside = f"{parent}/.{name}.{uuid4().hex}.tmp"
        self._files.makedirs(parent, exist_ok=True)
        try:
            write(beside)
            if self._is_local:
                disk.sync_file(Path(beside))
                Path(beside).replace(path)
                disk.sync_folder(Path(parent))
            else:
                if self._files.exists(path):
                    self._files.rm(path)  # a server's rename does not replace
                self._files.mv(beside, path)
        except Exception as error:
            with suppress(Exception):
                self._files.rm_file(beside)
            full = disk.full(error, Path(parent)) if self._is_local else None
            if full:
                raise full from error
            raise

    # Errors

    @property
    def _is_local(self) -> bool:
        return self._protocol is _PROTOCOLS["file"]

    def _try(self, request: Callable[[], T], doing: str) -> T:
        return _retried(request, self.name, self._protocol, doing)

    def _damaged(self, output: str, what: str) -> DamagedRemote:
        place = f"objects/{output[:2]}/{output}"
        return DamagedRemote(
            f"remote {self.name} has no good copy of {output[:12]}: {what}",
            hint=f"delete {place} and {place}.json at the remote, then it can be uploaded again",
        )


# Manifests


@dataclass(frozen=True)
class _File:
    path: str
    bytes: int
    sha256: str


def _described(folder: Path) -> tuple[_File, ...]:
    """All files of the folder by name."""
    found = []
    for path in disk.files(folder):
        with path.open("rb") as file:
            sha256 = file_digest(file, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        found.append(_File(name, path.stat().st_size, sha256))
    return tuple(sorted(found, key=lambda file: file.path))


def _manifest_of(files: tuple[_File, ...]) -> bytes:
    """The same bytes from every writer."""
    rows = [{"path": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in files]
    return (json.dumps({"files": rows}, ensure_ascii=False, indent=1) + "\n").encode()


def _parsed(data: bytes) -> tuple[_File, ...]:
    """The files in a manifest; raises ValueError with the end of a sentence. Names are safe."""
    try:
        rows = json.loads(data)["files"]
        files = tuple(_File(row["path"], row["bytes"], row["sha256"]) for row in rows)
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError("cannot be read") from None
    paths: set[str] = set()
    for file in files:
        if not isinstance(file.path, str) or type(file.bytes) is not int:
            raise ValueError("cannot be read")
        if not isinstance(file.sha256, str) or not _HASH.fullmatch(file.sha256):
            raise ValueError("cannot be read")
        if not 0 <= file.bytes < 2**63:
            raise ValueError("cannot be read")
        if why := _refused(file.path):
            raise ValueError(f"has the name {shown(file.path)}: {why}")
        if file.path in paths:
            raise ValueError(f"has {shown(file.path)} twice")
        paths.add(file.path)
    for path in paths:
        if any(str(parent) in paths for parent in PurePosixPath(path).parents):
            raise ValueError(f"has a file above {shown(path)}")
    return files


def _refused(name: str) -> str:
    """Why a name may not be in a manifest; nothing when it may, on every system."""
    if not name or name.startswith("/") or any(p in ("", ".", "..") for p in name.split("/")):
        return "it must be a plain path inside the artifact"
    if re.search(r'[\x00-\x1f\x7f\\:*?"<>|\ud800-\udfff]', name):
        return "a backslash, colon or the like does not mean the same on every system"
    if len(name.encode()) > 900 or any(len(part.encode()) > 255 for part in name.split("/")):
        return "it is too long"
    if re.search(r"[ .](/|$)", name):
        return "Windows drops dots and blanks at the end of a name"
    return ""


def _hash(text: str) -> str:
    """The text, where it is a hash; it becomes part of a path."""
    if not _HASH.fullmatch(text):
        raise ValueError(f"{text!r} is no hash")
    return text


# Connecting


def _protocol(url: str) -> tuple[str, _Protocol]:
    found = _SCHEME.match(url)
    scheme = found[1].lower() if found else "file"
    return scheme, _PROTOCOLS[scheme]


def _place(url: str, scheme: str, root: Path) -> tuple[str, dict[str, Any]]:
    """The path that fsspec wants, and what its file system must know.

    Listings are not cached, because what another machine has written since must be seen.
    """
    if not _SCHEME.match(url):
        return (root / Path(url).expanduser()).absolute().as_posix(), {"auto_mkdir": False}
    parts = urlsplit(url)
    if scheme == "file":
        from fsspec.implementations.local import LocalFileSystem

        return str(LocalFileSystem._strip_protocol(url)), {"auto_mkdir": False}
    if scheme == "memory":
        return f"/{parts.netloc}{parts.path}", {}
    if scheme == "s3":
        once = {"max_attempts": 0}  # else each layer multiplies how often the next one tries
        limits = {"connect_timeout": TIMEOUT_S, "read_timeout": 3 * TIMEOUT_S, "retries": once}
        options = {"config_kwargs": limits, "use_listings_cache": False}
        return f"{parts.netloc}{parts.path}", options
    if scheme in ("gs", "gcs"):
        return f"{parts.netloc}{parts.path}", {"use_listings_cache": False}
    options = {"host": parts.hostname, "timeout": TIMEOUT_S}
    options |= {"port": parts.port} if parts.port else {}
    options |= {"username": parts.username} if parts.username else {}
    return parts.path, options


def _connected(url: str, scheme: str, options: dict[str, Any]) -> Any:
    import fsspec

    try:
        files = fsspec.get_filesystem_class(scheme)
    except ImportError:
        protocol = _PROTOCOLS[scheme]
        raise RemoteError(
            f"remote {named(url)} needs the Python package {protocol.package}",
            hint=f"pip install 'runner[{protocol.extra}]'",
        ) from None
    if _PROTOCOLS[scheme] is _SSH:
        options = {**options, "host_key_policy": _known_hosts()}
    found = files(**options, skip_instance_cache=True)
    if _PROTOCOLS[scheme] is _S3:
        found.retries = 2  # of s3fs itself; it sends a failed part again without the others
    return found


def _known_hosts() -> Any:
    """Lets a host in whose key the user's own `ssh` knows; fsspec by itself trusts every host."""
    import paramiko

    class KnownHosts(paramiko.RejectPolicy):  # type: ignore[misc]
        def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
            path = Path.home() / ".ssh" / "known_hosts"
            if not path.is_file() or not paramiko.HostKeys(str(path)).check(hostname, key):
                raise RemoteError(
                    f"the key of the host {hostname} is not known: it is not in {path}",
                    hint=_SSH.credentials,
                )

    return KnownHosts()


# Trying again

_PERMANENT: Final = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
_LIBRARIES: Final = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "paramiko", "s3fs")
_NOT_LET_IN: Final = re.compile("Credentials|Auth|Profile|SSO|Token|Password|BadHostKey")
"""In the name of an error's class; paramiko has one that only its text tells."""


def _retried(request: Callable[[], T], name: str, protocol: _Protocol, doing: str) -> T:
    for failures in range(len(PAUSES_S) + 1):
        try:
            return request()
        except Exception as error:
            _pause_or_raise(error, failures, name, protocol, doing)
    raise AssertionError("the last failure is raised")


def _pause_or_raise(
    error: Exception, failures: int, name: str, protocol: _Protocol, doing: str
) -> None:
    """Waits where the error may pass; else raises it in words, and as it is where it is a bug."""
    if not _comes_from_outside(error):
        raise error
    if _is_permanent(error) or failures >= len(PAUSES_S):
        _raise_in_words(error, name, protocol, doing)
    time.sleep(PAUSES_S[failures])


def _comes_from_outside(error: Exception) -> bool:
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | EOFError) or library in _LIBRARIES


def _is_permanent(error: Exception) -> bool:
    return isinstance(error, _PERMANENT) or _is_not_let_in(error)


def _is_not_let_in(error: Exception) -> bool:
    if isinstance(error, PermissionError) or _NOT_LET_IN.search(type(error).__name__):
        return True
    return "No authentication methods available" in str(error)


def _raise_in_words(error: Exception, name: str, protocol: _Protocol, doing: str) -> NoReturn:
    reason = _without_secrets(" ".join(str(error).split())) or type(error).__name__
    if _is_not_let_in(error):
        hint = protocol.credentials
    elif isinstance(error, _PERMANENT):
        hint = "check that the place is there and the address right"
    else:
        hint = "check the network and the address, then run the same command again"
    raise RemoteError(f"remote {name} {doing}: {escaped(reason[:300])}", hint=hint) from error


def _without_secrets(text: str) -> str:
    """The text with the user, password, query and fragment of each address left out."""
    text = re.sub(r"(?<=://)[^\s\"']*@", "", text)
    return re.sub(r"(://[^\s\"'?#]*)[?#][^\s\"']*", r"\1", text)
