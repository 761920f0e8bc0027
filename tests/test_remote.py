import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from moto.server import ThreadedMotoServer

from runner.engine import remote, settings, store
from runner.engine.remote import DamagedRemote, Remote, RemoteError
from runner.errors import PreconditionError, RecipeError

KEY = "ab" * 32


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user's environment would hold, and nothing from the machine's own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-tell")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture
def bucket(s3_server: str, credentials: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a new bucket, whose server the environment names."""
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    name = f"shared-{uuid4().hex}"
    S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/cache"


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("bucket"))
    return {
        "folder": "shared/cache",
        "file": (tmp_path / "shared").as_uri(),
        "memory": f"memory://{uuid4().hex}",
    }[str(request.param)]


@pytest.fixture
def shared(url: str, tmp_path: Path) -> Remote:
    return remote.opened(url, tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> Remote:
    return remote.opened("shared", tmp_path)


def artifact(folder: Path, text: str = "hello") -> tuple[str, Path]:
    """A small artifact: its hash and its folder."""
    (folder / "deep").mkdir(parents=True)
    (folder / "conversations.jsonl").write_text(text)
    (folder / "deep" / "naïve name.bin").write_bytes(bytes(range(256)))
    (folder / "empty").touch()
    return store.content_hash(folder), folder


def fetched(shared: Remote, output: str, folder: Path) -> Path:
    folder.mkdir()
    shared.fetch(output, folder)
    return folder


def with_manifest(root: Path, files: list[dict[str, Any]], output: str = "") -> str:
    """Puts a manifest at the remote in the folder; the hash that it is for."""
    output = output or remote.keys.of_files((file["path"], file["sha256"]) for file in files)
    path = root / "shared" / "objects" / output[:2] / f"{output}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"files": files}))
    return output


def row(path: str, data: bytes = b"x") -> dict[str, Any]:
    return {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# What every remote does


def test_what_was_uploaded_comes_back_the_same(shared: Remote, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    shared.upload(output, folder)
    assert store.content_hash(fetched(shared, output, tmp_path / "got")) == output


def test_an_artifact_is_held_once_it_was_uploaded(shared: Remote, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    assert not shared.holds(output)
    shared.upload(output, folder)
    assert shared.holds(output)


def test_another_machine_sees_what_was_uploaded_since(url: str, tmp_path: Path) -> None:
    mine, theirs = remote.opened(url, tmp_path), remote.opened(url, tmp_path)
    output, folder = artifact(tmp_path / "made")
    assert not mine.holds(output)
    assert mine.facts(KEY) == {}
    theirs.upload(output, folder)
    theirs.publish(KEY, output, b"{}")
    assert mine.holds(output)
    assert mine.facts(KEY) == {output: b"{}"}


def test_facts_of_several_outputs_of_one_key_are_all_there(shared: Remote, tmp_path: Path) -> None:
    facts = {}
    for text in ("one", "two", "three"):
        output, folder = artifact(tmp_path / text, text)
        shared.upload(output, folder)
        facts[output] = json.dumps({"output": output}).encode()
        shared.publish(KEY, output, facts[output])
    assert shared.facts(KEY) == facts
    assert shared.facts("cd" * 32) == {}


def test_a_fact_stays_as_it_was_first_published(shared: Remote, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    shared.upload(output, folder)
    shared.publish(KEY, output, b"first")
    shared.publish(KEY, output, b"second")
    assert shared.facts(KEY) == {output: b"first"}


def test_no_fact_is_published_about_what_is_not_there(shared: Remote) -> None:
    with pytest.raises(RemoteError, match="has no whole copy of cdcdcdcdcdcd"):
        shared.publish(KEY, "cd" * 32, b"{}")
    assert shared.facts(KEY) == {}


def test_what_is_not_there_cannot_be_fetched(shared: Remote, tmp_path: Path) -> None:
    with pytest.raises(DamagedRemote, match="it is not there, or an upload did not finish"):
        fetched(shared, "cd" * 32, tmp_path / "got")


def test_two_threads_upload_the_same_artifact(url: str, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    one = remote.opened(url, tmp_path)
    another = remote.opened(url, tmp_path)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda r: r.upload(output, folder), [one, another, one, another]))
    assert store.content_hash(fetched(one, output, tmp_path / "got")) == output


def test_an_upload_that_was_killed_is_not_held_and_a_later_one_completes_it(
    url: str, tmp_path: Path
) -> None:
    output, folder = artifact(tmp_path / "made")
    whole = remote.opened(url, tmp_path)
    path = whole._object(output) + "/conversations.jsonl"
    whole._upload_file(path, folder / "conversations.jsonl", 5, anew=False)

    shared = remote.opened(url, tmp_path)
    assert not shared.holds(output)
    shared.upload(output, folder)
    assert store.content_hash(fetched(shared, output, tmp_path / "got")) == output


# Folders


def test_the_layout_of_a_remote(local: Remote, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    local.upload(output, folder)
    local.publish(KEY, output, b"{}")
    files = {p.relative_to(tmp_path / "shared").as_posix() for p in _files(tmp_path / "shared")}
    place = f"objects/{output[:2]}/{output}"
    assert files == {
        f"{place}/conversations.jsonl",
        f"{place}/deep/naïve name.bin",
        f"{place}/empty",
        f"{place}.json",
        f"facts/ab/{KEY}/{output}.json",
    }
    assert json.loads((tmp_path / "shared" / f"{place}.json").read_text("utf-8")) == {
        "files": [
            row("conversations.jsonl", b"hello"),
            row("deep/naïve name.bin", bytes(range(256))),
            row("empty", b""),
        ]
    }


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_process_killed_while_it_uploads_leaves_nothing_that_is_held(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    for number in range(400):
        (tmp_path / "made" / f"{number}").write_bytes(b"x" * 1000)
    output = store.content_hash(tmp_path / "made")
    code = (
        "from pathlib import Path\nfrom runner.engine import remote\n"
        f"remote.opened('shared', Path({str(tmp_path)!r}))"
        f".upload({output!r}, Path({str(tmp_path / 'made')!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "shared").is_dir() or len(_files(tmp_path / "shared")) < 5:
        time.sleep(0.001)
    child.kill()
    child.wait()

    local = remote.opened("shared", tmp_path)
    assert not local.holds(output)
    for path in (tmp_path / "shared").rglob("[!.]*"):
        assert path.is_dir() or path.read_bytes() == b"x" * 1000
    local.upload(output, tmp_path / "made")
    assert store.content_hash(fetched(local, output, tmp_path / "got")) == output


def test_an_upload_leaves_no_file_beside(local: Remote, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    local.upload(output, folder)
    assert not list((tmp_path / "shared").rglob("*.tmp"))


def test_what_is_there_is_not_written_again(local: Remote, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    local.upload(output, folder)
    before = {path: path.stat().st_mtime_ns for path in _files(tmp_path / "shared")}
    local.upload(output, folder)
    assert before == {path: path.stat().st_mtime_ns for path in _files(tmp_path / "shared")}


def test_a_folder_is_relative_to_the_workspace_and_may_be_elsewhere(tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    remote.opened("../nas", tmp_path / "workspace").upload(output, folder)
    assert remote.opened(str(tmp_path / "nas"), tmp_path / "other").holds(output)


def test_an_artifact_that_is_not_what_its_name_says_is_not_uploaded(
    local: Remote, tmp_path: Path
) -> None:
    output, folder = artifact(tmp_path / "made")
    (folder / "empty").write_text("no more")
    with pytest.raises(PreconditionError, match="does not hold what its name says"):
        local.upload(output, folder)
    assert not (tmp_path / "shared").exists()


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="nothing is forbidden to this user"
)
def test_a_folder_that_may_not_be_written_is_a_sentence(tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    (tmp_path / "shared").mkdir(mode=0o555)
    with pytest.raises(RemoteError, match=r"cannot be written: .*Permission denied"):
        remote.opened("shared", tmp_path).upload(output, folder)


def test_a_file_where_the_folder_should_be_is_a_sentence(local: Remote, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    (tmp_path / "shared").write_text("")
    with pytest.raises(RemoteError, match="remote shared cannot be"):
        local.upload(output, folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_at_the_remote_is_said_as_everywhere(
    local: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, folder = artifact(tmp_path / "made")

    def onto_a_full_disk(path: str, to: str) -> None:
        with open("/dev/full", "wb", buffering=0) as file:  # noqa: PTH123
            file.write(b"x")

    monkeypatch.setattr(local._files, "put_file", onto_a_full_disk)
    with pytest.raises(PreconditionError, match="the disk is full"):
        local.upload(output, folder)


# Damage and malice


def test_a_truncated_file_is_found(local: Remote, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    local.upload(output, folder)
    _at(tmp_path, output, "conversations.jsonl").write_text("hel")
    with pytest.raises(DamagedRemote, match=r"'conversations.jsonl' has 3 of its 5 bytes"):
        fetched(local, output, tmp_path / "got")


def test_a_changed_file_is_found(local: Remote, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    local.upload(output, folder)
    _at(tmp_path, output, "conversations.jsonl").write_text("Hello")
    with pytest.raises(DamagedRemote, match=r"content of 'conversations.jsonl' was changed"):
        fetched(local, output, tmp_path / "got")


def test_no_more_is_downloaded_than_the_manifest_says(local: Remote, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    local.upload(output, folder)
    with _at(tmp_path, output, "conversations.jsonl").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(DamagedRemote, match=r"'conversations.jsonl' is longer than its 5 bytes"):
        fetched(local, output, tmp_path / "got")
    assert (tmp_path / "got" / "conversations.jsonl").stat().st_size <= 5


def test_a_missing_file_is_found(shared: Remote, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    shared.upload(output, folder)
    shared._files.rm_file(shared._object(output) + "/conversations.jsonl")
    with pytest.raises(DamagedRemote, match=r"'conversations.jsonl' is not there"):
        fetched(shared, output, tmp_path / "got")


def test_a_file_that_the_manifest_does_not_name_is_not_fetched(
    local: Remote, tmp_path: Path
) -> None:
    output, folder = artifact(tmp_path / "made")
    local.upload(output, folder)
    _at(tmp_path, output, "extra").write_text("mine")
    assert not (fetched(local, output, tmp_path / "got") / "extra").exists()


def test_a_file_more_in_the_manifest_is_found(local: Remote, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    local.upload(output, folder)
    path = _at(tmp_path, output).with_suffix(".json")
    files = json.loads(path.read_text("utf-8"))["files"]
    with_manifest(tmp_path, [*files, row("extra")], output)
    with pytest.raises(DamagedRemote, match="its manifest names other files"):
        fetched(local, output, tmp_path / "got")


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/outside",
        "a/../../outside",
        "./a",
        "a//b",
        "a/",
        "",
        "..",
        "C:/outside",
        "C:outside",
        "..\\outside",
        "a\x00b",
        "a\nb",
        "a\ud800",
        "a.",
        "a" * 300,
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(name: str, local: Remote, tmp_path: Path) -> None:
    output = with_manifest(tmp_path, [row(name)])
    with pytest.raises(DamagedRemote, match="its manifest has the name"):
        fetched(local, output, tmp_path / "got")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"files": 1}',
        '{"files": ["a"]}',
        '{"files": [{"path": 1, "bytes": 1, "sha256": ""}]}',
        json.dumps({"files": [{**row("a"), "bytes": True}]}),
        json.dumps({"files": [{**row("a"), "bytes": -1}]}),
        json.dumps({"files": [{**row("a"), "bytes": 2**100}]}),
        json.dumps({"files": [{**row("a"), "bytes": float("inf")}]}),
        json.dumps({"files": [{**row("a"), "sha256": KEY.upper()}]}),
        "[" * 100_000,
        f'{{"files": {"9" * 10_000}}}',
    ],
)
def test_a_manifest_that_is_none_is_damage(text: str, local: Remote, tmp_path: Path) -> None:
    path = tmp_path / "shared" / "objects" / "ab" / f"{KEY}.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(DamagedRemote, match="its manifest cannot be read"):
        fetched(local, KEY, tmp_path / "got")


def test_a_manifest_without_end_is_not_read(local: Remote, tmp_path: Path) -> None:
    path = tmp_path / "shared" / "objects" / "ab" / f"{KEY}.json"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedRemote, match="its manifest has 1,099,511,627,776 bytes"):
        fetched(local, KEY, tmp_path / "got")


def test_a_file_twice_or_below_another_is_damage(local: Remote, tmp_path: Path) -> None:
    for files in ([row("a"), row("a")], [row("a"), row("a/b")]):
        output = with_manifest(tmp_path, files)
        with pytest.raises(DamagedRemote, match="its manifest has"):
            fetched(local, output, tmp_path / f"got-{len(files[1]['path'])}")


def test_more_than_fits_on_the_disk_is_refused_before_it_comes(
    local: Remote, tmp_path: Path
) -> None:
    output = with_manifest(tmp_path, [{**row("a"), "bytes": 2**62}])
    with pytest.raises(PreconditionError, match="the disk is full"):
        fetched(local, output, tmp_path / "got")
    assert not list((tmp_path / "got").iterdir())


def test_what_is_no_fact_is_passed_over(local: Remote, tmp_path: Path) -> None:
    folder = tmp_path / "shared" / "facts" / "ab" / KEY
    folder.mkdir(parents=True)
    for name in ("x.json", "..json", f"{KEY}", f".{KEY}.json.1.tmp", f"{KEY.upper()}.json"):
        (folder / name).write_text("{}")
    with (folder / f"{'cd' * 32}.json").open("wb") as file:
        file.truncate(1 << 40)
    (folder / f"{'ef' * 32}.json").mkdir()
    assert local.facts(KEY) == {}


def test_what_is_no_hash_makes_no_path(local: Remote, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no hash"):
        local.fetch("../../outside", tmp_path)


def test_a_file_of_another_size_is_not_overwritten(local: Remote, tmp_path: Path) -> None:
    output, folder = artifact(tmp_path / "made")
    path = _at(tmp_path, output, "conversations.jsonl")
    path.parent.mkdir(parents=True)
    path.write_text("something else")
    with pytest.raises(DamagedRemote, match="has 14 bytes instead of 5"):
        local.upload(output, folder)
    assert path.read_text() == "something else"


def _at(root: Path, output: str, *names: str) -> Path:
    return root.joinpath("shared", "objects", output[:2], output, *names)


# Servers


def test_a_large_file_goes_there_and_back_in_little_memory(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    with (tmp_path / "made" / "model.safetensors").open("wb") as file:
        for seed in range(50):
            file.write(random.Random(seed).randbytes(1 << 20))
    output = store.content_hash(tmp_path / "made")
    (tmp_path / "got").mkdir()
    code = f"""
import tracemalloc
from pathlib import Path
from runner.engine import remote
root = Path({str(tmp_path)!r})
shared = remote.opened({bucket!r}, root)
shared.holds({output!r})
tracemalloc.start()
shared.upload({output!r}, root / "made")
shared.fetch({output!r}, root / "got")
print(tracemalloc.get_traced_memory()[1])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert store.content_hash(tmp_path / "got") == output
    assert int(ended.stdout) < 5 * remote.CHUNK_BYTES
    assert ended.stderr == ""


def test_a_download_goes_on_where_the_connection_broke(
    local: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSES_S", (0, 0, 0))
    monkeypatch.setattr(remote, "CHUNK_BYTES", 100)
    (tmp_path / "made").mkdir()
    data = random.Random(0).randbytes(2000)
    (tmp_path / "made" / "model").write_bytes(data)
    output = store.content_hash(tmp_path / "made")
    local.upload(output, tmp_path / "made")
    opened, read = local._files.open, []

    def open_for_two_chunks(path: str, mode: str, **options: Any) -> Any:
        file = opened(path, mode, **options)
        if not path.endswith("/model"):
            return file
        whole = file.read

        def read_or_break(size: int) -> bytes:
            if len(read) % 3 == 2:
                read.append(b"")
                raise ConnectionResetError(104, "Connection reset by peer")
            read.append(whole(size))
            return bytes(read[-1])

        file.read = read_or_break
        return file

    monkeypatch.setattr(local._files, "open", open_for_two_chunks)
    assert (fetched(local, output, tmp_path / "got") / "model").read_bytes() == data
    assert b"".join(read) == data


def test_a_refused_connection_is_a_sentence_within_seconds(
    credentials: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        port = nobody_listens.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        shared = remote.opened("s3://bucket/cache", tmp_path)
        start = time.monotonic()
        with pytest.raises(RemoteError, match="remote s3://bucket/cache cannot be read") as error:
            shared.holds(KEY)
    assert time.monotonic() - start < 10
    assert error.value.hint == "check the network and the address, then run the same command again"
    assert error.value.exit_code == 3


def test_a_bucket_that_is_not_there_is_a_sentence(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="cannot be read: The specified bucket does not exist"):
        remote.opened("s3://no-such-bucket/cache", tmp_path).facts(KEY)


def test_missing_credentials_are_a_sentence(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RemoteError, match="Unable to locate credentials") as error:
        remote.opened(bucket, tmp_path).holds(KEY)
    assert error.value.hint == "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def test_a_secret_in_the_servers_address_is_not_shown(
    credentials: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "PAUSES_S", ())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://somebody:do-not-tell@127.0.0.1:9")
    with pytest.raises(RemoteError) as error:
        remote.opened("s3://bucket/cache", tmp_path).holds(KEY)
    assert "do-not-tell" not in str(error.value)


# Addresses


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "must not be empty"),
        ("s3://", "names no bucket"),
        ("ssh:///folder", "names no host"),
        ("ssh://host", "names no folder"),
        ("ssh://host:99999/folder", "has a host or port that is none"),
        ("ssh://[::1/folder", "has a host or port that is none"),
        ("https://host/folder", "begins with 'https', which is none that is known"),
        ("sfpt://host/folder", "did you mean 'sftp'"),
        ("somebody@host:folder", "for a server over SSH write ssh://HOST/FOLDER"),
        ("s3://bucket/../other", "must not have `..`"),
        ("s3://bucket/a\nb", "has invisible characters"),
        ("s3://bucket/folder?token=do-not-tell", "must not have a `[?]`"),
        ("s3://somebody:do-not-tell@bucket/folder", "must not hold credentials"),
        ("s3://somebody:do-not/tell@bucket/folder", "must not hold credentials"),
        ("s3://do-not-tell@bucket/folder", "must not hold credentials"),
        ("ssh://somebody:do-not-tell@host/folder", "must not hold credentials"),
        ("somebody:do-not-tell@host/folder", "for a server over SSH write"),
    ],
)
def test_an_address_that_can_be_no_remote_is_a_sentence(
    url: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=sentence) as error:
        remote.opened(url, tmp_path)
    assert "tell" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("gs://bucket/folder", "gcsfs", "gs"), ("ssh://me@host/folder", "paramiko", "ssh")],
)
def test_a_missing_package_is_named_with_how_to_install_it(
    url: str, package: str, extra: str, tmp_path: Path
) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(RemoteError, match=f"needs the Python package {package}") as error:
        remote.opened(url, tmp_path)
    assert error.value.hint == f"pip install 'runner[{extra}]'"


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, runner.engine.remote; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(ended.stdout.split()) & {"fsspec", "pydantic", "s3fs", "yaml", "asyncio"}


# runner.yaml


def test_a_workspace_without_settings_has_no_remote(tmp_path: Path) -> None:
    assert settings.read(tmp_path).remote is None


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "remote:\n"])
def test_settings_that_say_nothing_are_the_defaults(text: str, tmp_path: Path) -> None:
    (tmp_path / "runner.yaml").write_text(text)
    assert settings.read(tmp_path) == settings.WorkspaceSettings()


def test_the_remote_of_a_workspace(tmp_path: Path) -> None:
    (tmp_path / "runner.yaml").write_text("remote: s3://bucket/cache\n")
    assert settings.read(tmp_path).remote == "s3://bucket/cache"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("\nremtoe: s3://bucket\n", ":2: no setting named 'remtoe' in the workspace; did you mean"),
        ("x: 1\n", ":1: no setting named 'x' in the workspace; there is remote"),
        ("remote: 5\n", ":1: remote must be a text"),
        ("remote: [s3://a:do-not-tell@bucket]\n", ":1: remote must be a text"),
        ("remote: ''\n", ":1: remote must not be empty"),
        ("# ours\nremote: s3://a:do-not-tell@bucket/x\n", ":2: remote must not hold credentials"),
        ("remote: ssh://a:do-not-tell@host/x\n", ":1: remote must not hold credentials"),
        ("- remote\n", ":1: it must hold settings, one `key: value` a line"),
        ("remote: a\nremote: b\n", ":2: "),
    ],
)
def test_a_mistake_in_the_settings_is_a_sentence_with_its_line(
    text: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "runner.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        settings.read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'runner.yaml'}{sentence}")
    assert "do-not-tell" not in str(error.value)


def test_every_mistake_in_the_settings_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "runner.yaml").write_text("a: 1\nremote: 5\nb: 2\n")
    with pytest.raises(RecipeError) as error:
        settings.read(tmp_path)
    assert [text.split(":")[1] for text in str(error.value).split("\n")] == ["1", "2", "3"]
