from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from runner.errors import PreconditionError, RecipeError
from runner.model.llama import Llama
from runner.ui import serve
from tests.workspaces import make, run

FRANCE: Any = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]
KEY = "a-key-of-my-own"
RECIPE = "name: my-style\nbase_model: {model}\nstages:\n  - stage: ingest\n    sources: [chats]\n"


def recipe_of(root: Path, model: Path) -> Path:
    return make(root, RECIPE.format(model=model), chats=1)


@contextmanager
def serving(recipe: Path, *arguments: str | Path) -> Iterator[dict[str, Any]]:
    command = ["serve", recipe, "--base", "--port", "0", "--context", "512", "--json", *arguments]
    with subprocess.Popen(
        [sys.executable, "-m", "runner", *map(str, command)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        try:
            yield {**ready, "process": process}
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def ready(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with serving(recipe_of(tmp_path_factory.mktemp("open"), smollm2_gguf)) as found:
        yield found


@pytest.fixture(scope="module")
def locked(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("locked")
    (root / "keys").write_text(f"another\n\n{KEY}\n")
    with serving(recipe_of(root, smollm2_gguf), "--api-key-file", root / "keys") as found:
        yield found


def client(ready: dict[str, Any], key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=ready["url"], api_key=key, max_retries=0)


def asked(
    ready: dict[str, Any], method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    port = int(ready["url"].split(":")[2].partition("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body or None, headers)
    answer = connection.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return found


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    for _ in range(50):
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_the_openai_client_gets_a_reply(ready: dict[str, Any]) -> None:
    with client(ready) as opened:
        reply = opened.chat.completions.create(
            model="my-style", messages=FRANCE, max_tokens=32, temperature=0
        )
    assert reply.choices[0].message.content
    assert "Paris" in reply.choices[0].message.content
    assert reply.model == "my-style"
    assert reply.usage
    assert reply.usage.completion_tokens > 3


def test_the_openai_client_gets_a_stream(ready: dict[str, Any]) -> None:
    with client(ready) as opened:
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in opened.chat.completions.create(
                model="my-style", messages=FRANCE, max_tokens=32, temperature=0, stream=True
            )
        ]
    assert "Paris" in "".join(pieces)
    assert len(pieces) > 3


def test_it_replies_as_chat_does(ready: dict[str, Any], smollm2_gguf: Path) -> None:
    story = [{"role": "user", "content": "Tell me about the sea."}]
    with Llama(smollm2_gguf, context=512) as llama:
        here = "".join(llama.reply(story, max_tokens=24))
    body = json.dumps({"messages": story, "max_tokens": 24, "temperature": 0}).encode()
    _, _, data = asked(ready, "POST", "/v1/chat/completions", body)
    assert json.loads(data)["choices"][0]["message"]["content"] == here


def test_completions_and_responses_are_answered_too(ready: dict[str, Any]) -> None:
    with client(ready) as opened:
        plain = opened.completions.create(
            model="x", prompt="The capital of France is", max_tokens=4, temperature=0
        )
        newer = opened.responses.create(
            model="x", input=FRANCE, max_output_tokens=32, temperature=0
        )
    assert "Paris" in plain.choices[0].text
    assert "Paris" in newer.output_text


def test_several_clients_are_answered_one_after_another(ready: dict[str, Any]) -> None:
    body = json.dumps({"messages": FRANCE, "max_tokens": 2}).encode()
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: asked(ready, "POST", "/v1/chat/completions", body), range(4))
    assert [status for status, _, _ in found] == [200] * 4


def test_the_list_of_models_names_the_recipe(ready: dict[str, Any]) -> None:
    with client(ready) as opened:
        assert [model.id for model in opened.models.list()] == ["my-style"]


def test_what_llama_cpp_refuses_reaches_the_client(ready: dict[str, Any]) -> None:
    with client(ready) as opened, pytest.raises(openai.BadRequestError, match="context size"):
        opened.chat.completions.create(
            model="x", messages=[{"role": "user", "content": "sea " * 600}]
        )


def test_with_a_key_only_those_who_have_it_are_answered(locked: dict[str, Any]) -> None:
    with client(locked, KEY) as opened, client(locked, "another") as other:
        assert [model.id for model in opened.models.list()] == ["my-style"]
        assert [model.id for model in other.models.list()] == ["my-style"]
    for wrong in ("none", KEY[:-1], f"{KEY}x"):
        with client(locked, wrong) as opened, pytest.raises(openai.AuthenticationError):
            opened.chat.completions.create(model="x", messages=FRANCE)
    assert asked(locked, "GET", "/v1/models")[0] == 401
    assert asked(locked, "GET", "/v1/models", Authorization=f"Basic {KEY}")[0] == 401
    assert asked(locked, "GET", "/v1/models", Authorization="Bearer \xe9")[0] == 401


def test_a_name_that_dns_made_this_machines_is_refused(ready: dict[str, Any]) -> None:
    for name in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.x", "["):
        status, _, body = asked(ready, "GET", "/v1/models", Host=name)
        assert status == 403
        assert b"without an API key only localhost is answered" in body
    for name in ("localhost:1234", "127.0.0.1", "[::1]:80"):
        assert asked(ready, "GET", "/v1/models", Host=name)[0] == 200


def test_with_a_key_another_name_is_answered(locked: dict[str, Any]) -> None:
    headers = {"Host": "models.example", "Authorization": f"Bearer {KEY}"}
    assert asked(locked, "GET", "/v1/models", **headers)[0] == 200


def test_a_web_page_of_another_origin_gets_nothing(ready: dict[str, Any]) -> None:
    for origin in ("http://evil", "null", "http://localhost:3000", "http://[", "", "x"):
        body = json.dumps({"messages": FRANCE, "max_tokens": 1}).encode()
        status, headers, _ = asked(ready, "POST", "/v1/chat/completions", body, Origin=origin)
        assert status == 403
        assert "access-control-allow-origin" not in headers
    status, headers, _ = asked(ready, "OPTIONS", "/v1/chat/completions", Origin="http://evil")
    assert status == 501
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "path", ["/", "/props", "/slots", "/metrics", "/tokenize", "/lora-adapters", "/cors-proxy", "x"]
)
def test_nothing_but_the_api_is_there(ready: dict[str, Any], path: str) -> None:
    assert asked(ready, "GET", path)[0] == 404
    assert asked(ready, "POST", path, b"{}")[0] == 404


def test_a_request_that_is_no_request_is_refused(ready: dict[str, Any]) -> None:
    chat = "/v1/chat/completions"
    assert asked(ready, "GET", chat)[0] == 405
    assert asked(ready, "POST", chat, b"{")[0] in (400, 500)
    assert asked(ready, "POST", chat, **{"Content-Length": "99999999999"})[0] == 413
    assert asked(ready, "POST", chat, **{"Content-Length": "-1"})[0] == 411
    assert asked(ready, "POST", chat, **{"Transfer-Encoding": "chunked"})[0] == 411
    assert asked(ready, "GET", "/health")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_does_not_hold_up_the_next(
    ready: dict[str, Any], stream: bool
) -> None:
    port = int(ready["url"].split(":")[2].partition("/")[0])
    story = [{"role": "user", "content": "Tell me a very long story about the sea."}]
    body = json.dumps({"messages": story, "stream": stream, "ignore_eos": True})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", port)) as gone:
        gone.sendall(f"{head}\r\n\r\n{body}".encode())
        time.sleep(0.5)
    begin = time.monotonic()
    with client(ready) as opened:
        opened.chat.completions.create(model="x", messages=FRANCE, max_tokens=1)
    assert time.monotonic() - begin < 4  # the story alone takes longer


def raw(ready: dict[str, Any], *parts: bytes, ends: bool = False) -> bytes:
    """All that comes back for these bytes; `ends` says that no more are sent."""
    port = int(ready["url"].split(":")[2].partition("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def post(body: bytes, length: int, version: str = "HTTP/1.1") -> bytes:
    head = f"POST /v1/chat/completions {version}\r\nHost: localhost\r\nContent-Length: {length}"
    return f"{head}\r\n\r\n".encode() + body


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_sends_no_more_gets_its_answer(
    ready: dict[str, Any], stream: bool, version: str
) -> None:
    asks = {"messages": FRANCE, "max_tokens": 8, "temperature": 0, "stream": stream}
    body = json.dumps(asks).encode()
    answer = raw(ready, post(body, len(body), version), ends=True)
    assert b"HTTP/1.1 200 OK" in answer
    assert b"Paris" in answer


def test_a_body_that_ends_too_early_is_refused(ready: dict[str, Any]) -> None:
    answer = raw(ready, post(b'{"messages"', 100), ends=True)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"ended after 11 of 100 bytes" in answer


def test_too_many_connections_are_told_to_come_again(ready: dict[str, Any]) -> None:
    port = int(ready["url"].split(":")[2].partition("/")[0])
    with ExitStack() as stack:
        for _ in range(serve.CONNECTIONS_MAX):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        status, headers, _ = asked(ready, "GET", "/health")
        assert (status, headers["retry-after"]) == (503, "1")
    end = time.monotonic() + 20
    while asked(ready, "GET", "/health")[0] != 200:
        assert time.monotonic() < end


def test_a_request_that_drips_is_cut_off_in_time() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor() as pool:

        def drip() -> None:
            for _ in range(20):
                theirs.send(b"x")
                time.sleep(0.05)

        pool.submit(drip)
        with pytest.raises(TimeoutError):
            serve._InTime(ours, 0.3).readall()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_it_ends_with_exit_code_0_and_leaves_nothing_behind(
    smollm2_gguf: Path, tmp_path: Path, name: str
) -> None:
    with serving(recipe_of(tmp_path, smollm2_gguf)) as found:
        process = found["process"]
        assert found["pid"] == process.pid
        (child,) = children(process.pid)
        process.send_signal(getattr(signal, name))
        assert process.wait(20) == 0
        assert is_gone(child)


def test_the_model_ends_with_a_killed_server(smollm2_gguf: Path, tmp_path: Path) -> None:
    with serving(recipe_of(tmp_path, smollm2_gguf)) as found:
        (child,) = children(found["pid"])
        found["process"].kill()
        assert is_gone(child)


def test_a_model_that_dies_ends_the_server_with_a_sentence(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    with serving(recipe_of(tmp_path, smollm2_gguf)) as found:
        (child,) = children(found["pid"])
        os.kill(child, signal.SIGKILL)
        rest, _ = found["process"].communicate(timeout=20)
        assert found["process"].returncode == 1
        assert "llama.cpp ended with exit code -9" in json.loads(rest)["error"]


def test_a_port_that_is_taken_is_a_sentence(smollm2_gguf: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        recipe = recipe_of(tmp_path, smollm2_gguf)
        done = run("serve", recipe, "--base", "--port", str(port))
    assert done.returncode == 3
    assert done.stderr == (
        f"runner: port {port} of 127.0.0.1 is taken\n  give another with --port\n"
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_not_let_in_without_a_key(
    smollm2_gguf: Path, tmp_path: Path, host: str
) -> None:
    done = run("serve", recipe_of(tmp_path, smollm2_gguf), "--base", "--host", host)
    assert done.returncode == 2
    assert f"--host {host} can be reached from other machines" in done.stderr


def test_a_host_that_is_no_name_is_a_sentence() -> None:
    with pytest.raises(RecipeError, match="is no address"):
        serve.address("no host\x1b", 0)


@pytest.mark.parametrize("text", ["", "\n \n", "two words", "\x1b"])
def test_a_file_without_a_key_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(RecipeError):
        serve.read_keys(tmp_path / "keys")


def test_a_recipe_that_exported_nothing_is_told_what_to_do(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    done = run("serve", recipe_of(tmp_path, smollm2_gguf))
    assert done.returncode == PreconditionError.exit_code
    assert "has no stage export" in done.stderr
