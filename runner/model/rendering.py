"""Renders a chat template in jinja's sandbox, within limits on its time, its memory and its text.

A template is a program by somebody else, and none can hang or flood the machine.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template

from runner.errors import RunnerError

if sys.platform != "win32":
    import resource

MAX_S = 1.0
"""Seconds of computing that one rendering may take."""
MAX_CHARS = 4_000_000
"""Characters that a template may write beside the contents."""
MAX_BYTES = 2**28
"""Memory that one rendering may take, beside what the contents need."""


def compiled(chat_template: str) -> jinja2.Template:
    """In jinja's immutable sandbox. Compiling is limited too: it computes what is constant."""
    try:
        with _limited(len(chat_template)):
            template: jinja2.Template = _compile_jinja_template(chat_template)
            return template
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f" at line {line}" if line else ""
        raise RunnerError(
            f"the chat template cannot be read{where}: {error}",
            hint="get the model's tokenizer files again, or put a chat_template.jinja beside them",
        ) from error


def rendered(
    template: jinja2.Template,
    messages: Sequence[Mapping[str, str]],
    *,
    opened: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """What the template makes of the messages; `opened` ends it with the generation prompt."""
    chars = sum(len(message["content"]) for message in messages)
    with _limited(chars):
        text: str = template.render(
            messages=[{"role": m["role"], "content": m["content"]} for m in messages],
            tools=None,
            documents=None,
            add_generation_prompt=opened,
            strftime_now=_fixed_day,
            **special_tokens,
        )
    if len(text) - chars > MAX_CHARS:
        raise _beyond(f"writes {len(text) - chars:,} characters beside the contents")
    return text


@contextmanager
def _limited(chars: int) -> Iterator[None]:
    """Ends a rendering that takes too much time or memory, and names what breaks inside it.

    A timer of the process and not a child: each rendering has to be watched, since a template can
    wait for a certain content, and a child for each would cost more than all of the encoding.
    Python runs signal handlers between its instructions and inside long arithmetic and searches,
    and the one thing that can keep it longer, a large allocation, is what the limit on memory
    forbids. The price: both hold in the main thread alone, where stages run; the timer not on
    Windows, and the limit on memory only on Linux. What counts is the thread's own computing and
    not the time on the wall, so that a busy or sleeping machine breaks nothing.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        with _named():
            yield
        return
    started = time.thread_time()

    def look(*_: object) -> None:
        if time.thread_time() - started > MAX_S:
            raise _OutOfTime

    before = signal.signal(signal.SIGALRM, look)
    timer = signal.getitimer(signal.ITIMER_REAL)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if sys.platform == "linux":
            most = _address_space() + MAX_BYTES + 32 * chars
            bounds = [bound for bound in limits if bound != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min([most, *bounds]), limits[1]))
        signal.setitimer(signal.ITIMER_REAL, MAX_S, MAX_S / 10)
        with _named():
            yield
    except _OutOfTime:
        raise _beyond(f"takes more than {MAX_S:g} s for one conversation") from None
    except MemoryError:
        raise _beyond(f"takes more than {MAX_BYTES // 2**20} MB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, *timer)


class _OutOfTime(BaseException):
    """Not an Exception, so that nothing between the alarm and `_limited` takes it for its own."""


@contextmanager
def _named() -> Iterator[None]:
    """Whatever goes wrong inside a template is an error of the template."""
    try:
        yield
    except (jinja2.TemplateError, MemoryError):
        raise
    except Exception as error:
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error


def _address_space() -> int:
    """Bytes of memory that the process has mapped."""
    pages = int(os.pread(_own_memory(), 64, 0).split()[0])
    return pages * resource.getpagesize()


@lru_cache(maxsize=1)
def _own_memory() -> int:
    return os.open("/proc/self/statm", os.O_RDONLY)


def _beyond(what: str) -> RunnerError:
    return RunnerError(
        f"the chat template {what}",
        hint="no honest template does; do not trust this model, or use another template",
    )


def _fixed_day(form: str) -> str:
    """The day that Llama's templates fall back to; with today's, no run could be repeated."""
    return datetime(2024, 7, 26).strftime(form)
