"""The key of a stage: one hash over all that decides its output, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

SCHEMA = 1
"""Raised when keys are computed another way, which makes every stage run again."""

Components = dict[str, Any]


def components(
    *,
    kind: str,
    version: int,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    sources: str | None,
    base_model: str | None,
    seed: int | None,
    env: str | None = None,
    parent: str | None = None,
    replay: float | None = None,
) -> Components:
    """What decides an output: plain data, without the parts that a stage does not have.

    `settings` holds only values other than the default, so that a setting added later changes no
    key; `inputs` the content hashes of the artifacts read; `sources` the hash of the manifest of
    source files; `base_model` the hash of its files, or hub id and commit; `env` that of library
    versions and GPU, for stages that are to run again when these change; `parent` the content hash
    of the model that a training goes on from, which then sees the share `replay` of old data again.
    """
    found: Components = {
        "kind": kind,
        "version": version,
        "settings": dict(settings),
        "inputs": dict(inputs),
        "sources": sources,
        "base_model": base_model,
        "seed": seed,
        "env": env,
        "parent": parent,
        "replay": replay,
    }
    return {name: value for name, value in found.items() if value not in (None, {})}


def of(parts: Components) -> str:
    """The key, 64 hex digits."""
    return _sha256({"schema": SCHEMA, **parts})


def of_files(hashes: Iterable[tuple[str, str]]) -> str:
    """One hash for a set of files given as (name, SHA-256), whatever their order."""
    return _sha256_of(json.dumps([[n, sha256] for n, sha256 in sorted(hashes)], **_CANONICAL))


def canonical(value: Any) -> str:
    """One spelling for equal data: keys sorted; 1 and 1.0 and "1" kept apart, and so are texts that
    only look alike, because stages see the difference."""
    return json.dumps(value, **_CANONICAL)


_CANONICAL: dict[str, Any] = {
    "sort_keys": True,
    "ensure_ascii": True,
    "separators": (",", ":"),
    "allow_nan": False,
}


def _sha256(value: Any) -> str:
    return _sha256_of(canonical(value))


def _sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
