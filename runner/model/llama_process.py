"""The child process that holds a GGUF model: JSON lines in, JSON lines out.

Run as a file, so it imports nothing of the runner. In: {"path", "context", "threads"} first, then
any of

    {"messages", "max_tokens", "temperature"}   a reply; {"cancel": true} ends it early
    {"tokens", "max_tokens", "likeliest"}       the greedy tokens after these ids, and how likely
    {"text"}, {"chat": messages}                the ids of a text, of a chat with an open reply

Out: {"ready": true}; for a reply {"piece"} as often as there is text, then {"done": true}; else
{"tokens", "ended", "likeliest", "logprobs"} or {"tokens", "text"}. {"error"} in place of any.
"""

from __future__ import annotations

import http.client
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
        key = secrets.token_urlsafe(32)
        server = _server(**requests.get(), key=key)
    except RuntimeError as error:
        sys.exit(str(error))  # llama.cpp's reason is in the log before it
    _answer(answers, {"ready": True})
    while True:
        request = requests.get()
        cancelled.clear()
        if "messages" in request:
            _answer(answers, _replied(server, request, answers, cancelled))
        elif "tokens" in request:
            _answer(answers, _continued(server, key, **request))
        else:
            _answer(answers, _tokenised(server, key, **request))


def _server(path: str, context: int, threads: int, key: str) -> Any:
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
    # The library always opens an HTTP port on the loopback address. Nobody else has its key.
    params.api_keys = [key]
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


def _continued(
    server: Any, key: str, tokens: list[int], max_tokens: int, likeliest: int
) -> dict[str, Any]:
    """The greedy continuation of these ids, and what was likely to be its first token.

    The log probabilities are those of the model, over its whole vocabulary, before any sampler.
    """
    asked = {
        "prompt": tokens,
        "n_predict": max_tokens,
        "n_probs": likeliest,
        "temperature": 0.0,
        "cache_prompt": True,
        "return_tokens": True,
    }
    found = answer = _posted(server, key, "/completion", asked)
    if "error" in answer:
        return {"error": answer["error"]["message"]}
    steps = answer.get("completion_probabilities", [])
    if [step["id"] for step in steps[:1]] != answer["tokens"][:1]:
        # The server says nothing of a token that is a part of a letter. Another one is taken then:
        # the probabilities are not touched by this.
        other = {**asked, "n_predict": 1, "logit_bias": [[" a", 1000.0]]}
        found = _posted(server, key, "/completion", other)
    steps = found.get("completion_probabilities") or [{"top_logprobs": []}]
    first = steps[0]["top_logprobs"]
    return {
        "tokens": answer["tokens"],
        "ended": answer["stop_type"] == "eos",
        "likeliest": [entry["id"] for entry in first],
        "logprobs": [entry["logprob"] for entry in first],
    }


def _tokenised(
    server: Any, key: str, text: str = "", chat: list[dict[str, str]] | None = None
) -> dict[str, Any]:
    """The ids that llama.cpp makes of a text, or of a chat by the template in the file."""
    if chat is not None:
        opened = _posted(server, key, "/apply-template", {"messages": chat})
        if "error" in opened:
            return {"error": opened["error"]["message"]}
        text = opened["prompt"]
    asked = {"content": text, "add_special": chat is not None, "parse_special": True}
    found = _posted(server, key, "/tokenize", asked)
    if "error" in found:
        return {"error": found["error"]["message"]}
    return {"tokens": found["tokens"], "text": text}


def _posted(server: Any, key: str, path: str, body: dict[str, Any]) -> Any:
    """By the HTTP port: the library has no function for these, or one that leaves out the ids."""
    connection = http.client.HTTPConnection(server.listening_address.removeprefix("http://"))
    try:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


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
