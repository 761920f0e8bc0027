"""The command line. Each command imports what it needs, so that `--help` is instant."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.arguments import parser
from runner.errors import (
    DriftError,
    InterruptedRun,
    PreconditionError,
    RecipeError,
    RunnerError,
    Stop,
)

if TYPE_CHECKING:
    from runner.chat.shapes import Shape
    from runner.engine.opened import Opened
    from runner.engine.plan import Choice
    from runner.engine.recipe import Step
    from runner.engine.release import Verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal has no letter for
    said = sys.argv[1:] if arguments is None else arguments
    options = parser(said[0] if said else "").parse_args(said)
    if options.debug:
        import logging

        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")
    try:
        _be_interruptible()
        code = _COMMANDS[options.name](options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except RunnerError as error:
        if options.debug:
            logging.getLogger("runner").exception("the error below was raised here")
        _report(error.message, error.hint, error.exit_code, as_json=options.json)
        return error.exit_code
    except ModuleNotFoundError as error:
        if options.debug or (error.name or "runner").startswith("runner"):
            raise
        what = f"this command needs the Python package {error.name}"
        code = PreconditionError.exit_code
        _report(what, "pip install 'runner[all]'", code, as_json=options.json)
        return code
    except KeyboardInterrupt:
        _report("interrupted", "", InterruptedRun.exit_code, as_json=options.json)
        return InterruptedRun.exit_code
    except BrokenPipeError:
        # The reader (`head`, say) has what it wanted; Python must not complain when it exits. What
        # answers with its exit code has not answered yet.
        _mute()
        return 1 if options.name in ("plan", "verify") else 0
    except OSError as error:
        if options.debug:
            raise
        from runner import disk

        full = disk.full(error, Path(error.filename or "."))
        if full is not None:
            _report(full.message, full.hint, full.exit_code, as_json=options.json)
            return full.exit_code
        place = error.filename2 or error.filename  # of two names, the one that was to be made
        where = f": {place}" if place is not None else ""
        what = f"{error.strerror or error}{where}"
        hint = "check that it is there, and that you may read it, or write to it"
        _report(what, hint, PreconditionError.exit_code, as_json=options.json)
        return PreconditionError.exit_code
    except Exception as error:
        if _asked_to_stop:  # a library has made an error of its own of the interrupt
            _report("interrupted", "", InterruptedRun.exit_code, as_json=options.json)
            return InterruptedRun.exit_code
        if options.debug:
            raise
        what = f"a bug in runner: {type(error).__name__}: {error}"
        hint = "run the same command with --debug and report what it prints"
        _report(what, hint, 1, as_json=options.json)
        return 1


def _report(message: str, hint: str, exit_code: int, *, as_json: bool) -> None:
    from runner.engine.words import escaped

    if as_json:
        print(json.dumps({"error": message, "hint": hint, "exit_code": exit_code}))
        return
    lines = [*message.splitlines(), *(f"  {line}" for line in hint.splitlines())]
    with suppress(BrokenPipeError):  # the exit code still says it
        for number, line in enumerate(lines):
            print(f"{'' if number else 'runner: '}{escaped(line)}", file=sys.stderr)


def _be_interruptible() -> None:
    """Has what asks a process to end raise KeyboardInterrupt, but for what `nohup` has ignored."""
    _asked_to_stop.clear()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            with suppress(ValueError):  # in a thread, which signals do not reach
                signal.signal(number, _interrupt)
                sys.unraisablehook = _unraisable


is_brief = False
"""Whether the command did so little that nothing has to be cleared up before the process ends."""

_asked_to_stop: list[int] = []
"""The signals that have come."""


def _interrupt(number: int, _: object) -> None:
    _asked_to_stop.append(number)
    raise Stop


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """An interrupt that fell into a place that swallows errors comes again a moment later."""
    if not issubclass(found.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(found)
    elif hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.01)


def _say(text: str) -> None:
    """Prints what the exit code sums up, which counts though nobody reads on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _mute()


def _on_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()  # None where it was closed


def _mute() -> None:
    """Sends what is still printed nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _init(options: argparse.Namespace) -> int:
    from runner.ui import starter

    made = starter.write(Path.cwd(), options.called)
    if options.json:
        _print_json({"written": [str(path) for path in made]})
        return 0
    for path in made:
        print(f"wrote {path}")
    print(f"Put chats into data/{options.called}/, then: runner apply {_near(made[0])}")
    print("Your chats are yours: think before you commit data/ where others can read it.")
    return 0


def _validate(options: argparse.Namespace) -> int:
    from runner.engine import recipe

    found = recipe.compile(
        recipe.read_bytes(options.recipe), str(options.recipe), options.overrides
    )
    stages = [step.name for step in found.steps]
    if options.json:
        _print_json({"name": found.name, "base_model": found.base_model, "stages": stages})
    else:
        print(f"{options.recipe} is right: {' → '.join(stages)}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from runner.engine import opened
    from runner.ui import plan

    with opened.at(options.recipe, options.workspace, options.overrides) as current:
        shown = plan.shown(current, _choice(options))
    if options.json:
        _print_json(plan.record(shown))
    else:
        _say(plan.text(shown))
    problem = next((step.problem for step in shown.planned if step.problem), None)
    if problem and not options.json:
        raise problem
    if problem:
        return problem.exit_code
    work = [step.step.name for step in shown.planned if step.state != "skip"]
    work = work or list(shown.unsettled)
    if work and options.check:
        if not options.json:
            raise DriftError(
                f"{', '.join(work)} would change", hint=f"run `runner apply {options.recipe}`"
            )
        return DriftError.exit_code
    return 0


def _choice(options: argparse.Namespace) -> Choice:
    from runner.engine.plan import Choice

    return Choice(
        only=tuple(options.only),
        start=options.start,
        force=tuple(options.force),
        locked=options.locked,
        paranoid=options.paranoid,
    )


def _apply(options: argparse.Namespace) -> int:
    from runner.engine import execute, opened

    shown: list[str] = []
    with (
        opened.at(options.recipe, options.workspace, options.overrides) as current,
        _progress(options.json, shown) as listen,
    ):
        planned = execute.apply(current, listen, choice=_choice(options), wait=not options.no_wait)
        results = current.links
    did = any(step.state != "skip" for step in planned) or "release" in shown
    global is_brief
    is_brief = not did and not shown
    if options.json:
        if not did:
            _print_json({"event": "nothing_to_do", "recipe": current.compiled.name})
    elif did:
        print(f"done; the results are in {_near(results)}")
    elif any(step.is_left_out for step in planned):
        print("nothing to do for the stages that were asked for")
    else:
        print("nothing to do: everything is up to date")
    return 0


@contextmanager
def _progress(
    as_json: bool, shown: list[str] | None = None
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What shows the events of a run as they come; `shown` gets an entry when there was one."""
    views: list[Any] = []

    def listen(event: dict[str, Any]) -> None:
        if shown is not None:
            shown.append(event["event"])
        try:
            if as_json:
                _print_json(event)
                return
            if not views:
                from runner.ui import progress

                views.append(progress.view(terminal=_on_terminal()))
            views[0].show(event)
        except BrokenPipeError:
            _mute()  # nobody looks any more, which is no reason to stop the run

    try:
        yield listen
    finally:
        for view in views:
            view.close()


def _watch(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from runner.ui import watch
    from runner.watch import loop

    view = watch.view(terminal=_on_terminal(), as_json=options.json)
    try:
        return loop.run(
            options.recipes,
            view.show,
            root=options.workspace,
            overrides=options.overrides,
            once=options.once,
            accept_deletions=options.accept_deletions,
            pace=replace(loop.PACE, heartbeat_s=view.heartbeat_s),
        )
    finally:
        view.close()


def _near(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _cat(options: argparse.Namespace) -> int:
    from runner.engine import opened
    from runner.engine.words import escaped
    from runner.ui import artifacts

    if options.shape and options.view:
        raise RecipeError(
            f"--as and --{options.view} exclude each other", hint="leave one of them out"
        )
    terminal = _on_terminal()
    with opened.at(options.recipe, options.workspace, options.overrides) as current:
        steps = current.compiled.named(options.stage)
        if options.shape:
            return _cat_windows(current, steps[0], options.shape)
        for step in steps:
            if step.transient and len(steps) > 1:
                continue
            artifact = artifacts.current(current, step)
            for row in artifacts.rows(step, artifact, options.view):
                print(escaped(row) if terminal else row)
    return 0


def _cat_windows(opened: Opened, step: Step, shape: Shape) -> int:
    """Prints each window as a record; what the shape cannot say goes to standard error."""
    from runner.engine.words import escaped
    from runner.ui import export_data

    lost: export_data.Lost = export_data.Lost()
    terminal = _on_terminal()
    for record in export_data.rows(opened, step, shape, lost):
        row = json.dumps(record, ensure_ascii=False)
        print(escaped(row) if terminal else row)
    for text in export_data.words(lost):
        print(f"runner: {text}", file=sys.stderr)
    return 0


def _export_data(options: argparse.Namespace) -> int:
    from runner.engine import opened
    from runner.ui import export_data

    lost: export_data.Lost = export_data.Lost()
    with opened.at(options.recipe, options.workspace, options.overrides) as current:
        counts = export_data.write(current, options.shape, options.to, lost)
        planned = current.plan()
    last = max(n for n, step in enumerate(planned) if step.step.kind == "split")
    stale = [step.step.name for step in planned[: last + 1] if step.state != "skip"]
    if options.json:
        written = [{"path": str(path), "windows": count} for path, count in counts.items()]
        record = {"shape": options.shape, "written": written, "lost": dict(lost), "stale": stale}
        _print_json(record)
        return 0
    for path, count in counts.items():
        print(f"wrote {path}: {count} window{'' if count == 1 else 's'}")
    for text in export_data.words(lost):
        print(text)
    if stale:
        names = ", ".join(stale)
        print(f"this is what was made last: `runner apply` would run {names}", file=sys.stderr)
    return 0


def _export(options: argparse.Namespace) -> int:
    from runner.ui import export

    recipe = options.model.suffix in (".yaml", ".yml")
    if not options.gguf and not options.ollama:
        raise RecipeError(
            "there is nothing to export", hint="add --gguf q4_k_m, say, or --ollama NAME"
        )
    if (recipe and options.base) or (options.ollama and not recipe):
        what = "--base is for a model" if recipe else "--ollama is for a recipe"
        raise RecipeError(f"{what}, and {options.model} is none", hint="leave it out")
    export.check_levels(options.gguf)
    written: list[export.Exported] = []
    with _progress(options.json) as listen:
        if options.gguf and recipe:
            written = export.of_recipe(
                options.model, options.workspace, options.gguf, options.to, listen
            )
        elif options.gguf:
            written = export.of_folder(
                options.model, options.base, options.gguf, options.to, listen
            )
    for path, parity in written:
        if options.json:
            size = path.stat().st_size
            _print_json({"event": "written", "path": str(path), "bytes": size, "parity": parity})
        else:
            print(
                f"wrote {path}: mean KL {parity['mean_kl']:.3g}, the same next token in"
                f" {parity['top1']:.0%} of places"
            )
    if options.ollama:
        command = export.to_ollama(options.model, options.workspace, options.ollama)
        if options.json:
            _print_json({"event": "registered", "command": command})
        else:
            print(f"registered; talk with it by `{command}`")
    return 0


def _preview(options: argparse.Namespace) -> int:
    from runner.engine import opened
    from runner.ui import preview

    with opened.at(options.recipe, options.workspace, options.overrides) as current:
        preview.show(current, options.n, as_json=options.json, colour=_colour())
    return 0


def _colour() -> bool:
    return _on_terminal() and not os.environ.get("NO_COLOR")


def _chat(options: argparse.Namespace) -> int:
    from runner.engine import opened
    from runner.ui import chat

    if options.base and options.gguf:
        raise RecipeError("--base and --gguf exclude each other", hint="leave one of them out")
    if options.compare is None and options.once is None and not sys.stdin.isatty():
        raise PreconditionError("there is no terminal to chat in", hint="use --once PROMPT")
    with opened.at(options.recipe, options.workspace, options.overrides) as current:
        if options.compare is not None:
            chat.compare(current, options.compare, options.gguf, options.max_tokens, options.json)
        else:
            model = None if options.base else chat.exported(current, options.gguf)
            chat.talk(
                current, model, options.once, options.max_tokens, options.json, options.system
            )
    return 0


def _serve(options: argparse.Namespace) -> int:
    from runner.engine import opened
    from runner.ui import chat, serve

    if options.base and options.gguf:
        raise RecipeError("--base and --gguf exclude each other", hint="leave one of them out")
    keys = serve.read_keys(options.api_key_file)
    with opened.at(options.recipe, options.workspace, options.overrides) as current:
        name = current.compiled.name
        model = chat.base_gguf(current) if options.base else chat.exported(current, options.gguf)
    serve.serve(model, name, options.host, options.port, keys, options.context, options.json)
    return 0


def _add(options: argparse.Namespace) -> int:
    from runner.ui import add

    paths = add.conversations(
        options.recipe,
        options.workspace,
        options.overrides,
        user=options.user,
        reply=options.reply,
        system=options.system,
        metadata=options.metadata,
        file=options.from_file,
    )
    if options.json:
        _print_json({"written": [str(path) for path in paths]})
        return 0
    for path in paths:
        print(f"wrote {_near(path)}")
    return 0


def _status(options: argparse.Namespace) -> int:
    from runner.engine import opened
    from runner.ui import status

    try:
        with opened.at(options.recipe, options.workspace, options.overrides) as current:
            found = status.record(current)
    except RecipeError as error:
        watch = status.watch_of(options.recipe, options.workspace)
        if watch is None:
            raise
        if options.json:
            said = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
            _print_json({"watch": watch, **said})
            return error.exit_code
        _say(status.watch_text(watch))
        raise
    if options.json:
        _print_json(found)
    else:
        print(status.text(found))
    return 0


def _diff(options: argparse.Namespace) -> int:
    from runner.engine import opened
    from runner.ui import diff

    with opened.at(options.recipe, options.workspace, options.overrides) as current:
        changes = diff.since(current, options.revision)
    if options.json:
        _print_json(diff.records(changes))
    else:
        print(diff.text(changes, options.revision))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from runner.engine import opened, verify

    with opened.at(options.recipe, options.workspace, options.overrides) as current:
        found = []
        for checked in verify.outputs(current, rebuild=not options.quick):
            found.append(checked)
            if not options.json:
                _say(f"{checked.stage}: {checked.text}")
    if options.json:
        _print_json([checked.record() for checked in found])
    wrong = [checked.stage for checked in found if not checked.is_right]
    if wrong and not options.json:
        raise RunnerError(
            f"{', '.join(wrong)}: not there, or not what the lockfile says",
            hint=f"`runner apply {options.recipe} --paranoid` makes again what can be made again",
        )
    if all(checked.state == "nothing" for checked in found):
        raise PreconditionError(
            "the lockfile names no output yet", hint=f"run `runner apply {options.recipe}` first"
        )
    return RunnerError.exit_code if wrong else 0


def _promote(options: argparse.Namespace) -> int:
    from runner.engine import execute

    return _release(options, execute.promote)


def _rollback(options: argparse.Namespace) -> int:
    from runner.engine import execute

    return _release(
        options, lambda current, listen: execute.rollback(current, listen, options.number)
    )


def _release(
    options: argparse.Namespace,
    decide: Callable[[Opened, Callable[[dict[str, Any]], None]], Verdict],
) -> int:
    """Has another release be the current one, and says what became of it."""
    from runner.engine import opened
    from runner.engine.words import escaped
    from runner.ui import progress

    def listen(event: dict[str, Any]) -> None:
        if options.json:
            _print_json(event)
        else:
            print(progress.line_of(event))

    with opened.at(options.recipe, options.workspace, options.overrides) as current:
        verdict = decide(current, listen)
    if options.json:
        _print_json(verdict.event())
    else:
        print(escaped(verdict.text))
    return 0


def _gc(options: argparse.Namespace) -> int:
    from runner.engine import gc, store, workspace
    from runner.ui import garbage

    space = workspace.at(options.workspace) if options.workspace else workspace.around(Path("x"))
    if options.forget:
        store.forget(space, options.forget)
    found = gc.find(space, named=options.named)
    if options.delete:
        gone = gc.delete(space, found)
        found = [one for one in found if one in gone or not one.goes]
    if options.json:
        _print_json(garbage.record(found, deleted=options.delete))
    else:
        print(garbage.text(found, deleted=options.delete))
    return 0


def _push(options: argparse.Namespace) -> int:
    from runner.engine import execute, opened

    with opened.at(options.recipe, options.workspace, options.overrides) as current:
        pushed = [step.step.name for step in execute.push(current)]
        if not pushed:
            raise PreconditionError(
                "there is nothing to push", hint=f"run `runner apply {options.recipe}` first"
            )
        name = current.elsewhere.name
    if options.json:
        _print_json({"pushed": pushed})
    else:
        print(f"{', '.join(pushed)}: now in {name}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from runner.ui import doctor

    return doctor.shown(
        options.recipe,
        workspace=options.workspace,
        overrides=options.overrides,
        asked_memory=options.memory,
        as_json=options.json,
    )


def _schema(options: argparse.Namespace) -> int:
    from runner import disk
    from runner.stages.schema import json_schema

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if options.write:
        disk.write_whole(options.write, text.encode())
    else:
        sys.stdout.write(text)
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "init": _init,
    "validate": _validate,
    "plan": _plan,
    "apply": _apply,
    "watch": _watch,
    "cat": _cat,
    "export-data": _export_data,
    "export": _export,
    "preview": _preview,
    "chat": _chat,
    "serve": _serve,
    "add": _add,
    "status": _status,
    "diff": _diff,
    "verify": _verify,
    "promote": _promote,
    "rollback": _rollback,
    "gc": _gc,
    "push": _push,
    "doctor": _doctor,
    "schema": _schema,
}
