"""The command line. Each command imports what it needs, so that `--help` is instant."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import DriftError, InterruptedRun, PreconditionError, RecipeError, RunnerError

if TYPE_CHECKING:
    from runner.chat.shapes import Shape
    from runner.engine.execute import Opened
    from runner.engine.plan import Planned
    from runner.engine.recipe import Step

EXIT_CODES = """\
exit codes:
  0   done, or nothing to do
  1   the run or a check failed
  2   wrong usage, or a mistake in the recipe
  3   something is missing: a file, a package, disk space
  4   another apply is at work (apply --no-wait)
  5   something would change (plan --check)
  75  interrupted; state saved, the same command continues
"""

SHAPES = ("messages", "sharegpt", "alpaca")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal has no letter for
    parser = _parser()
    options = parser.parse_args(arguments)
    level = logging.DEBUG if options.debug else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(name)s: %(message)s")
    try:
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
                signal.signal(getattr(signal, name), _interrupt)
        command: Callable[[argparse.Namespace], int] = options.command
        code = command(options)
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
        # The reader (`head`, say) has what it wanted; Python must not complain when it exits.
        _mute()
        return 0
    except OSError as error:
        if options.debug:
            raise
        where = f": {error.filename}" if error.filename is not None else ""
        what = f"{error.strerror or error}{where}"
        hint = "check that it is there, and that you may read it, or write to it"
        _report(what, hint, PreconditionError.exit_code, as_json=options.json)
        return PreconditionError.exit_code
    except Exception as error:
        if options.debug:
            raise
        what = f"a bug in runner: {type(error).__name__}: {error}"
        hint = "run the same command with --debug and report what it prints"
        _report(what, hint, 1, as_json=options.json)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="runner",
        description="Turns your own conversations into a language model, as a recipe says.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help: str, *, recipe: bool = True
    ) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        found.set_defaults(command=run)
        if recipe:
            found.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe, *.yaml")
            found.add_argument(
                "--workspace", type=Path, metavar="DIR", help="folder that its paths start from"
            )
        found.add_argument("--json", action="store_true", help="print JSON for programs")
        found.add_argument("--debug", action="store_true", help="log more, show tracebacks")
        return found

    new = command("init", _init, "write a first recipe and the folder for its data", recipe=False)
    new.add_argument("name", nargs="?", default="my-style", help="what to call it")
    command("validate", _validate, "check a recipe and report every mistake with its line")
    plan = command("plan", _plan, "say what apply would do, and why")
    plan.add_argument("--check", action="store_true", help="exit 5 when something would run")
    apply = command("apply", _apply, "run what is not known already")
    apply.add_argument(
        "--no-wait", action="store_true", help="exit 4 when another apply is at work"
    )
    cat = command("cat", _cat, "print what a stage made, as JSON lines")
    cat.add_argument("stage", metavar="STAGE", help="the stage's name")
    for view, what in (
        ("rejected", "what ingest could not read, and why"),
        ("dropped", "what clean or tokenize left out, and why"),
        ("statistics", "what clean counted"),
        ("replies", "what both models answered"),
    ):
        help = f"instead: {what}"
        cat.add_argument(
            f"--{view}", action="store_const", dest="view", const=view, default="", help=help
        )
    cat.add_argument(
        "--as", choices=SHAPES, dest="shape", help="a window stage: each window as a record"
    )
    data = command(
        "export-data",
        _export_data,
        "write train_dataset.jsonl and eval_dataset.jsonl for other tools",
    )
    data.add_argument(
        "--as", choices=SHAPES, dest="shape", default="messages", help="their shape (messages)"
    )
    data.add_argument(
        "--to",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where to write, over files of those names (the current folder)",
    )
    preview = command("preview", _preview, "show which tokens carry loss, and how much")
    preview.add_argument("-n", type=_count, default=3, metavar="N", help="examples to show (3)")
    chat = command("chat", _chat, "talk with the exported model")
    chat.add_argument("--gguf", metavar="LEVEL", help="which export, q4_k_m say; else the smallest")
    chat.add_argument("--base", action="store_true", help="talk with the untrained model")
    chat.add_argument("--once", metavar="PROMPT", help="one reply, then end")
    chat.add_argument(
        "--compare",
        type=_count,
        metavar="N",
        help="answers of base and tuned model to N held-out prompts, side by side",
    )
    chat.add_argument(
        "--max-tokens", type=_count, default=256, metavar="N", help="longest reply (256)"
    )
    command("status", _status, "say what was made last, from what, and how large it is")
    schema = command("schema", _schema, "print the JSON Schema of recipes", recipe=False)
    schema.add_argument("--write", type=Path, metavar="FILE", help="write it there instead")
    return parser


def _count(text: str) -> int:
    """A number of things for argparse, whose own message names the value."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def _report(message: str, hint: str, exit_code: int, *, as_json: bool) -> None:
    from runner.engine.words import escaped

    if as_json:
        print(json.dumps({"error": message, "hint": hint, "exit_code": exit_code}))
        return
    lines = [*message.splitlines(), *(f"  {line}" for line in hint.splitlines())]
    for number, line in enumerate(lines):
        print(f"{'' if number else 'runner: '}{escaped(line)}", file=sys.stderr)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _mute() -> None:
    """Sends what is still printed nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _init(options: argparse.Namespace) -> int:
    from runner.ui import starter

    made = starter.write(Path.cwd(), options.name)
    if options.json:
        _print_json({"written": [str(path) for path in made]})
        return 0
    for path in made:
        print(f"wrote {path}")
    print(f"Put chats into data/{options.name}/, then: runner apply {made[0]}")
    return 0


def _validate(options: argparse.Namespace) -> int:
    from runner.engine import recipe

    found = recipe.compile(recipe.read_bytes(options.recipe), str(options.recipe))
    stages = [step.name for step in found.steps]
    if options.json:
        _print_json({"name": found.name, "base_model": found.base_model, "stages": stages})
    else:
        print(f"{options.recipe} is right: {' → '.join(stages)}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from runner.engine import execute

    with execute.opened(options.recipe, options.workspace) as current:
        planned = current.plan()
    work = [step for step in planned if step.state != "skip"]
    if options.json:
        _print_json([_planned_record(step) for step in planned])
    elif not work:
        print("nothing to do")
    else:
        _print_plan(planned)
    if work and options.check and options.json:
        return DriftError.exit_code
    if work and options.check:
        raise DriftError(f"{len(work)} stages would run", hint="run `runner apply`")
    return 0


def _planned_record(planned: Planned) -> dict[str, Any]:
    causes = [{"reason": cause.reason, "text": cause.text} for cause in planned.causes]
    return {
        "stage": planned.step.name,
        "state": planned.state,
        "causes": causes,
        "output": planned.output,
    }


def _print_plan(planned: Sequence[Planned]) -> None:
    """The stages that would run, each with its causes; the others are one line."""
    from runner.engine.words import escaped

    words = {"run": "run", "maybe": "run unless nothing changes above"}
    width = max(len(step.step.name) for step in planned)
    for step in planned:
        if step.state != "skip":
            causes = escaped("; ".join(cause.text for cause in step.causes))
            print(f"{step.step.name:{width}}  {words[step.state]}: {causes}")
    skipped = [step.step.name for step in planned if step.state == "skip"]
    if skipped:
        print(f"nothing to do for {', '.join(skipped)}")


def _apply(options: argparse.Namespace) -> int:
    from runner.engine import execute

    shown: list[Any] = []

    def listen(event: dict[str, Any]) -> None:
        try:
            if options.json:
                _print_json(event)
                return
            if not shown:
                from runner.ui import progress

                shown.append(progress.view(terminal=sys.stdout.isatty()))
            shown[0].show(event)
        except BrokenPipeError:
            _mute()  # nobody looks any more, which is no reason to stop the run

    with execute.opened(options.recipe, options.workspace) as current:
        try:
            planned = execute.apply(current, listen, wait=not options.no_wait)
        finally:
            for view in shown:
                view.close()
        results = current.workspace.links(current.compiled.name)
    did = any(step.state != "skip" for step in planned)
    if options.json:
        if not did:
            _print_json({"event": "nothing_to_do", "recipe": current.compiled.name})
    elif did:
        print(f"done; the results are in {_near(results)}")
    else:
        print("nothing to do: everything is up to date")
    return 0


def _near(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _cat(options: argparse.Namespace) -> int:
    from runner.engine import execute
    from runner.engine.words import escaped
    from runner.ui import artifacts

    if options.shape and options.view:
        raise RecipeError(
            f"--as and --{options.view} exclude each other", hint="leave one of them out"
        )
    terminal = sys.stdout.isatty()
    with execute.opened(options.recipe, options.workspace) as current:
        step = current.compiled.step(options.stage)
        if options.shape:
            return _cat_windows(current, step, options.shape)
        artifact = artifacts.current(current, step)
        for row in artifacts.rows(step, artifact, options.view):
            print(escaped(row) if terminal else row)
    return 0


def _cat_windows(opened: Opened, step: Step, shape: Shape) -> int:
    """Prints each window as a record; what the shape cannot say goes to standard error."""
    from runner.engine.words import escaped
    from runner.ui import export_data

    lost: export_data.Lost = export_data.Lost()
    terminal = sys.stdout.isatty()
    for record in export_data.rows(opened, step, shape, lost):
        row = json.dumps(record, ensure_ascii=False)
        print(escaped(row) if terminal else row)
    for text in export_data.words(lost):
        print(f"runner: {text}", file=sys.stderr)
    return 0


def _export_data(options: argparse.Namespace) -> int:
    from runner.engine import execute
    from runner.ui import export_data

    lost: export_data.Lost = export_data.Lost()
    with execute.opened(options.recipe, options.workspace) as current:
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


def _preview(options: argparse.Namespace) -> int:
    from runner.engine import execute
    from runner.ui import preview

    with execute.opened(options.recipe, options.workspace) as current:
        preview.show(current, options.n, as_json=options.json, colour=_colour())
    return 0


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _chat(options: argparse.Namespace) -> int:
    from runner.engine import execute
    from runner.ui import chat

    if options.base and options.gguf:
        raise RecipeError("--base and --gguf exclude each other", hint="leave one of them out")
    if options.compare is None and options.once is None and not sys.stdin.isatty():
        raise PreconditionError("there is no terminal to chat in", hint="use --once PROMPT")
    with execute.opened(options.recipe, options.workspace) as current:
        if options.compare is not None:
            chat.compare(current, options.compare, options.gguf, options.max_tokens, options.json)
        else:
            model = None if options.base else chat.exported(current, options.gguf)
            chat.talk(current, model, options.once, options.max_tokens, options.json)
    return 0


def _status(options: argparse.Namespace) -> int:
    from runner.engine import execute
    from runner.ui import status

    with execute.opened(options.recipe, options.workspace) as current:
        records = status.records(current)
    if options.json:
        _print_json(records)
    else:
        print(status.text(records))
    return 0


def _schema(options: argparse.Namespace) -> int:
    from runner import disk
    from runner.stages.schema import json_schema

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if options.write:
        disk.write_whole(options.write, text.encode())
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
