"""What may be said on the command line. Only the command that is asked for gets its parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

EXIT_CODES = """\
exit codes:
  0   done, or nothing to do
  1   the run or a check failed
  2   wrong usage, or a mistake in the recipe
  3   something is missing: a file, a package, disk space
  4   another apply is at work (apply --no-wait)
  5   something would change (plan --check, apply --locked)
  75  interrupted; state saved, the same command continues
"""

SHAPES = ("messages", "sharegpt", "alpaca")


class Parser(argparse.ArgumentParser):
    """Says what is wrong of a command with the usage of that command."""

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        """As argparse does, which has only the whole refuse what a command does not know."""
        found, unknown = super().parse_known_args(*arguments, **named)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def parser(asked: str = "") -> Parser:
    """The parser of the command that is asked for; of all, where it is none."""
    whole = Parser(
        prog="runner",
        description="Turns your own conversations into a language model, as a recipe says.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action=_Version, nargs=0, help="print the version")
    # With `prog` argparse does not have to format the usage of the whole to know it.
    commands = whole.add_subparsers(metavar="COMMAND", required=True, dest="name", prog="runner")
    for name, command in COMMANDS.items():
        if asked in COMMANDS and name != asked:
            continue
        text = command.help[0].upper() + command.help[1:] + "."
        found = commands.add_parser(name, help=command.help, description=text)
        if command.takes_recipe:
            _recipe(found)
        if command.fill is not None:
            command.fill(found)
        found.add_argument("--json", action="store_true", help="print JSON for programs")
        found.add_argument("--debug", action="store_true", help="log more, show tracebacks")
    if asked and not asked.startswith("-") and asked not in COMMANDS:
        from runner.engine import words

        near = words.did_you_mean(asked, COMMANDS) or "; `runner --help` lists them"
        whole.error(f"there is no command {words.shown(asked)}{near}")
    return whole


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"runner {version('runner')}")
        parser.exit()


def _recipe(command: Parser) -> None:
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe, *.yaml")
    _where_and_how(command)


def _where_and_how(command: Parser) -> None:
    command.add_argument(
        "--workspace", type=Path, metavar="DIR", help="folder that paths in a recipe start from"
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="STAGE.KEY=VALUE",
        help="another value than the recipe's, for this command",
    )


def _init(command: Parser) -> None:
    command.add_argument(
        "called", nargs="?", default="my-style", metavar="NAME", help="what to call it"
    )


def _plan(command: Parser) -> None:
    command.add_argument("--check", action="store_true", help="exit 5 when something would run")
    _choice(command)


def _apply(command: Parser) -> None:
    command.add_argument(
        "--no-wait", action="store_true", help="exit 4 when another apply is at work"
    )
    _choice(command)


def _choice(command: Parser) -> None:
    command.add_argument(
        "--locked", action="store_true", help="exit 5 when the lockfile would change"
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="STAGE",
        help="this stage alone, from what those above made last",
    )
    which.add_argument(
        "--from",
        dest="start",
        metavar="STAGE",
        help="this stage and what follows from it, from what those above made last",
    )
    command.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="STAGE",
        help="run this stage even if its output is known",
    )
    command.add_argument(
        "--paranoid", action="store_true", help="read all files again, trust no dates"
    )


def _cat(command: Parser) -> None:
    command.add_argument("stage", metavar="STAGE", help="the stage's name")
    for view, what in (
        ("rejected", "what ingest could not read, and why"),
        ("dropped", "what clean or tokenize left out, and why"),
        ("statistics", "what clean counted"),
        ("replies", "what both models answered"),
    ):
        command.add_argument(
            f"--{view}",
            action="store_const",
            dest="view",
            const=view,
            default="",
            help=f"instead: {what}",
        )
    command.add_argument(
        "--as", choices=SHAPES, dest="shape", help="a window stage: each window as a record"
    )


def _export_data(command: Parser) -> None:
    command.add_argument(
        "--as", choices=SHAPES, dest="shape", default="messages", help="their shape (messages)"
    )
    command.add_argument(
        "--to",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where to write, over files of those names (the current folder)",
    )


def _export(command: Parser) -> None:
    command.add_argument(
        "model", type=Path, metavar="RECIPE|MODEL", help="a recipe, or a model's folder or .gguf"
    )
    command.add_argument("--workspace", type=Path, metavar="DIR", help="of the recipe")
    command.add_argument(
        "--gguf", action="append", default=[], metavar="LEVEL", help="make this GGUF file"
    )
    command.add_argument(
        "--to",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where to write it (the current folder)",
    )
    command.add_argument("--base", metavar="MODEL", help="what the adapter in MODEL belongs to")
    command.add_argument(
        "--ollama", metavar="NAME", help="register the recipe's exported model with Ollama"
    )


def _preview(command: Parser) -> None:
    command.add_argument("-n", type=_count, default=3, metavar="N", help="examples to show (3)")


def _chat(command: Parser) -> None:
    command.add_argument(
        "--gguf", metavar="LEVEL", help="which export, q4_k_m say; else the smallest"
    )
    command.add_argument("--base", action="store_true", help="talk with the untrained model")
    command.add_argument("--once", metavar="PROMPT", help="one reply, then end")
    command.add_argument(
        "--compare",
        type=_count,
        metavar="N",
        help="answers of base and tuned model to N held-out prompts, side by side",
    )
    command.add_argument(
        "--max-tokens", type=_count, default=256, metavar="N", help="longest reply (256)"
    )
    command.add_argument("--system", metavar="TEXT", help="what to tell the model first")


def _serve(command: Parser) -> None:
    command.add_argument(
        "--gguf", metavar="LEVEL", help="which export, q4_k_m say; else the smallest"
    )
    command.add_argument("--base", action="store_true", help="serve the untrained model")
    command.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="where to listen (127.0.0.1)"
    )
    command.add_argument(
        "--port", type=_port, default=8080, metavar="PORT", help="(8080); 0 takes a free one"
    )
    command.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys to ask for, one a line"
    )
    command.add_argument(
        "--context", type=_count, default=4096, metavar="N", help="tokens of a conversation (4096)"
    )


def _add(command: Parser) -> None:
    command.add_argument("--user", metavar="TEXT", help="what was asked")
    command.add_argument("--reply", metavar="TEXT", help="the reply to learn")
    command.add_argument("--system", metavar="TEXT", help="what the model was told first")
    command.add_argument(
        "--metadata",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="kept beside it: provider, mode, version; timestamp is now",
    )
    command.add_argument(
        "--from-file",
        metavar="FILE",
        help="instead: conversations as JSON or JSON Lines; - is standard input",
    )


def _watch(command: Parser) -> None:
    command.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE", help="recipes, *.yaml")
    _where_and_how(command)
    command.add_argument(
        "--once", action="store_true", help="do what is to be done now, then end; for cron"
    )
    command.add_argument(
        "--accept-deletions",
        action="store_true",
        help="go on though many sources are gone; also said beside a running watch",
    )


def _diff(command: Parser) -> None:
    command.add_argument(
        "revision", nargs="?", default="HEAD", metavar="REV", help="a commit, branch or tag (HEAD)"
    )


def _verify(command: Parser) -> None:
    command.add_argument(
        "--quick", action="store_true", help="only hash what is there, make nothing again"
    )


def _rollback(command: Parser) -> None:
    command.add_argument(
        "number", nargs="?", type=_count, metavar="N", help="which release (the one before)"
    )


def _gc(command: Parser) -> None:
    command.add_argument("named", nargs="*", metavar="HASH", help="a trained model that may go too")
    command.add_argument("--delete", action="store_true", help="delete it")
    command.add_argument(
        "--forget", type=Path, metavar="DIR", help="a workspace that is gone for good"
    )
    command.add_argument("--workspace", type=Path, metavar="DIR", help="whose store (the one here)")


def _doctor(command: Parser) -> None:
    command.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE", help="does its training fit here?"
    )
    _where_and_how(command)
    command.add_argument(
        "--memory", metavar="SIZE", help="does it fit on a GPU of 8GB, say, wherever that is?"
    )


def _schema(command: Parser) -> None:
    command.add_argument("--write", type=Path, metavar="FILE", help="write it there instead")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text[:6]) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    """A number of things for argparse, whose own message names the value."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


class Command(NamedTuple):
    """What a command does, in words, and what it takes beside the recipe."""

    help: str
    fill: Callable[[Parser], None] | None = None
    takes_recipe: bool = True


COMMANDS = {
    "init": Command("write a first recipe and the folder for its data", _init, takes_recipe=False),
    "validate": Command("check a recipe and report every mistake with its line"),
    "plan": Command("say what apply would do, and why", _plan),
    "apply": Command("run what is not known already", _apply),
    "watch": Command(
        "apply recipes whenever files arrive, and train when it is worth it",
        _watch,
        takes_recipe=False,
    ),
    "cat": Command("print what a stage made, as JSON lines", _cat),
    "export-data": Command(
        "write train_dataset.jsonl and eval_dataset.jsonl for other tools", _export_data
    ),
    "export": Command(
        "make another GGUF file, of a recipe's model or of any other", _export, takes_recipe=False
    ),
    "preview": Command("show which tokens carry loss, and how much", _preview),
    "chat": Command("talk with the exported model", _chat),
    "serve": Command("answer other programs as OpenAI's API does, on this machine", _serve),
    "add": Command("put a new conversation into the recipe's source folder", _add),
    "status": Command("say what was made last, from what, and what takes the space"),
    "diff": Command("say what changed since another version of the lockfile", _diff),
    "verify": Command("check that every output is there, and is what it was", _verify),
    "promote": Command("make what was made last the current release, whatever the gate says"),
    "rollback": Command("make an earlier release the current one again", _rollback),
    "gc": Command("show what is in the store and not needed any more", _gc, takes_recipe=False),
    "push": Command("copy what is made to the remote cache of runner.yaml"),
    "doctor": Command(
        "say what this machine has and lacks, and whether a recipe fits on it",
        _doctor,
        takes_recipe=False,
    ),
    "schema": Command("print the JSON Schema of recipes", _schema, takes_recipe=False),
}
"""In the order of `runner --help`; the function of each is in `runner.cli`, by its name."""
