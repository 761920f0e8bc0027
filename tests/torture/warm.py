"""A process that has imported everything and forks the runs to be hurt: 0.05 s each, not 0.5 s.

Standard input has a line of JSON a run: `call` ("module:function"), `args`, `out` (a prefix of the
files for what it prints). The answer is its process id; then it waits for the line `go`, so that
strace can attach; then comes its exit code. With `learn`, the modules it imported are imported
here, but nothing is ever run here: a fork has no threads and no caches of an earlier run.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

PR_SET_PTRACER = 0x59616D61
ANYBODY = ctypes.c_ulong(-1)
LIBC = ctypes.CDLL(None)


def main() -> None:
    while line := sys.stdin.buffer.readline():
        job = json.loads(line)
        hold, release = os.pipe()
        child = os.fork()
        if not child:
            os.close(release)
            _run(job, hold)
        os.close(hold)
        print(child, flush=True)
        sys.stdin.buffer.readline()
        with suppress(BrokenPipeError):
            os.write(release, b"!")
        os.close(release)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        learnt = Path(f"{job['out']}.modules")
        if learnt.exists():
            for name in learnt.read_text().split():
                with suppress(Exception):
                    importlib.import_module(name)
            learnt.unlink()


def runner(*arguments: str) -> int:
    """What `python -m runner` does with these arguments; its exit code."""
    sys.argv = ["runner", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        runpy.run_module("runner", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


def _run(job: dict[str, Any], hold: int) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as before Python starts
    LIBC.prctl(PR_SET_PTRACER, ANYBODY, 0, 0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{job['out']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.read(hold, 1)
    os.close(hold)
    code = 1
    try:
        module, function = job["call"].split(":")
        code = getattr(importlib.import_module(module), function)(*job["args"])
        sys.stdout.flush()
    except BaseException:
        with suppress(BaseException):
            traceback.print_exc()
            sys.stderr.flush()
    finally:
        if job.get("learn"):
            Path(f"{job['out']}.modules").write_text("\n".join(list(sys.modules)))
        os._exit(code)


if __name__ == "__main__":
    main()
