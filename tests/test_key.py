import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.engine import key

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc"), inner),
    max_leaves=8,
)  # fmt: skip


def parts(**changes: object) -> key.Components:
    whole: dict[str, object] = {
        "kind": "train",
        "version": 1,
        "settings": {"learning_rate": 1e-4},
        "inputs": {"tokens": "0" * 64},
        "sources": None,
        "base_model": "f" * 64,
        "seed": 17,
    }
    return key.components(**{**whole, **changes})  # type: ignore[arg-type]


def test_the_key_is_frozen() -> None:
    assert key.of(parts()) == ("0197354e66730fc54804a4703fc270f437c7acab47ca9d01219c03e2d6db5998")


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "evaluate"},
        {"version": 2},
        {"settings": {"learning_rate": 2e-4}},
        {"settings": {}},
        {"inputs": {"tokens": "1" * 64}},
        {"sources": "0" * 64},
        {"base_model": None},
        {"seed": 18},
    ],
)
def test_each_part_counts(changes: dict[str, object]) -> None:
    assert key.of(parts(**changes)) != key.of(parts())


def test_one_and_one_point_nought_and_the_text_are_three_things() -> None:
    assert len({key.of({"a": value}) for value in (1, 1.0, "1", True)}) == 4


def test_texts_that_only_look_alike_are_others_because_stages_see_the_difference() -> None:
    assert key.of({"name": "é"}) != key.of({"name": "e\u0301"})


@given(st.dictionaries(st.text("abc"), JSON))
def test_the_order_of_keys_does_not_count(value: dict[str, object]) -> None:
    assert key.of(value) == key.of(dict(reversed(value.items())))


def test_another_hash_seed_and_locale_give_the_same_key() -> None:
    code = "from runner.engine import key; print(key.of({'b': {'x': 1.5, 'y': ['ё']}, 'a': None}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": locale, "TZ": "Asia/Tokyo"},
            capture_output=True,
            check=True,
        ).stdout
        for seed, locale in (("0", "C"), ("1", "C.UTF-8"))
    }
    assert len(found) == 1


def test_a_set_of_files_has_one_hash_whatever_the_order() -> None:
    files = [("a", "1"), ("b", "2")]
    assert key.of_files(files) == key.of_files(reversed(files))
    assert key.of_files(files) != key.of_files([("a", "2"), ("b", "1")])
