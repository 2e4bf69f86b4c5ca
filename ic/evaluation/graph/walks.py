"""Random directed graphs, and what a search from a node and the edges to a node come to."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Edge = tuple[int, int]


def draw_edges(num_nodes: int, degree: int, rng: np.random.Generator) -> Iterator[Edge]:
    """At most `num_nodes * degree` different edges, none from a node to itself.

    All nodes get their first edge before any gets its second, so that each has one.
    """
    targets: list[list[int]] = [[] for _ in range(num_nodes)]
    for _ in range(min(degree, num_nodes - 1)):
        for node in rng.permutation(num_nodes).tolist():
            while True:
                target = int(rng.integers(num_nodes))
                if target != node and target not in targets[node]:
                    break
            targets[node].append(target)
            yield node, target


def node_names(num_nodes: int, rng: np.random.Generator) -> list[str]:
    """Different names of 10 hexadecimal digits."""
    names: dict[str, None] = {}
    while len(names) < num_nodes:
        names[rng.bytes(5).hex()] = None
    return list(names)


class Graph:
    """Edges by node."""

    def __init__(self, edges: list[Edge]) -> None:
        self._children: dict[int, list[int]] = {}
        self._parents: dict[int, list[int]] = {}
        for source, target in edges:
            self._children.setdefault(source, []).append(target)
            self._parents.setdefault(target, []).append(source)

    @property
    def nodes(self) -> list[int]:
        """All nodes that an edge names, in their order."""
        return sorted(self._children.keys() | self._parents.keys())

    def parents(self, node: int) -> set[int]:
        """Nodes with an edge to a node."""
        return set(self._parents.get(node, ()))

    def at_depth(self, node: int, depth: int) -> set[int]:
        """Nodes whose shortest path from a node has exactly `depth` edges."""
        seen, level = {node}, {node}
        for _ in range(depth):
            if not level:
                break
            level = {child for each in level for child in self._children.get(each, ())} - seen
            seen |= level
        return level
