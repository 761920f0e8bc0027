"""What a training imports, in a process of its own as each training has."""

import json
import subprocess
import sys

CHILD = """\
import gc, json, sys
from runner.model import quickly
with quickly.importing():
    from runner.model import sft
import torch, transformers
structure = transformers.models._import_structure
print(json.dumps({
    "loaded": [name for name in sys.argv[1].split() if name in sys.modules],
    "hidden": [name for name, module in sys.modules.items() if module is None],
    "compiles": torch.compile.__name__,
    "classes": sum(map(len, structure.values())),
    "llama": transformers.LlamaForCausalLM.__name__,
    "collects": gc.isenabled(),
}))
"""
LISTED = """\
import transformers
structure = transformers.models._import_structure
print(sum(map(len, structure.values())))
"""


def said(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return done.stdout


def test_a_training_loads_no_compiler_and_no_cloud() -> None:
    found = json.loads(said(CHILD, "torch._inductor.compile_fx boto3"))

    assert found["loaded"] == []


def test_all_is_as_it_was_when_the_imports_are_done() -> None:
    found = json.loads(said(CHILD, ""))

    assert (found["compiles"], found["collects"], found["hidden"]) == ("compile", True, [])


def test_every_model_of_transformers_is_known_although_its_files_are_read_once() -> None:
    found = json.loads(said(CHILD, ""))

    assert found["classes"] == int(said(LISTED)) > 1000
    assert found["llama"] == "LlamaForCausalLM"
