"""The child process that holds a GGUF model: JSON lines in, JSON lines out.

Run as a file, so it imports nothing of the runner. In: {"path", "context", "threads"} first, then
{"messages", "max_tokens", "temperature"} for each reply, and {"cancel": true} to end one early.
Out: {"ready": true}; for each reply {"piece"} as often as there is text, then {"done": true} or
{"error"}.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
from queue import SimpleQueue
from typing import Any, TextIO

import xllamacpp


def main() -> None:
    # llama.cpp may write to standard output; the answers keep a descriptor of their own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    requests: SimpleQueue[dict[str, Any]] = SimpleQueue()
    cancelled = threading.Event()
    threading.Thread(target=_read, args=(requests, cancelled), daemon=True).start()
    try:
        server = _server(**requests.get())
    except RuntimeError as error:
        sys.exit(str(error))  # llama.cpp's reason is in the log before it
    _answer(answers, {"ready": True})
    while True:
        request = requests.get()
        cancelled.clear()
        _answer(answers, _replied(server, request, answers, cancelled))


def _server(path: str, context: int, threads: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel = 1
    params.cache_ram_mib = 0  # one conversation: its own KV cache is enough
    params.fit_params = False
    params.warmup = False
    params.verbosity = 1  # errors alone
    params.force_pure_content_parser = True  # thoughts and tool calls are text like any other
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    # The library always opens an HTTP port on the loopback address. Nobody has its key.
    params.api_keys = [secrets.token_urlsafe(32)]
    params.ui = params.endpoint_slots = params.endpoint_props = False
    return xllamacpp.Server(params)


def _replied(
    server: Any, request: dict[str, Any], answers: TextIO, cancelled: threading.Event
) -> dict[str, Any]:
    """Streams a reply; what is returned ends it."""
    errors: list[str] = []

    def hear(event: dict[str, Any]) -> bool:
        if "error" in event:
            errors.append(event["error"]["message"])
        for choice in event.get("choices", ()):
            if piece := choice["delta"].get("content"):
                _answer(answers, {"piece": piece})
        return cancelled.is_set()

    try:
        server.handle_chat_completions(request | {"stream": True}, hear)
    except ValueError as error:  # what the library raises for a request it does not understand
        errors.append(str(error))
    return {"error": errors[0]} if errors else {"done": True}


def _read(requests: SimpleQueue[dict[str, Any]], cancelled: threading.Event) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("cancel"):
            cancelled.set()
        else:
            requests.put(request)
    os._exit(0)  # the parent is gone or done; llama.cpp has nothing to save


def _answer(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
