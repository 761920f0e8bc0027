"""A conversation that was continued in several ways is a tree; its branches are conversations.

A tree is a mapping from each message's id to its parent's, in the source's order. Nothing here
recurses or takes longer than what it reads and returns. A parent that is not in the tree counts as
none, and a cycle ends where it closes.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal


def leaves(parents: Mapping[str, str | None]) -> list[str]:
    """What is nobody's parent, in the tree's order; of a closed cycle, its last member."""
    above = set(parents.values())
    seen: set[str] = set()
    found: set[str] = set()
    # A tree has its leaves first, so that only closed cycles are left for the second round.
    for ends in ((id for id in parents if id not in above), reversed(list(parents))):
        for end in ends:
            if end not in seen:
                found.add(end)
                seen.update(_upwards(parents, end, seen))
    return [id for id in parents if id in found]


def path(parents: Mapping[str, str | None], leaf: str) -> list[str]:
    """The way from the root down to `leaf`, both included."""
    return list(_upwards(parents, leaf, ()))[::-1]


def _upwards(parents: Mapping[str, str | None], id: str, stop: Container[str]) -> Iterator[str]:
    """`id`, its parent, and so on, to the root or to what is in `stop`, which is left out."""
    passed: set[str] = set()
    above: str | None = id
    while above is not None and above in parents and above not in passed and above not in stop:
        yield above
        passed.add(above)
        above = parents[above]


@dataclass(frozen=True)
class Node:
    parent: str | None
    speaks: bool = True
    """False for what adds no text: a tool's result, a hidden message, an empty stub."""
    time: float | None = None


def branches(
    nodes: Mapping[str, Node], which: Literal["newest", "all"], current: str | None = None
) -> list[list[str]]:
    """The ids from root to end of the newest branch, or of every branch.

    The newest is the one that ends in `current`, where that is known; else the one whose last text
    has the latest time, and of several the last in order. Of all branches, one that only repeats
    the beginning of another is left out.
    """
    parents = {id: node.parent for id, node in nodes.items()}
    if which == "newest" and current in nodes:
        assert current is not None
        return [path(parents, current)]
    ends = _ends(nodes, parents)
    if which == "newest" and ends:
        times = _times(nodes, parents)
        places = {id: place for place, id in enumerate(nodes)}
        ends = [max(ends, key=lambda end: (times[end], places[end]))]
    return [path(parents, end) for end in ends]


def trees(nodes: Mapping[str, Node]) -> list[dict[str, Node]]:
    """The nodes that hang on each root, in order."""
    parents = {id: node.parent for id, node in nodes.items()}
    roots: dict[str, str] = {}
    for id in parents:
        way = list(_upwards(parents, id, roots))
        if way:
            above = parents[way[-1]]
            root = way[-1] if above is None else roots.get(above, way[-1])
            roots.update(dict.fromkeys(way, root))
    found: dict[str, dict[str, Node]] = {}
    for id, node in nodes.items():
        found.setdefault(roots[id], {})[id] = node
    return list(found.values())


def _ends(nodes: Mapping[str, Node], parents: Mapping[str, str | None]) -> list[str]:
    """The last text of each branch, without those that another branch goes on from."""
    last: dict[str, None] = {}
    silent: set[str] = set()
    for leaf in leaves(parents):
        for id in _upwards(parents, leaf, silent):
            if nodes[id].speaks:
                last[id] = None
                break
            silent.add(id)
    passed: set[str] = set()
    for end in last:
        above = parents[end]
        if above is not None:
            passed.update(_upwards(parents, above, passed))
    return [end for end in last if end not in passed] or leaves(parents)[-1:]


def _times(nodes: Mapping[str, Node], parents: Mapping[str, str | None]) -> dict[str, float]:
    """The time of each node; of one without, that of the nearest above it that has one."""
    found: dict[str, float] = {}
    for id in nodes:
        way = list(_upwards(parents, id, found))
        above = parents[way[-1]] if way else None
        time = found.get(above, float("-inf")) if above is not None else float("-inf")
        for step in reversed(way):
            own = nodes[step].time
            time = time if own is None else own
            found[step] = time
    return found
