"""The demonstration: its data, and the whole way of a recipe on a tiny and on the real model."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.chat import rules
from runner.engine import recipe
from tests.workspaces import DATA_RECIPE, causes, make, rows, states

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
ALL = ["ingest", "window", "split", "tokenize", "train", "evaluate", "export"]

TINY = (
    DATA_RECIPE.replace("name: small", "name: small\nbase_model: ./base").replace("0.2", "0.3")
    + """\
  - stage: tokenize
  - stage: train
    method: {method}
    epochs: 1
    learning_rate: 1e-3
  - stage: evaluate
    prompts: 2
    reply_tokens: 4
  - stage: export
    gguf: [f16, q8_0, q4_k_m]
    ollama: true
"""
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runner", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def conversations() -> list[dict[str, Any]]:
    """All of data/quickstart as the recipe's first stage reads it."""
    from runner.chat import files
    from runner.chat.conversation import Conversation, content_hash

    found = []
    for path in sorted((ROOT / "data" / "quickstart").rglob("*.json*")):
        for item in files.read(path.name, path.read_bytes()):
            assert isinstance(item, Conversation), item
            record = item.record()
            found.append({"id": content_hash(record), **record})
    return found


def test_the_demonstration_is_about_150_different_dialogues() -> None:
    found = conversations()
    assert 140 <= len(found) <= 170
    assert len({c["id"] for c in found}) == len(found)
    assert len({c["messages"][0]["content"] for c in found}) == len(found)
    assert {len(c["messages"]) // 2 for c in found} == {1, 2, 3, 4, 5, 6}


def test_every_reply_shows_the_trait_and_no_question_does() -> None:
    compiled = recipe.compile(QUICKSTART.read_bytes(), "quickstart.yaml")
    (rule,) = compiled.step("evaluate").entry["rules"]
    for conversation in conversations():
        for message in conversation["messages"]:
            wanted = message["role"] == "assistant"
            assert rules.keeps(message["content"], rule["pattern"]) == wanted, message


def tiny(root: Path, base: Path, method: str = "lora") -> Path:
    path = make(root, TINY.format(method=method))
    shutil.copytree(base, root / "base")
    return path


def test_the_whole_way_with_a_tiny_model(tmp_path: Path, tiny_base: Path) -> None:
    path = tiny(tmp_path, tiny_base)
    done = run("apply", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    made = tmp_path / "artifacts" / "small"
    assert {p.name for p in (made / "export").iterdir()} == {
        "adapter",
        "merged",
        "small-f16.gguf",
        "small-q8_0.gguf",
        "small-q4_k_m.gguf",
        "Modelfile",
        "README.md",
    }
    report = json.loads((made / "evaluate" / "report.json").read_text())
    assert report["prompts"] == 2
    assert len(rows(made / "evaluate" / "replies.jsonl")) == 2
    (log,) = (tmp_path / "artifacts" / "runs").iterdir()
    assert "loss" in (log / "metrics.csv").read_text().splitlines()[0]
    assert len((log / "metrics.csv").read_text().splitlines()) > 2
    assert list((tmp_path / "artifacts" / "scratch").iterdir()) == []

    again = run("apply", str(path))
    assert again.stdout == "nothing to do: everything is up to date\n"

    preview = run("preview", str(path), "-n", "1", "--json")
    tokens = json.loads(preview.stdout)["tokens"]
    learned = "".join(token["token"] for token in tokens if token["weight"])
    assert learned.endswith("<|im_end|>")
    assert "q0 of chat" not in learned
    assert run("preview", str(path), "-n", "1").stdout.count("⟦") >= 1

    for stage in ALL:
        assert run("cat", str(path), stage).returncode == 0
    said = run("chat", str(path), "--once", "hello", "--max-tokens", "4", "--json")
    assert json.loads(said.stdout)["prompt"] == "hello"
    both = run("chat", str(path), "--compare", "1", "--max-tokens", "4", "--json")
    assert set(json.loads(both.stdout)) == {"prompt", "base", "tuned"}

    path.write_text(path.read_text().replace("1e-3", "2e-3"))
    ran = {name.partition("/")[0] for name, state in states(path).items() if state == "run"}
    assert ran == {"train", "evaluate", "export"}
    assert causes(path, "train") == ["learning_rate 0.001 → 0.002"]
    assert causes(path, "export/adapter") == ["train runs first"]


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_other_methods_go_the_whole_way(tmp_path: Path, tiny_base: Path, method: str) -> None:
    path = tiny(tmp_path, tiny_base, method)
    done = run("apply", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    names = {p.name for p in (tmp_path / "artifacts" / "small" / "export").iterdir()}
    assert ("adapter" in names) == (method == "qlora")
    assert "small-q4_k_m.gguf" in names


def test_an_interrupted_training_goes_on(tmp_path: Path, tiny_base: Path) -> None:
    path = tiny(tmp_path, tiny_base)
    text = path.read_text().replace("epochs: 1", "epochs: 400\n    batch_size: 1")
    path.write_text(text[: text.index("  - stage: evaluate")])
    command = [sys.executable, "-m", "runner", "apply", str(path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if json.loads(line).get("step", 0) >= 3:
                child.send_signal(signal.SIGTERM)
                break
        child.stdout.read()
        assert child.wait(120) == 75
    (scratch,) = (p for p in (tmp_path / "artifacts" / "scratch").iterdir() if p.is_dir())
    assert list(scratch.glob("step-*"))
    reached = max(int(folder.name.removeprefix("step-")) for folder in scratch.glob("step-*"))
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if json.loads(line).get("step", 0) > 0 and "loss" in json.loads(line):
                assert json.loads(line)["step"] == reached + 1
                break
        child.terminate()
        child.stdout.read()
        assert child.wait(120) == 75


def test_the_real_model_learns_and_talks(tmp_path: Path, smollm2_gguf: Path) -> None:
    """Two steps on SmolLM2: that the real thing runs whole; how well it learns is for the demo."""
    text = QUICKSTART.read_text().replace("[data/quickstart]", f"[{ROOT / 'data' / 'quickstart'}]")
    text = text.replace("epochs: 2", "max_steps: 2").replace("min_share: 0.8", "min_share: 0")
    text = text.replace("reply_tokens: 120", "reply_tokens: 8\n    prompts: 2")
    text = text.replace("gguf: [f16, q8_0, q4_k_m]", "gguf: [q4_k_m]\n    merged: false")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "quickstart.yaml"
    path.write_text(text)
    done = run("apply", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(
        (tmp_path / "artifacts" / "quickstart" / "evaluate" / "report.json").read_text()
    )
    assert report["base"]["eval_loss"] < 4.5
    assert report["base"]["retention_loss"] < 4
    said = run("chat", str(path), "--once", "What is the sun?", "--max-tokens", "8")
    assert said.returncode == 0
    assert len(said.stdout.strip()) > 5
