"""What each stage says it will write, beside what it writes."""

from __future__ import annotations

from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from runner import disk
from runner.model import load, lora
from runner.sources import SourceFile
from runner.stages import parsed
from runner.stages.schema import STAGES
from runner.stages.stage import Dirs, Sizes, Stage, Written
from tests import tiny_models

QUICKSTART = Path(__file__).parents[1] / "data" / "quickstart"


pytestmark = pytest.mark.usefixtures("one_thread")


def stage(kind: str, **settings: Any) -> Stage:
    return parsed({"stage": kind, **settings})


def sizes(
    base_model: Path | None = None,
    *,
    sources: int = 0,
    previous: int | None = None,
    base_converted: bool = False,
    **inputs: int,
) -> Sizes:
    return Sizes(inputs, sources, previous, base_model, base_converted)


def by_name(written: tuple[Written, ...]) -> dict[str, int]:
    return {one.what: one.bytes for one in written}


def run(it: Stage, work: Path, **given: Any) -> Path:
    """Runs the stage; the folder that it wrote."""
    output = work / it.kind()
    output.mkdir(parents=True)
    known: dict[str, Any] = {
        "inputs": {},
        "scratch": work / "scratch" / it.kind(),
        "cache": work / "cache",
        "sources": (),
        "base_model": None,
        "recipe": "small",
        "seed": 1,
        "emit": lambda event: None,
        **given,
    }
    it.run(Dirs(output=output, **known))
    return output


def parts(**settings: Any) -> dict[str, Stage]:
    """The parts of an export stage, by name."""
    export = stage("export", **settings)
    return {unit.name: unit.stage for unit in export.units(stage("train"), "./base")}


def said(part: Stage, known: Sizes) -> dict[str, int]:
    return by_name(part.writes_bytes(known))


def test_each_part_of_an_export_is_as_large_as_was_said(tiny_base: Path, tmp_path: Path) -> None:
    model = load.causal_lm(tiny_base, dtype="bfloat16", device="cpu")
    adapted = lora.attach(model, rank=16, alpha=8, dropout=0.0, target_modules="all-linear")
    (tmp_path / "tokens").mkdir()
    made = {"model": tmp_path / "model", "tokens": tmp_path / "tokens"}
    made["model"].mkdir()
    lora.write(adapted, made["model"])
    (made["model"] / "metrics.jsonl").touch()
    known = sizes(tiny_base, model=disk.size(made["model"]))
    found = {}
    levels = ["f16", "q8_0", "q4_k_m"]
    for name, part in parts(gguf=levels, ollama=True).items():
        work = tmp_path / name
        made[name] = run(part, work, inputs=made, base_model=tiny_base)
        made[part.writes] = made[name]
        found[name] = (sum(said(part, known).values()), disk.size(made[name]))
    for name in ("adapter", "merged", "unquantised", *levels):
        expected, real = found[name]
        assert expected == pytest.approx(real, rel=0.05), name
    for name in ("reference", "modelfile", "card"):
        expected, real = found[name]
        assert expected >= real, name


def test_an_export_needs_room_for_what_is_not_kept(tiny_base: Path) -> None:
    only_gguf = stage("export", adapter=False, merged=False, gguf=["q4_k_m"])
    units = {unit.name: unit for unit in only_gguf.units(stage("train"), "./base")}
    assert [name for name, unit in units.items() if unit.transient] == ["merged", "unquantised"]
    for name in ("merged", "unquantised"):
        assert sum(said(units[name].stage, sizes(tiny_base)).values()) > 1_000_000


def test_a_whole_model_has_no_adapter_to_export() -> None:
    units = stage("export").units(stage("train", method="full"), "./base")
    assert "adapter" not in {unit.name for unit in units}
    assert "adapter" in parts()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_has_the_checkpoints_that_were_said(
    method: str, base: Path, tmp_path: Path
) -> None:
    rows = tiny_models.conversations(12)
    files = tiny_models.token_files(tmp_path / "tokens", rows, rows[:3])
    settings = {"method": method, "checkpoints": {"every_steps": 1}, "epochs": 4, "batch_size": 4}
    if method == "lora":
        settings["lora"] = {"rank": 64}
    train = stage("train", **settings)
    known = sizes(base, tokens=disk.size(files))
    written = train.writes_bytes(known)
    seen: list[int] = []
    peak: list[int] = []

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            scratch = Path(event["path"]).parent
            seen.append(event["bytes"])
            peak.append(disk.size(scratch) + event["bytes"])  # the next one, being written

    made = run(train, tmp_path, inputs={"tokens": files}, base_model=base, emit=emit)
    one = train.checkpoint_bytes(known)
    assert one is not None
    assert max(seen) <= one <= 1.15 * max(seen)
    meanwhile = sum(each.bytes for each in written if each.temporary)
    # Less where one of the best is among the newest.
    assert max(peak) <= meanwhile <= 1.5 * max(peak)
    kept = sum(each.bytes for each in written if not each.temporary)
    assert kept == pytest.approx(disk.size(made), rel=0.05)
    words = "model" if method == "full" else "adapter"
    assert [each.what.partition(",")[0] for each in written] == [
        words,
        "3 checkpoints with optimizer state",
        "2 checkpoints without optimizer state",
    ]


def test_a_training_that_keeps_76_checkpoints_says_what_they_take(base: Path) -> None:
    def total(**settings: Any) -> int:
        train = stage("train", max_steps=76, lora={"rank": 64}, **settings)
        return sum(one.bytes for one in train.writes_bytes(sizes(base, tokens=10_000)))

    each = stage("train", lora={"rank": 64}).checkpoint_bytes(sizes(base))
    assert each is not None
    every_one = total(checkpoints={"every_steps": 1, "keep_best": 76})
    few = total(checkpoints={"every_steps": 1})
    assert few < 5 * each < 20 * each < every_one
    assert total(checkpoints={"every_steps": 1, "keep_best": 999}) == every_one


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"max_steps": 1}, 1),
        ({"epochs": 1}, 1),
        ({"epochs": 0.5}, 1),
        ({"max_steps": 4, "checkpoints": {"every_steps": 2}}, 2),
        ({"epochs": 9}, 5),
        ({"epochs": 9, "checkpoints": {"keep_best": 4}}, 7),
    ],
)
def test_a_short_training_never_has_all_checkpoints(
    settings: dict[str, Any], most: int, base: Path
) -> None:
    written = stage("train", **settings).writes_bytes(sizes(base, tokens=4000))
    counts = [int(one.what.split()[0]) for one in written if "checkpoint" in one.what]
    assert sum(counts) == most


def test_one_checkpoint_is_singular(base: Path) -> None:
    written = stage("train", epochs=1).writes_bytes(sizes(base, tokens=4000))
    assert written[1].what.startswith("1 checkpoint with optimizer state, 0.")


def test_before_the_base_model_is_there_it_says_so() -> None:
    train, merged = stage("train"), parts()["merged"]
    assert train.writes_bytes(sizes(tokens=1000)) == (
        Written("model and checkpoints, not known before the base model is there", 0),
    )
    assert train.checkpoint_bytes(sizes(tokens=1000)) is None
    assert merged.writes_bytes(sizes(model=1000)) == (
        Written("merged model, not known before the base model is there", 0),
    )
    assert by_name(train.writes_bytes(sizes(previous=7)))["model, as large as last time"] == 7
    assert said(merged, sizes(previous=7)) == {"merged model, as large as last time": 7}


def test_a_gguf_base_model_is_converted_once(smollm2_gguf: Path, smollm2: Path) -> None:
    stages = [stage(kind) for kind in ("tokenize", "train", "evaluate")]
    for one in (*stages, parts()["reference"], parts()["merged"]):
        written = one.writes_bytes(sizes(smollm2_gguf, conversations=100, model=100))
        (converted,) = (what for what in written if what.once)
        assert converted.what == "the base model as safetensors, for the cache"
        assert converted.bytes == pytest.approx(disk.size(smollm2), rel=0.001)
        again = one.writes_bytes(sizes(smollm2_gguf, base_converted=True))
        assert not [what for what in again if what.once]
        assert not [what for what in one.writes_bytes(sizes(smollm2)) if what.once]


def test_tokens_take_no_more_than_was_said(smollm2: Path, tmp_path: Path) -> None:
    paths = sorted(path for path in QUICKSTART.rglob("*") if path.is_file())
    sources = tuple(
        SourceFile(str(path), path.name, sha256(path.read_bytes()).hexdigest()) for path in paths
    )
    read = sum(path.stat().st_size for path in paths)
    ingest = stage("ingest", sources=["."])
    conversations = run(ingest, tmp_path, sources=sources)
    assert (
        disk.size(conversations)
        <= by_name(ingest.writes_bytes(sizes(sources=read)))["conversations"]
    )
    made = {"conversations": conversations}
    made["chains"] = run(stage("window", mode="conversational"), tmp_path, inputs=made)
    made["split"] = run(stage("split"), tmp_path, inputs=made)
    tokenize = stage("tokenize")
    tokens = run(tokenize, tmp_path, inputs=made, base_model=smollm2)
    known = sizes(smollm2, conversations=disk.size(conversations))
    said = by_name(tokenize.writes_bytes(known))
    assert disk.size(tokens) <= said["tokens"] <= 3 * disk.size(tokens)


def test_tokens_of_conversations_that_are_not_made_yet_are_as_large_as_last_time(
    base: Path,
) -> None:
    tokenize = stage("tokenize")
    assert by_name(tokenize.writes_bytes(sizes(base, previous=5)))["tokens"] == 5
    (unknown,) = tokenize.writes_bytes(sizes(base))
    assert unknown == Written("tokens, not known before there are conversations", 0)


def test_a_report_grows_with_its_replies(base: Path) -> None:
    few, many = (
        by_name(stage("evaluate", prompts=prompts).writes_bytes(sizes(base)))["report"]
        for prompts in (0, 1000)
    )
    assert few < 100_000 < many < 20_000_000


def test_another_stage_writes_as_much_as_last_time_or_as_it_reads() -> None:
    window = stage("window")
    assert window.writes_bytes(sizes(conversations=40)) == (Written("chains", 40),)
    assert window.writes_bytes(sizes(conversations=40, previous=9)) == (Written("chains", 9),)
    assert window.checkpoint_bytes(sizes(conversations=40)) is None


@pytest.mark.parametrize("kind", STAGES)
def test_what_asks_to_run_again_decides_no_output(kind: str) -> None:
    entry: dict[str, Any] = {"rerun_on": ["env"]}
    if kind == "ingest":
        entry["sources"] = ["chats"]
    found = stage(kind, **entry)
    assert found.rerun_on == ("env",)
    left = found.model_dump(mode="json", exclude_defaults=True, exclude=set(found.outside_key))
    assert left == {}


@pytest.mark.parametrize("kind", STAGES)
def test_libraries_are_distributions_by_their_names(kind: str) -> None:
    for name in STAGES[kind].libraries:
        assert metadata.version(name)


def test_only_what_computes_on_a_gpu_asks_for_it() -> None:
    assert [kind for kind, found in STAGES.items() if found.uses_gpu] == ["train", "evaluate"]
