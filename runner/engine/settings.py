"""The settings of a workspace, which hold for all its recipes: `runner.yaml` at its root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError, field_validator

from runner.engine import remote, yaml12
from runner.engine.words import did_you_mean, shown
from runner.errors import RecipeError
from runner.stages.stage import Settings

NAME = "runner.yaml"


class WorkspaceSettings(Settings):
    """What holds for every recipe of a workspace; none of it decides what comes out."""

    remote: str | None = None
    """Where artifacts are shared with other machines: a folder, s3://…, gs://… or ssh://…."""

    @field_validator("remote")
    @classmethod
    def _can_be_a_remote(cls, url: str | None) -> str | None:
        if url is not None and (why := remote.refusal(url)):
            raise ValueError(why)
        return url


def read(root: Path) -> WorkspaceSettings:
    """The settings of the workspace, each at its default where there is no file.

    Raises RecipeError with every mistake as `file:line: what; what to do`.
    """
    path = root / NAME
    try:
        with path.open("rb") as file:
            text = file.read(yaml12.BYTES_MAX + 1)  # one more than the loader takes
    except FileNotFoundError:
        return WorkspaceSettings()
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}", hint="mend that, or delete it"
        ) from error
    document = yaml12.load(text, name=str(path))
    data = {} if document.data is None else document.data
    if not isinstance(data, dict):
        raise RecipeError(f"{path}:1: it must hold settings, one `key: value` a line")
    try:
        return WorkspaceSettings.model_validate(data)
    except ValidationError as error:
        raise yaml12.YamlProblems(str(path), _found(error, document)) from None


def _found(error: ValidationError, document: yaml12.Document) -> list[tuple[int, str]]:
    """Each mistake with its line; quotes no value, which may hold a password."""
    found: list[tuple[int, str]] = []
    for finding in error.errors(include_url=False):
        place = finding["loc"][:1]
        line = document.key_lines.get(place, 1)
        found.append((line, _sentence(finding, str(place[0]))))
    return sorted(found)


def _sentence(finding: Any, setting: str) -> str:
    if finding["type"] == "extra_forbidden":
        known = WorkspaceSettings.model_fields
        near = did_you_mean(setting, known) or f"; there is {', '.join(known)}"
        return f"no setting named {shown(setting)} in the workspace{near}"
    if finding["type"] == "value_error":
        return f"{setting} {finding['ctx']['error']}"
    return f"{setting} must be a text"
