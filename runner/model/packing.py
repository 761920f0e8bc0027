"""Which short rows share one sequence of up to `capacity` tokens, so that a pass has none to spare.

Best fit decreasing over all lengths at once: the longest first, each into the fullest sequence that
still has room (Johnson et al., 1974, doi:10.1137/0203025). Lengths are bounded integers, so rows of
one length are placed together: the work depends on how many different lengths there are, and hardly
on how many rows.

The rows of a conversation are trained in one step (see `batches`), so they also stay together
here: a conversation that fits into one pack is packed whole. A longer one gets packs of its own,
and only the emptiest of those takes in other conversations.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from runner.errors import RunnerError

Ints = npt.NDArray[np.int64]

FILE = "packs.arrow"
SCHEMA = pa.schema([pa.field("pack", pa.int32(), nullable=False)])


def write(folder: Path, lengths: npt.ArrayLike, conversations: npt.ArrayLike, capacity: int) -> int:
    """Packs the rows of `train.arrow` into `packs.arrow` beside it; the number of packs."""
    found = packs(lengths, conversations, capacity)
    column = pa.array(found, pa.int32())
    with pa.OSFile(str(folder / FILE), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
        stream.write_batch(pa.record_batch([column], schema=SCHEMA))
    return int(found.max(initial=-1)) + 1


def read(folder: Path) -> list[int] | None:
    """The pack of each row of `train.arrow`; None where rows are not packed."""
    path = folder / FILE
    if not path.exists():
        return None
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        column: list[int] = stream.read_all().column("pack").to_pylist()
    return column


def packs(lengths: npt.ArrayLike, conversations: npt.ArrayLike, capacity: int) -> Ints:
    """The pack of each row, numbered by first rows; `conversations[i]` numbers that of row i.

    No pack has more than `capacity` tokens, and the same input gives the same packs.
    """
    sizes = np.asarray(lengths, np.int64)
    if not len(sizes):
        return sizes
    owners = np.unique(np.asarray(conversations), return_inverse=True)[1]
    totals = np.bincount(owners, weights=sizes).astype(np.int64)
    # An item is what is packed whole: a conversation, or a pack of one that is too long for that.
    item_of_row = owners.astype(np.int64)
    closed: list[int] = []
    items = len(totals)
    order = np.argsort(owners, kind="stable")
    ends = np.cumsum(np.bincount(owners))
    extra: list[int] = []
    for owner in np.flatnonzero(totals > capacity).tolist():
        rows = order[ends[owner - 1] if owner else 0 : ends[owner]]
        own = best_fit(sizes[rows], capacity)
        filled = np.bincount(own, weights=sizes[rows]).astype(np.int64)
        emptiest = int(filled.argmin())
        totals[owner] = filled[emptiest]
        for pack in range(len(filled)):
            if pack != emptiest:
                item_of_row[rows[own == pack]] = items
                closed.append(items)
                extra.append(int(filled[pack]))
                items += 1
    opened = best_fit(totals, capacity)
    pack_of_item = np.concatenate([opened, opened.max() + 1 + np.arange(len(closed))])
    return _by_first_place(pack_of_item[item_of_row])


def best_fit(lengths: npt.ArrayLike, capacity: int) -> Ints:
    """The bin of each length, by best fit decreasing; bins are numbered by their first lengths."""
    sizes = np.asarray(lengths, np.int64)
    if not len(sizes):
        return sizes
    if sizes.min() < 1 or sizes.max() > capacity:
        wrong = int(sizes.max() if sizes.max() > capacity else sizes.min())
        raise RunnerError(
            f"a row of {wrong} tokens cannot be packed into {capacity}",
            hint="rows have at least one token and at most max_tokens",
        )
    keys = sizes.astype(np.uint16 if capacity < 2**16 else np.int64)  # 16 bits are radix-sorted
    order = np.argsort(keys, kind="stable")
    counts = np.bincount(sizes, minlength=capacity + 1)
    starts = np.cumsum(counts) - counts
    binned = np.empty(len(sizes), np.int64)  # in the order of `order`
    # Open bins by the room that is left in them, oldest first, and a bit for each room there is.
    bins: dict[int, list[Ints]] = {}
    rooms = 0
    opened = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        place = int(starts[length])
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = (fitting & -fitting).bit_length() - 1 + length
                each = room // length
                held = bins[room]
                chunk = held[-1]
                # After the first row a bin has less room than before, so it is still the best.
                taken = min(len(chunk), -(-left // each))
                if taken == len(chunk):
                    held.pop()
                    if not held:
                        rooms ^= 1 << room
                else:
                    held[-1] = chunk[taken:]
                    chunk = chunk[:taken]
            else:
                room = capacity
                each = room // length
                taken = -(-left // each)
                chunk = np.arange(opened, opened + taken)
                opened += taken
            placed = min(left, taken * each)
            full, rest = divmod(placed, each)
            if each == 1:
                binned[place : place + placed] = chunk
            else:
                binned[place : place + placed] = np.repeat(chunk, each)[:placed]
            for some, count in ((chunk[:full], each), (chunk[full:], rest)):
                after = room - count * length
                if len(some) and after:
                    bins.setdefault(after, []).append(some)
                    rooms |= 1 << after
            place += placed
            left -= placed
    found = np.empty(len(sizes), np.int64)
    found[order] = binned
    return _by_first_place(found)


def _by_first_place(numbers: Ints) -> Ints:
    """The same groups, numbered in the order in which they first come."""
    first = np.full(int(numbers.max()) + 1, len(numbers), np.int64)
    # The last write to a place stays, so that the first place of each number is written last.
    first[numbers[::-1]] = np.arange(len(numbers) - 1, -1, -1)
    rank = np.empty_like(first)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[numbers]
