"""Talks to a GGUF file in llama.cpp.

In a child process: a foreign file that breaks the library, its log on the terminal and the signal
handlers it installs stay there. The file's header is checked before the library sees it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runner.errors import PreconditionError, RunnerError
from runner.model import gguf_header

# Half of the logical cores: llama.cpp's threads wait for one another by spinning, and one that
# shares its core with another program holds up all the others (measured: 49 tokens a second down
# to 1, with two threads on two busy cores).
THREADS = max(1, (os.cpu_count() or 1) // 2)

_PROCESS = Path(__file__).with_name("llama_process.py")


@dataclass(frozen=True)
class Continued:
    """What a model goes on with after some ids, and what was likely to come first."""

    ids: tuple[int, ...]
    """The likeliest token each time, with the one that ended it."""
    ended: bool
    """Whether llama.cpp took the last of them as the end."""
    likeliest: tuple[int, ...]
    """The likeliest first tokens, best first."""
    logprobs: tuple[float, ...]
    """Of these, in nats, over the whole vocabulary; NaN where the model's numbers are none."""


class Llama:
    """A GGUF model, ready to reply; close it, or use it in a `with`.

    The KV cache stays between replies: only what is new in the messages is read again.
    """

    def __init__(self, path: Path, *, context: int = 4096, threads: int = THREADS) -> None:
        header = gguf_header.read(path)
        if header.text("general.architecture") is None or not header.tensors:
            raise PreconditionError(
                f"{path}: a GGUF file without a model in it", hint="give the path of a model"
            )
        self._path = path
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        self._child = subprocess.Popen(
            # -P: the folder of the file would offer its modules as top-level ones
            [sys.executable, "-P", str(_PROCESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the parent, which ends the child
        )
        self._replying = False
        try:
            self._send({"path": str(path.resolve()), "context": context, "threads": threads})
            self._answer()
        except BaseException:
            self.close()
            raise

    def reply(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int, temperature: float = 0.0
    ) -> Generator[str, None, None]:
        """The reply to `[{"role", "content"}, …]`, in pieces as they come; at temperature 0 always
        the likeliest token. Stop iterating (or close the iterator) to end it early."""
        if self._replying:
            raise RuntimeError("one reply at a time: the one before is not at its end")
        self._replying = True
        finished = False
        try:
            asked = {"max_tokens": max_tokens, "temperature": temperature}
            self._send({"messages": [dict(message) for message in messages], **asked})
            while "piece" in (answer := self._answer()):
                yield answer["piece"]
            finished = True
        except RunnerError:
            finished = True
            raise
        finally:
            if not finished and self._child.poll() is None:
                self._send({"cancel": True})
                while "piece" in self._answer():
                    pass
            self._replying = False

    def continued(self, ids: Sequence[int], *, max_tokens: int, likeliest: int) -> Continued:
        """How the model goes on after these ids, which are read as they are: no chat template, and
        no token put before them. What they share with the request before is not read again."""
        asked = {"tokens": list(ids), "max_tokens": max_tokens, "likeliest": likeliest}
        found = self._asked(asked)
        return Continued(
            tuple(found["tokens"]),
            found["ended"],
            tuple(found["likeliest"]),
            tuple(math.nan if logprob is None else logprob for logprob in found["logprobs"]),
        )

    def tokenised(self, text: str) -> list[int]:
        """The ids of a text in which control tokens may stand, and none put before it."""
        ids: list[int] = self._asked({"text": text})["tokens"]
        return ids

    def opened(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]]:
        """What the model is shown of a chat before it replies: the text that the chat template in
        the file makes of it, and its ids."""
        found = self._asked({"chat": [dict(message) for message in messages]})
        return found["text"], found["tokens"]

    def close(self) -> None:
        """Ends the child; a closed model may be closed again."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._log):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # a request that the child never read
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _asked(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._replying:
            raise RuntimeError("a reply is not at its end")
        self._send(request)
        return self._answer()

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RunnerError(
                f"{self._path}: llama.cpp refuses: {answer['error']}",
                hint="give it fewer or shorter messages, or a larger context",
            )
        return answer

    def _ended(self) -> RunnerError:
        self._log.seek(0)
        log = self._log.read().decode(errors="replace").splitlines()
        last = [line for line in log if line.strip()][-5:]
        return RunnerError(
            f"{self._path}: llama.cpp ended with exit code {self._child.wait()}",
            hint="\n  ".join(["it said last:", *last]) if last else "",
        )
