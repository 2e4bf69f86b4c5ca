"""The wording of GraphWalks, and how its answers are read and graded.

Source: huggingface.co/datasets/openai/graphwalks (MIT), the wording of its revision of 2026-02-27,
which asks for the nodes at exactly a depth. The edges of the example and its answers are theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

INTRODUCTION = """\
You will be given a graph as a list of directed edges. All nodes are at least degree 1. You will \
also get a description of an operation to perform on the graph.
Your job is to execute the operation on the graph and return the set of nodes that the operation \
results in. If asked for a breadth-first search (BFS), only return the nodes that are both \
reachable and exactly at that depth (not nodes at intermediate depths), and do not return the \
starting node. If asked for the parents of a node, only return the nodes that have an edge leading \
to the given node, do not return the given node itself.

Here is an example:
<begin example>

The graph has the following edges:
uvwx -> alke
abcd -> uvwx
abcd -> efgh
efgh -> uvwx

Example 1:
Operation:
Perform a BFS from node abcd with depth 1.
Final Answer: [uvwx, efgh]

Example 2:
Operation:
Perform a BFS from node alke with depth 1.
Final Answer: []

Example 3:
Operation:
Find the parents of node uvwx.
Final Answer: [abcd, efgh]

Example 4:
Operation:
Find the parents of node abcd.
Final Answer: []

<end example>

Here is the graph to operate on:
The graph has the following edges:
"""
MARK = "Final Answer:"


def question(operation: str) -> str:
    """What stands behind the edges."""
    return (
        f"\nOperation:\n{operation}\n\nYou should immediately return the set of nodes that the "
        "operation results in, with no additional text. Return your final answer as a list of "
        "nodes in the very last line of your response."
    )


def read_answer(response: str) -> list[str] | None:
    """The nodes of an answer; None where its last line is not of the form that is asked for.

    As published: the last line has to hold `Final Answer:`, and what stands between its first
    opening and its last closing bracket is divided by commas.
    """
    line = response.split("\n")[-1]
    brackets = re.search(r"\[.*\]", line)
    if MARK not in line or brackets is None:
        return None
    return [node.strip() for node in brackets[0].strip("[]").split(",") if node.strip()]


def f1(given: Iterable[str] | None, right: Iterable[str]) -> float:
    """F1 of two sets of nodes: 0 for an answer that cannot be read, 1 for two empty sets."""
    if given is None:
        return 0.0
    one, two = set(given), set(right)
    if not one and not two:
        return 1.0
    return 2 * len(one & two) / (len(one) + len(two))
