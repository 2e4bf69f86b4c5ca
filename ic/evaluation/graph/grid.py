"""What a graph evaluation measures: which operation, how deep, at which lengths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ic.errors import check_once
from ic.evaluation.options import SuiteOptions

BFS, PARENTS = "bfs", "parents"
TASKS = (BFS, PARENTS)
SCORES = ("f1", "exact")


@dataclass
class Config(SuiteOptions):
    """Operations on a directed graph that is given as a list of edges.

    Attributes:
        tasks: `bfs`: the nodes at exactly a depth of a breadth-first search; `parents`: those with
            an edge to a node.
        depths: of the searches; a sample draws one of them.
        degree: edges that leave a node, on average at most.
        scoring: `f1` over the two sets of nodes, as published, or `exact`: 1 if they are equal.
    """

    suite: ClassVar[str] = "graph"

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    depths: list[int] = field(default_factory=lambda: [1, 2, 3])
    degree: int = 3
    scoring: str = "f1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"{self.key('tasks')}: one or both of {', '.join(TASKS)}")
        check_once("suite.graph.tasks", self.tasks)
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"{self.key('depths')}: at least one, each at least 1")
        check_once("suite.graph.depths", self.depths)
        if self.degree < 1:
            raise ValueError(f"{self.key('degree')}: must be at least 1")
        if self.scoring not in SCORES:
            raise ValueError(f"{self.key('scoring')}: choose {' or '.join(SCORES)}")
