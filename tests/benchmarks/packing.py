"""How fast rows are packed and how full the packs are, beside TRL's `pack_dataset`, in one run.

python -m tests.benchmarks.packing
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, disable_caching, disable_progress_bars
from trl import pack_dataset

from runner.model import packing

CAPACITY = 2048
ROWS = 1_000_000
PEER_ROWS = 100_000
ROUNDS = 3
DATA = Path(__file__).parents[3] / "shared" / "data"
Lengths = npt.NDArray[np.int64]


def distributions() -> Iterator[tuple[str, Lengths]]:
    random = np.random.default_rng(0)
    yield "lognormal, median 245", _bounded(random.lognormal(5.5, 0.9, ROWS))
    yield "lognormal, median 55", _bounded(random.lognormal(4.0, 1.0, ROWS))
    yield "uniform to 1024", random.integers(1, 1025, ROWS)
    yield "uniform to 2048", random.integers(1, CAPACITY + 1, ROWS)
    real = _real()
    if len(real):
        yield f"real instructions ({len(real)} lengths)", random.choice(real, ROWS)


def _bounded(values: npt.NDArray[np.float64]) -> Lengths:
    return np.clip(values.astype(np.int64) + 1, 1, CAPACITY)


def _real() -> Lengths:
    """Characters of real records divided by 3.5, which is about what they have in tokens."""
    folder = DATA / "hiyouga__LLaMA-Factory"
    sizes = [
        len(line) / 3.5
        for path in sorted(folder.rglob("*demo.json"))
        for line in path.read_text(encoding="utf-8").split("\n  {")
    ]
    return _bounded(np.array(sizes, np.float64))


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def fewest(lengths: Lengths) -> int:
    """A bound below the packs that any way of packing needs (Martello and Toth, 1990, L2)."""
    counts = np.bincount(lengths, minlength=CAPACITY + 1).astype(np.int64)
    sizes = np.arange(CAPACITY + 1)
    best = -(-int(lengths.sum()) // CAPACITY)
    for small in range(CAPACITY // 2 + 1):
        large = sizes > CAPACITY - small
        middle = (sizes > CAPACITY // 2) & ~large
        rest = (sizes >= small) & (sizes <= CAPACITY // 2)
        bins = int(counts[large | middle].sum())
        room = int(counts[middle].sum()) * CAPACITY - int((counts * sizes)[middle].sum())
        need = int((counts * sizes)[rest].sum()) - room
        best = max(best, bins + max(0, -(-need // CAPACITY)))
    return best


def dataset(lengths: Lengths) -> Dataset:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(offsets[-1], np.int32)))
    return Dataset(pa.table({"input_ids": ids}))


def main() -> None:
    disable_progress_bars()
    disable_caching()
    print(f"{ROWS:,} lengths, capacity {CAPACITY}; TRL on the first {PEER_ROWS:,} of them")
    for name, lengths in distributions():
        owners = np.arange(ROWS)
        peer_rows = dataset(lengths[:PEER_ROWS])
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(ROUNDS):
            ours.append(timed(lambda: packing.packs(lengths, owners, CAPACITY)))  # noqa: B023
            theirs.append(timed(lambda: pack_dataset(peer_rows, CAPACITY, "bfd")))  # noqa: B023
        packs = int(packing.packs(lengths, owners, CAPACITY).max()) + 1
        fill = lengths.sum() / (packs * CAPACITY)
        peer = len(pack_dataset(peer_rows, CAPACITY, "bfd"))
        peer_fill = lengths[:PEER_ROWS].sum() / (peer * CAPACITY)
        pace, peer_pace = ROWS / min(ours), PEER_ROWS / min(theirs)
        print(
            f"{name}: {min(ours):.2f} s, {pace / 1e6:.2f} M rows/s, fill {fill:.5f}, packs "
            f"{packs / fewest(lengths):.5f} × the least possible; TRL {peer_pace / 1e3:,.0f} k "
            f"rows/s, fill {peer_fill:.5f}: {pace / peer_pace:.1f} ×"
        )


if __name__ == "__main__":
    main()
