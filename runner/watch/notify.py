"""Tells somebody that a run has ended: a notice on the desktop, a POST to the recipe's webhook.

Nothing is sent anywhere else; no redirect is followed, so nothing goes to a host that the recipe
does not name. A notice that does not arrive is a warning.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 10.0

SCRIPT = (
    "on run argv",
    'display notification (item 2 of argv) with title "runner" subtitle (item 1 of argv)',
    "end run",
)


def start(
    settings: Mapping[str, Any], notice: Mapping[str, Any], warn: Callable[[str], None]
) -> threading.Thread | None:
    """Sends the notice to whom `notify:` names, beside what goes on; None where that is nobody."""
    if not settings.get("webhook") and not settings.get("desktop"):
        return None

    def send() -> None:
        if settings.get("webhook"):
            problem = posted(settings["webhook"], notice)
            if problem:
                warn(f"the webhook at {urlsplit(settings['webhook']).hostname}: {problem}")
        if settings.get("desktop") and (problem := shown(notice)):
            warn(f"the notice on the desktop: {problem}")

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def posted(url: str, notice: Mapping[str, Any], timeout_s: float = TIMEOUT_S) -> str:
    """Sends the notice as JSON; what went wrong, or nothing."""
    import http.client

    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
        try:
            body = json.dumps(notice, ensure_ascii=False).encode()
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            status = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    if 300 <= status < 400:
        return f"it answered {status}, and redirects are not followed"
    return "" if status < 300 else f"it answered {status}"


def shown(notice: Mapping[str, Any]) -> str:
    """Shows the notice on the desktop; what went wrong, or nothing."""
    title, text = f"{notice['recipe']}: {notice['state']}", str(notice["text"])
    if sys.platform == "darwin":
        lines = (part for line in SCRIPT for part in ("-e", line))
        command = ["osascript", *lines, title, text]
    elif sys.platform != "win32" and shutil.which("notify-send"):
        command = ["notify-send", "--app-name=runner", "--", title, text]
    else:
        return "there is no notify-send here; a webhook works everywhere"
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
    return said or f"exit code {done.returncode}" if done.returncode else ""
