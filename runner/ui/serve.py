"""The exported model, or its base, for other programs: an OpenAI-compatible endpoint.

llama.cpp's own server answers, in a child process behind a port and a key that nobody else knows.
What other programs talk to is a gate before it that passes on a few paths alone: by itself that
server lets every web page read its replies, answers to any `Host:` (so that a page can take on its
address by DNS), and shows the path of the model at /props.
"""

from __future__ import annotations

import errno
import hmac
import io
import ipaddress
import json
import os
import secrets
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from runner.engine.words import shown
from runner.errors import PreconditionError, RecipeError, RunnerError
from runner.model import gguf_header
from runner.model.llama import THREADS

PATHS = {
    "/health": "GET",
    "/v1/models": "GET",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/responses": "POST",
}
BODY_MAX = 16 << 20
"""Bytes of a request."""
IDLE_S = 60
"""A connection that sends nothing for so long is closed."""
REQUEST_S = 120
"""So long may a request take to come, from its first byte to its last."""
CONNECTIONS_MAX = 64
"""At once; what comes while so many wait for their answers is told to come again."""
GONE_POLL_S = 0.2
"""How often a client that sends no more is asked whether it still listens."""

_CHILD = Path(gguf_header.__file__).with_name("llama_server.py")


@dataclass(frozen=True)
class Address:
    """Where to listen, as sockets want it."""

    family: socket.AddressFamily
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback


def serve(
    path: Path, name: str, host: str, port: int, keys: Sequence[str], context: int, as_json: bool
) -> None:
    """Answers until ctrl-C or SIGTERM."""
    where = address(host, port)
    if not (where.is_loopback or keys):
        raise RecipeError(
            f"--host {host} can be reached from other machines, and there is no API key",
            hint="give --api-key-file FILE with a key of your own in it",
        )
    _check(path)
    secret = secrets.token_urlsafe(32)
    with (
        _listening(where) as gate,
        tempfile.TemporaryFile() as log,
        _model(path, name, context, secret, log) as child,
    ):
        gate.keys, gate.upstream_key = tuple(keys), secret
        gate.upstream_port = _port(child, path, log)
        ended = threading.Thread(target=child.wait, daemon=True)
        ended.start()
        threading.Thread(target=gate.serve_forever, daemon=True).start()
        try:
            _announce(_url(host, gate.server_address[1]), name, bool(keys), as_json)
            while ended.is_alive():
                ended.join(1)
        except KeyboardInterrupt:
            return
        finally:
            gate.shutdown()
        raise _died(child, path, log)


def address(host: str, port: int) -> Address:
    """What the name stands for; raises RecipeError where it is none of this machine's."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RecipeError(
            f"--host {shown(host)} is no address: {error}", hint="127.0.0.1 is this machine alone"
        ) from None
    addresses = [Address(family, str(place[0]), port) for family, _, _, _, place in found]
    return next((one for one in addresses if not one.is_loopback), addresses[0])


def read_keys(file: Path | None) -> list[str]:
    """The keys in a file, one a line."""
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise RecipeError(f"{file} is not text", hint="write one key a line") from None
    keys = [line.strip() for line in lines if line.strip()]
    for key in keys:
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise RecipeError(
                f"{file} has a key that cannot stand in a header", hint="use letters and digits"
            )
    if not keys:
        raise RecipeError(f"{file} has no key in it", hint="write one key a line")
    return keys


def _check(path: Path) -> None:
    """The file's header, before llama.cpp sees it."""
    header = gguf_header.read(path)
    if header.text("general.architecture") is None or not header.tensors:
        raise PreconditionError(
            f"{path}: a GGUF file without a model in it", hint="give the path of a model"
        )


def _announce(url: str, name: str, asks_key: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"url": url, "model": name, "pid": os.getpid()}), flush=True)
        return
    key = "the key in your file" if asks_key else "none"
    print(f"{shown(name)} answers at {url} until ctrl-C; for example, in Python:")
    print("  from openai import OpenAI")
    print(f'  client = OpenAI(base_url="{url}", api_key="{key}")')
    said = f'model={json.dumps(name)}, messages=[{{"role": "user", "content": "Hello"}}]'
    call = f"client.chat.completions.create({said})"
    print(f"  print({call}.choices[0].message.content)", flush=True)


def _url(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::", ""):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


class Gate(ThreadingHTTPServer):
    """Listens; its handlers ask the server behind it."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = sys.platform != "win32"  # there it would share a port that is taken
    request_queue_size = 128
    keys: tuple[str, ...] = ()
    upstream_port = 0
    upstream_key = ""

    def __init__(self, where: Address) -> None:
        self.address_family = where.family
        self._free = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._turned_away: deque[socket.socket] = deque()
        super().__init__((where.host, where.port), Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for the name of this machine, which nobody needs
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Has a thread answer, where not too many do already."""
        if not self._free.acquire(blocking=False):
            return self._turn_away(request)
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def server_close(self) -> None:
        super().server_close()
        while self._turned_away:
            self._turned_away.popleft().close()

    def _turn_away(self, client: socket.socket) -> None:
        """Says to come again later; the oldest that was told so is closed for it.

        A socket that is closed before its request was read takes the answer with it.
        """
        body = _error(503, f"{CONNECTIONS_MAX} requests are being answered; try again later")
        head = (
            "HTTP/1.1 503 Service Unavailable",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Retry-After: 1",
            "Connection: close",
        )
        with suppress(OSError):
            client.settimeout(0)
            client.sendall("\r\n".join((*head, "", "")).encode() + body)
            client.shutdown(socket.SHUT_WR)
        self._turned_away.append(client)
        if len(self._turned_away) > CONNECTIONS_MAX:
            self._turned_away.popleft().close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error worth a word."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request: refused with a reason, or passed on, and its answer given back as it comes."""

    server: Gate
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    server_version, sys_version = "runner", ""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_InTime(self.connection, REQUEST_S))

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answered(self) -> None:
        self.close_connection = True  # what follows a refused request may be its body
        refused = self._refused()
        if refused:
            return self._refuse(*refused)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            return self._refuse(400, f"the request ended after {len(body):,} of {length:,} bytes")
        try:
            upstream = socket.create_connection(("127.0.0.1", self.server.upstream_port))
        except OSError:
            return self._refuse(502, "the model has ended")
        with upstream:
            upstream.sendall(self._head(len(body)) + body)
            _relay(upstream, self.connection, can_probe=self.request_version == "HTTP/1.1")
        return None

    do_GET = do_POST = _answered  # noqa: N815 (http.server looks them up by these names)

    def _refused(self) -> tuple[int, str] | None:
        """Why the request is not passed on."""
        keys = self.server.keys
        origin = self.headers.get("Origin")
        if origin is not None and _host_of(origin) != self.headers.get("Host"):
            return 403, f"web pages of other origins are not answered, and this is {shown(origin)}"
        if not keys and not _is_local_name(self.headers.get("Host", "")):
            host = shown(self.headers.get("Host", ""))
            return 403, f"Host is {host}: without an API key only localhost is answered"
        path = self.path.partition("?")[0]
        if path not in PATHS:
            return 404, f"there is no {shown(path)}; there is {', '.join(PATHS)}"
        if path != "/health" and keys and not self._has_key():
            return 401, "the API key is wrong or missing"
        if self.command != PATHS[path]:
            return 405, f"{path} takes {PATHS[path]}"
        length = self.headers.get("Content-Length", "0" if self.command == "GET" else "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            return 411, "the request must have a Content-Length"
        if len(length) > 12 or int(length) > BODY_MAX:
            return 413, f"the request is longer than {BODY_MAX:,} bytes"
        return None

    def _has_key(self) -> bool:
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        found = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in _keys(self)]
        return kind.lower() == "bearer" and any(found)

    def _head(self, length: int) -> bytes:
        lines = (
            f"{self.command} {self.path.partition('?')[0]} HTTP/1.1",
            f"Host: 127.0.0.1:{self.server.upstream_port}",
            f"Authorization: Bearer {self.server.upstream_key}",
            "Content-Type: application/json",
            f"Content-Length: {length}",
            "Connection: close",
        )
        return "\r\n".join((*lines, "", "")).encode()

    def _refuse(self, code: int, message: str) -> None:
        body = _error(code, message)
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


class _InTime(io.RawIOBase):
    """What a socket receives, until it is too late: a byte a minute would hold it for ever."""

    def __init__(self, client: socket.socket, seconds: float) -> None:
        self._client = client
        self._end = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._client.settimeout(min(IDLE_S, left))
        return self._client.recv_into(buffer)


def _error(code: int, message: str) -> bytes:
    """The body of an error, as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 404: "not_found_error"}
    kind = kinds.get(code, "server_error" if code >= 500 else "invalid_request_error")
    return json.dumps({"error": {"message": message, "type": kind, "code": code}}).encode()


def _host_of(origin: str) -> str | None:
    """Host and port of an origin; None where it has none, like `null`."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _keys(handler: Handler) -> tuple[str, ...]:
    return handler.server.keys


def _is_local_name(host: str) -> bool:
    """Whether a `Host:` is this machine's own name for itself, and none that DNS could give it."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _relay(upstream: socket.socket, client: socket.socket, *, can_probe: bool) -> None:
    """Gives the answer back as it comes; llama.cpp stops where the client has gone away.

    The end of what a client sends looks the same whether it has gone or still listens. Where
    nothing was given back yet, an interim answer, which every client of HTTP/1.1 passes over,
    tells: whoever has gone refuses it (RFC 9110, section 15.2).
    """
    client.settimeout(IDLE_S)
    has_begun = is_at_end = False
    with selectors.DefaultSelector() as watched:
        watched.register(upstream, selectors.EVENT_READ)
        watched.register(client, selectors.EVENT_READ)
        while True:
            ready = [one.fileobj for one, _ in watched.select(GONE_POLL_S if is_at_end else None)]
            if client in ready:
                is_at_end = not client.recv(1, socket.MSG_PEEK)
                watched.unregister(client)  # what it sends more is not asked for
                if is_at_end and can_probe and not has_begun:
                    client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            if is_at_end and client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return
            if upstream in ready:
                data = upstream.recv(1 << 16)
                if not data:
                    return
                has_begun = True
                client.sendall(data)


@contextmanager
def _listening(where: Address) -> Iterator[Gate]:
    try:
        gate = Gate(where)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", None)):
            raise PreconditionError(
                f"port {where.port} of {where.host} is taken", hint="give another with --port"
            ) from None
        raise PreconditionError(
            f"{where.host} port {where.port}: {error.strerror or error}",
            hint="give a port from 1024 up, and an address that this machine has",
        ) from None
    with gate:
        yield gate


@contextmanager
def _model(
    path: Path, name: str, context: int, key: str, log: IO[bytes]
) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        # -P: the folder of the file would offer its modules as top-level ones
        [sys.executable, "-P", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C is for the parent, which ends the child
    )
    try:
        asked = {"path": str(path.resolve()), "name": name, "key": key}
        assert child.stdin is not None
        with suppress(BrokenPipeError):  # what it said at its end is asked for next
            child.stdin.write(json.dumps({**asked, "context": context, "threads": THREADS}) + "\n")
            child.stdin.flush()
        yield child
    finally:
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()


def _port(child: subprocess.Popen[str], path: Path, log: IO[bytes]) -> int:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise _died(child, path, log)
    return int(json.loads(line)["port"])


def _died(child: subprocess.Popen[str], path: Path, log: IO[bytes]) -> RunnerError:
    log.seek(0)
    said = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return RunnerError(
        f"{path}: llama.cpp ended with exit code {child.wait()}",
        hint="\n  ".join(["it said last:", *said[-5:]]) if said else "",
    )
