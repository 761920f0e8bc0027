"""The child process that opens llama.cpp's own HTTP server for a GGUF model.

Run as a file, so it imports nothing of the runner. In: one JSON line {"path", "context", "threads",
"name", "key"}. Out: {"port": …} when the model answers there, on the loopback address, to those who
have the key. It ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import xllamacpp


def main() -> None:
    # llama.cpp may write to standard output; the answer keeps a descriptor of its own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        server = _server(**json.loads(sys.stdin.readline()))
    except RuntimeError as error:
        sys.exit(str(error))  # llama.cpp's reason is in the log before it
    port = int(server.listening_address.rpartition(":")[2])
    answers.write(json.dumps({"port": port}) + "\n")
    answers.flush()
    sys.stdin.read()
    os._exit(0)  # the parent is gone or done; llama.cpp has nothing to save


def _server(path: str, context: int, threads: int, name: str, key: str) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.model_alias = {name}
    params.n_ctx = context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel = 1
    params.cache_ram_mib = 0
    params.fit_params = False
    params.warmup = False
    params.verbosity = 1  # errors alone
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [key]
    params.cors_origins = ""
    params.cors_credentials = False
    params.ui = params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
