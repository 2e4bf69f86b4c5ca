"""Graphs: which nodes lie at a depth of a search, and which have an edge to a node.

As OpenAI's GraphWalks (`prompt.py`), but generated: a random graph of as many edges as the length
holds, in random order. Finding one edge is not enough; a search has to follow several, and parents
are all edges that end alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ic.evaluation.by_length import SuiteByLength
from ic.evaluation.framing import Frame, encode, frame_prompt
from ic.evaluation.graph.grid import BFS, TASKS, Config
from ic.evaluation.graph.prompt import INTRODUCTION, MARK, f1, question, read_answer
from ic.evaluation.graph.walks import Graph, draw_edges, node_names
from ic.evaluation.options import TaskCell
from ic.evaluation.suite import Sample, Score

# Fewer are no graph to search.
_LEAST_EDGES = 12
# Names of nodes whose tokens tell how many edges a length holds.
_MEASURED_EDGES = 64
# Of a cell, so that a check takes moments; they differ by a few tokens.
_CHECKED_SAMPLES = 100
# What a model may write more than the answer: its end, or the beginning of another line.
_SPARE_TOKENS = 8


def build(config: Config) -> GraphSuite:
    return GraphSuite(config)


class GraphSuite(SuiteByLength[Config]):
    """Operations on graphs."""

    name = "graph"
    title = "operations on graphs (GraphWalks)"
    picture = "graph"
    cached = True

    def tasks(self) -> Sequence[str]:
        return [task for task in TASKS if task in self.options.tasks]

    def sample(self, tokenizer: PreTrainedTokenizerBase, cell: TaskCell, index: int) -> Sample:
        """As many edges as leave room for the answer; what is left of the length is its too."""
        options = self.options
        seed = [options.seed, cell.length_tokens, TASKS.index(cell.task), index]
        rng = np.random.default_rng(seed)
        depth = int(rng.choice(options.depths)) if cell.task == BFS else 0
        introduction = encode(tokenizer, INTRODUCTION)
        line_tokens = self._line_tokens(tokenizer, rng)
        around = len(introduction) + len(self._frame(tokenizer, depth, node_names(1, rng)[0]))
        room = cell.length_tokens - around - _SPARE_TOKENS
        if room < _LEAST_EDGES * line_tokens:
            raise self._too_short(cell)
        # Some more than fit, because names differ in tokens; the last are taken away again.
        at_most = 1.02 * room / line_tokens + 4
        # At least so many that there are as many different edges.
        num_nodes = math.ceil(max(at_most / options.degree, (1 + math.sqrt(1 + 4 * at_most)) / 2))
        names = node_names(num_nodes, rng)
        edges = list(draw_edges(num_nodes, options.degree, rng))
        lines = [encode(tokenizer, f"{names[a]} -> {names[b]}\n") for a, b in edges]
        used, left = sum(map(len, lines)), -1.0
        candidates = rng.permutation(num_nodes).tolist()
        while left < 0:
            node, answer = self._ask(Graph(edges), depth, candidates)
            frame = self._frame(tokenizer, depth, names[node])
            nodes = [names[each] for each in sorted(answer)]
            needed = len(encode(tokenizer, f"{MARK} [{', '.join(nodes)}]")) + _SPARE_TOKENS
            left = cell.length_tokens - len(introduction) - len(frame) - used - needed
            # Half of what is too much, because the answer to a smaller graph may be shorter.
            too_many = math.ceil(-left / line_tokens)
            for _ in range(too_many - too_many // 2):
                if len(edges) == _LEAST_EDGES:
                    raise self._too_short(cell)
                used -= len(lines.pop())
                edges.pop()
        shuffled = [lines[each] for each in rng.permutation(len(lines))]
        ids = np.concatenate([frame.before, introduction, *shuffled, frame.after])
        expected = {"nodes": nodes, "edges": len(edges), "depth": depth}
        return Sample(ids, expected, cell.length_tokens - len(ids))

    def score(self, sample: Sample, text: str) -> Score:
        """F1, or equality; `measured` tells both apart, and whether the answer could be read."""
        # The prompt ends with the mark, and behind the line a model that is no chat model goes on.
        plain = self.options.prompt == "plain"
        given = read_answer(MARK + text.split("\n")[0] if plain else text)
        nodes = sample.expected["nodes"]
        exact = given is not None and set(given) == set(nodes)
        share = f1(given, nodes)
        measured = {
            "f1": share,
            "exact": exact,
            "read": given is not None,
            "edges": sample.expected["edges"],
            "depth": sample.expected["depth"],
        }
        return Score(nodes, text, share if self.options.scoring == "f1" else float(exact), measured)

    def settings(self) -> dict[str, Any]:
        names = ("seed", "prompt", "depths", "degree", "scoring")
        return {name: getattr(self.options, name) for name in names}

    def check(self, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        options = self.options
        options.check_positions(positions)
        for cell in self.cells():
            if cell.length_tokens > 2 * min(options.lengths):
                break
            for index in range(min(cell.samples, _CHECKED_SAMPLES)):
                self.sample(tokenizer, cell, index)

    def _frame(self, tokenizer: PreTrainedTokenizerBase, depth: int, node: str) -> Frame:
        operation = (
            f"Perform a BFS from node {node} with depth {depth}."
            if depth
            else f"Find the parents of node {node}."
        )
        prefix = f"\n\n{MARK}" if self.options.prompt == "plain" else ""
        return frame_prompt(tokenizer, self.options.prompt, question(operation), prefix)

    def _line_tokens(self, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator) -> float:
        """Tokens of an edge, on average."""
        names = node_names(2 * _MEASURED_EDGES, rng)
        text = "".join(f"{a} -> {b}\n" for a, b in zip(names[::2], names[1::2], strict=True))
        return len(encode(tokenizer, text)) / _MEASURED_EDGES

    def _ask(self, graph: Graph, depth: int, candidates: list[int]) -> tuple[int, set[int]]:
        """The first of the nodes whose answer is not empty, and the answer."""
        for node in candidates:
            answer = graph.at_depth(node, depth) if depth else graph.parents(node)
            if answer:
                return node, answer
        raise ValueError(
            f"{self.options.key('depths')}: a graph as large as the lengths hold has no node at "
            f"depth {depth} of another; choose smaller depths or longer lengths"
        )

    def _too_short(self, cell: TaskCell) -> ValueError:
        options = self.options
        return ValueError(
            f"{options.key('lengths')}: {cell.length_tokens} tokens do not hold the instructions, "
            f"{_LEAST_EDGES} edges and the answer of {cell.task}; choose longer lengths or smaller "
            "suite.graph.depths"
        )
