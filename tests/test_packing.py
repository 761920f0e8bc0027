from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import RunnerError
from runner.model import packing

CAPACITY = 32
some_lengths = st.lists(st.integers(1, CAPACITY), max_size=80)


def fills(lengths: list[int], bins: packing.Ints) -> list[int]:
    return np.bincount(bins, weights=lengths).astype(int).tolist() if lengths else []


def by_the_book(lengths: list[int]) -> list[int]:
    """Best fit decreasing, one length after another; how full the bins are."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [n for n, filled in enumerate(bins) if filled + length <= CAPACITY]
        if fitting:
            bins[max(fitting, key=lambda n: bins[n])] += length
        else:
            bins.append(length)
    return sorted(bins)


@settings(max_examples=300, deadline=None)
@given(some_lengths)
def test_runs_of_equal_lengths_are_placed_as_best_fit_decreasing_places_each(
    lengths: list[int],
) -> None:
    assert sorted(fills(lengths, packing.best_fit(lengths, CAPACITY))) == by_the_book(lengths)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, CAPACITY)), max_size=60))
def test_no_pack_is_fuller_than_the_capacity_and_each_row_is_in_one(
    rows: list[tuple[int, int]],
) -> None:
    owners, lengths = [owner for owner, _ in rows], [length for _, length in rows]
    packs = packing.packs(lengths, owners, CAPACITY)
    assert len(packs) == len(rows)
    assert all(filled <= CAPACITY for filled in fills(lengths, packs))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, CAPACITY)), min_size=1, max_size=60))
def test_a_conversation_shares_at_most_one_pack_with_others(rows: list[tuple[int, int]]) -> None:
    owners, lengths = [owner for owner, _ in rows], [length for _, length in rows]
    packs = packing.packs(lengths, owners, CAPACITY)
    for owner in set(owners):
        own = {pack for pack, other in zip(packs.tolist(), owners, strict=True) if other == owner}
        shared = {
            pack
            for pack, other in zip(packs.tolist(), owners, strict=True)
            if other != owner and pack in own
        }
        total = sum(length for other, length in rows if other == owner)
        assert len(shared) <= 1
        assert len(own) == 1 or total > CAPACITY


def test_packs_are_numbered_by_their_first_rows_and_never_differ() -> None:
    lengths = np.random.default_rng(1).integers(1, CAPACITY + 1, 500)
    packs = packing.packs(lengths, range(500), CAPACITY)
    _, first = np.unique(packs, return_index=True)
    assert first.tolist() == sorted(first.tolist())
    assert packs.tolist() == packing.packs(lengths, range(500), CAPACITY).tolist()


def test_many_short_rows_fill_their_packs() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 1, 20_000).astype(int) + 1, 1, 2048)
    packs = packing.best_fit(lengths, 2048)
    assert lengths.sum() / (2048 * (packs.max() + 1)) > 0.999


@pytest.mark.parametrize("length", [0, CAPACITY + 1])
def test_a_length_that_cannot_be_packed_is_refused(length: int) -> None:
    with pytest.raises(RunnerError, match=f"a row of {length} tokens cannot be packed into 32"):
        packing.best_fit([3, length], CAPACITY)


def test_packs_are_read_as_they_are_written(tmp_path: Path) -> None:
    assert packing.read(tmp_path) is None
    assert packing.write(tmp_path, [20, 10, 2, 30], ["a", "b", "b", "c"], CAPACITY) == 2
    assert packing.read(tmp_path) == [0, 0, 0, 1]


def test_no_rows_make_no_packs(tmp_path: Path) -> None:
    assert packing.write(tmp_path, [], [], CAPACITY) == 0
    assert packing.read(tmp_path) == []
