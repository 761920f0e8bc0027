"""What the remote cache of a workspace knows, asked only for what is not here.

A cache must never be the reason why a night of training is lost: one that cannot be reached is left
alone for the rest of the run, with one warning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from runner.engine import facts, log
from runner.engine.facts import Made
from runner.engine.workspace import SETTINGS
from runner.errors import PreconditionError

if TYPE_CHECKING:
    from runner.engine.remote import Remote

Answer = TypeVar("Answer")


class Elsewhere:
    """The remote cache, or its absence."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._left_alone = False
        self._refused: set[str] = set()
        self.warn: Callable[[str], None] = log.warning

    @property
    def name(self) -> str:
        from runner.engine import remote

        return f"the remote cache {remote.named(self._url or '')}"

    @property
    def is_there(self) -> bool:
        return self._remote is not None and not self._left_alone

    def of_key(self, stage_key: str) -> list[Made]:
        """All that was made with this key, newest first."""
        nothing: dict[str, bytes] = {}
        found = self._asked(lambda remote: remote.facts(stage_key), nothing)
        made = []
        for output, data in found.items():
            try:
                one = facts.parsed(data)
            except ValueError as error:
                self.warn(f"{self.name}: {error}")
                continue
            if (one.key, one.output) == (stage_key, output):
                made.append(one)
        return sorted(made, key=lambda made: -made.made_at)

    def holds(self, output: str) -> bool:
        return output not in self._refused and self._asked(lambda r: r.holds(output), False)

    def fetch(self, output: str, folder: Path) -> bool:
        """Fills the empty folder with the artifact; False where that failed, which is said.

        Raises PreconditionError where it does not fit on the disk: made anew, it would not either.
        """
        if self._remote is None:
            return False
        from runner.engine.remote import DamagedRemote, RemoteError

        try:
            self._remote.fetch(output, folder)
            return True
        except RemoteError as error:
            self._refused.add(output)
            self._left_alone = not isinstance(error, DamagedRemote)
            self.warn(f"{error.message}; it is made anew")
            return False

    def keep(self, made: Made, folder: Path, *, thorough: bool = False) -> None:
        """Copies an artifact there, and then the fact; nothing where that is there already.

        A copy that was found damaged is replaced; `thorough` looks for one whose sizes are wrong.
        """
        if self._remote is None or self._left_alone:
            return
        from runner.engine.remote import DamagedRemote

        def upload(remote: Remote) -> None:
            known = made.output in remote.facts(made.key)
            anew = made.output in self._refused or (
                thorough and remote.holds(made.output) and not remote.is_complete(made.output)
            )
            if anew or not known:
                remote.upload(made.output, folder, anew=anew)
                remote.publish(made.key, made.output, facts.as_json(made))
                self._refused.discard(made.output)

        try:
            self._asked(upload, None)
        except DamagedRemote as error:
            self.warn(f"{error.message}; it is not uploaded")

    def _asked(self, question: Callable[[Remote], Answer], nothing: Answer) -> Answer:
        """What the remote says; `nothing`, with one warning, from when on it cannot be used."""
        if self._remote is None or self._left_alone:
            return nothing
        from runner.engine.remote import DamagedRemote

        try:
            return question(self._remote)
        except DamagedRemote:
            raise  # a fault of one artifact
        except PreconditionError as error:
            self._left_alone = True
            self.warn(f"{error.message}; going on without it")
            return nothing

    @cached_property
    def _url(self) -> str | None:
        if not (self._root / SETTINGS).exists():
            return None
        from runner.engine import settings

        return settings.read(self._root).remote

    @cached_property
    def _remote(self) -> Remote | None:
        if self._url is None:
            return None
        from runner.engine import remote

        try:
            return remote.opened(self._url, self._root)
        except remote.RemoteError as error:
            self.warn(f"{error}; going on without it")
            return None
