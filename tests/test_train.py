from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from runner.errors import PreconditionError
from runner.model import recovery
from runner.stages.stage import Sizes
from runner.stages.train import Lora, Train
from tests import tiny_models


def train(**settings: Any) -> Train:
    return Train.model_validate({"stage": "train", **settings})


def adapter_bytes(base: Path, **settings: Any) -> int:
    """What the plan says that the adapter will take."""
    sizes = Sizes(inputs={}, sources=0, previous=None, base_model=base)
    return next(
        one.bytes
        for one in train(max_steps=1, **settings).writes_bytes(sizes)
        if one.what == "adapter"
    )


def test_early_stopping_is_on_and_can_be_turned_off() -> None:
    assert train().early_stopping == 3
    assert train(early_stopping="off").early_stopping == "off"
    for wrong in (0, "no", False):
        with pytest.raises(ValidationError):
            train(early_stopping=wrong)


def test_only_wsd_has_a_decay_fraction() -> None:
    assert train(schedule="wsd", decay_fraction=0.1).decay_fraction == 0.1
    with pytest.raises(ValidationError, match="has decay_fraction but schedule is cosine"):
        train(decay_fraction=0.1)


def test_wsd_has_room_for_its_warmup_and_its_decay() -> None:
    with pytest.raises(ValidationError, match="together more than 1"):
        train(schedule="wsd", warmup_fraction=0.5, decay_fraction=0.6)


def test_what_decides_nothing_of_the_result_is_outside_the_key() -> None:
    for name in ("micro_batch_size", "gradient_checkpointing", "report"):
        assert name in Train.outside_key
        assert name in Train.model_fields


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dora": True},
        {"modules_to_save": ("embed_tokens",)},
        {"modules_to_save": ("lm_head",), "dora": True},
        {"modules_to_save": ("up_proj",)},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_takes_no_more_than_the_plan_said_and_not_much_less(
    settings: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    base = tiny_models.folder(tmp_path / "base", tied=tied, hidden_size=128)
    files = tiny_models.token_files(tmp_path / "tokens", tiny_models.conversations(4))
    tiny_models.trained(base, files, tmp_path, max_steps=1, rank=16, **settings)
    written = (tmp_path / "output" / "adapter_model.safetensors").stat().st_size
    said = adapter_bytes(base, lora=Lora(rank=16, **settings))
    assert written <= said <= 1.7 * written


def test_a_model_that_cannot_compute_activations_again_says_so() -> None:
    class Stiff:
        supports_gradient_checkpointing = False

    model: Any = Stiff()
    with pytest.raises(PreconditionError, match="Stiff cannot compute activations again"):
        recovery.recompute(model)


def test_reading_a_row_does_not_import_pandas(tmp_path: Path) -> None:
    rows = tiny_models.conversations(3)
    files = tiny_models.token_files(tmp_path, rows)
    code = (
        "import sys; from pathlib import Path; from runner.model import token_files; "
        f"rows = token_files.read(Path({str(files / 'train.arrow')!r})); "
        "print([rows[2].input_ids.tolist(), rows[2].weights.tolist(), 'pandas' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = [rows[2].input_ids.tolist(), rows[2].weights.tolist(), False]
    assert done.stdout == f"{expected}\n"
