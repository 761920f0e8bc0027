"""What `runner init` writes: a recipe to begin with, the schema for editors, a folder for chats."""

from __future__ import annotations

import json
import re
from pathlib import Path

from runner import disk
from runner.engine.recipe import MODELINE
from runner.errors import RecipeError
from runner.stages.schema import json_schema
from runner.stages.stage import NAME

RECIPE = """\
{modeline}../schemas/recipe.schema.json
name: {name}
base_model: HuggingFaceTB/SmolLM2-135M-Instruct  # owner/name of the hub, a folder, or a .gguf file
stages:
  - stage: ingest
    sources: [data/{name}]     # chat exports and instruction data: files, folders, globs
  - stage: clean
  - stage: window
  - stage: split
  - stage: tokenize
  - stage: train
  - stage: evaluate
  - stage: export
    gguf: [q4_k_m]
"""
IGNORED = ("/artifacts/", "/train_dataset.jsonl", "/eval_dataset.jsonl")
MERGED = ("*.lock merge=union",)


def write(folder: Path, name: str) -> list[Path]:
    """Writes what is not there yet; an existing recipe is never touched. The recipe comes first."""
    if not re.fullmatch(NAME, name):
        raise RecipeError(
            f"{name!r} cannot be a recipe's name",
            hint="use letters, digits, `.`, `_` and `-`, starting with a letter or digit",
        )
    recipe = folder / "recipes" / f"{name}.yaml"
    if recipe.exists():
        raise RecipeError(f"{recipe} is there already", hint="give another name, or edit it")
    schema = folder / "schemas" / "recipe.schema.json"
    data = folder / "data" / name
    # `artifacts` marks the workspace: paths in the recipe start from this folder.
    for path in (recipe.parent, schema.parent, data, folder / "artifacts"):
        path.mkdir(parents=True, exist_ok=True)
    written = [recipe]
    disk.write_whole(recipe, RECIPE.format(modeline=MODELINE, name=name).encode())
    if not schema.exists():
        disk.write_whole(schema, (json.dumps(json_schema(), indent=2) + "\n").encode())
        written.append(schema)
    for path, lines in ((folder / ".gitignore", IGNORED), (folder / ".gitattributes", MERGED)):
        before = path.read_bytes() if path.exists() else b""
        missing = [line for line in lines if line.encode() not in before.splitlines()]
        if missing:
            gap = b"" if not before or before.endswith(b"\n") else b"\n"
            after = before + gap + "".join(f"{line}\n" for line in missing).encode()
            disk.write_whole(path.resolve(), after)
            written.append(path)
    return written
