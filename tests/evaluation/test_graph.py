"""Graphs: what is asked, whether it is right, and how answers are read and graded."""

from __future__ import annotations

import re
from collections import defaultdict, deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ic.evaluation.graph.grid import Config
from ic.evaluation.graph.prompt import f1, read_answer
from ic.evaluation.graph.suite import GraphSuite
from ic.evaluation.graph.walks import Graph, draw_edges, node_names
from ic.evaluation.options import TaskCell
from ic.evaluation.suite import Sample
from ic.model.byte_tokenizer import ByteTokenizer
from tests.evaluation.oracle import OneByOne
from tests.evaluation.small_bpe import small_bpe

TOKENIZERS = {"bytes": ByteTokenizer(), "bpe": small_bpe()}


@pytest.fixture
def options() -> Config:
    return Config(lengths=[2560, 4096], samples=4)


def solved(prompt: str) -> list[str]:
    """The answer to a prompt, by its words: distances from a queue, parents line by line."""
    graph = prompt.split("Here is the graph to operate on:")[1]
    edges = re.findall(r"^(\w+) -> (\w+)$", graph, re.MULTILINE)
    if parents_of := re.search(r"Find the parents of node (\w+)\.", graph):
        return [source for source, target in edges if target == parents_of[1]]
    start, depth = re.search(r"BFS from node (\w+) with depth (\d+)\.", graph).groups()
    children = defaultdict(list)
    for source, target in edges:
        children[source].append(target)
    distance, queue = {start: 0}, deque([start])
    while queue:
        node = queue.popleft()
        for child in children[node]:
            if child not in distance:
                distance[child] = distance[node] + 1
                queue.append(child)
    return [node for node, far in distance.items() if far == int(depth)]


class Answering(OneByOne):
    """Continues each prompt with what `answer` makes of its text, and then with other lines."""

    def __init__(self, tokenizer, answer, behind: list[int]) -> None:
        self.tokenizer, self.answer, self.behind = tokenizer, answer, behind

    def answers(self, ids_BT: Tensor, new_tokens: int, ended=None) -> Tensor:
        rows = []
        for ids in ids_BT.tolist():
            text = self.answer(self.tokenizer.decode(ids))
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(tokens) + 8 <= new_tokens
            rows.append((tokens + self.behind * new_tokens)[:new_tokens])
        return torch.tensor(rows)


@pytest.mark.parametrize("prompt", ["plain", "chat"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_oracle_scores_all_and_silence_nothing(options: Config, name: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    suite = GraphSuite(replace(options, prompt=prompt))
    suite.check(tokenizer, 4096)
    lines = tokenizer("\n[x]\n", add_special_tokens=False)["input_ids"]
    behind = lines if prompt == "plain" else [tokenizer.eos_token_id]
    mark = "" if prompt == "plain" else "Final Answer:"

    def oracle(text: str) -> str:
        return f"{mark} [{', '.join(solved(text)[::-1])}]"

    for cell in suite.cells():
        samples = [suite.sample(tokenizer, cell, index) for index in range(4)]
        for sample in samples:
            assert len(sample.ids) + sample.new_tokens == cell.length_tokens
            answer = f" [{', '.join(sample.expected['nodes'])}]"
            needed = len(tokenizer(mark + answer, add_special_tokens=False)["input_ids"]) + 8
            # What is left over is less than three edges.
            assert needed <= sample.new_tokens < needed + 13 + 3 * 25
            assert sample.expected["nodes"]
        scores = suite.answer(Answering(tokenizer, oracle, behind), tokenizer, samples)
        assert [(score.correct, score.measured["exact"]) for score in scores] == [(1.0, True)] * 4
        for said in ("", " I do not know"):
            silent = Answering(tokenizer, lambda text, said=said: said, behind)
            scores = suite.answer(silent, tokenizer, samples)
            assert [score.correct for score in scores] == [0.0] * 4


def test_a_sample_by_hand(options: Config) -> None:
    suite = GraphSuite(replace(options, depths=[2]))
    sample = suite.sample(ByteTokenizer(), TaskCell("bfs", 2560, 4), 1)
    text = bytes(sample.ids.tolist()).decode()
    assert text.startswith("You will be given a graph as a list of directed edges. All nodes are")
    assert text.endswith("in the very last line of your response.\n\nFinal Answer:")
    assert "with depth 2.\n\nYou should immediately return" in text
    edges = re.findall(r"^([0-9a-f]{10}) -> ([0-9a-f]{10})$", text, re.MULTILINE)
    assert len(edges) == len(set(edges)) == sample.expected["edges"]
    assert all(source != target for source, target in edges)
    sources = [source for source, _ in edges]
    assert sources != sorted(sources, key=sources.index)  # in no order
    assert max(map(sources.count, sources)) == 3
    assert sorted(solved(text)) == sorted(sample.expected["nodes"])


def test_longer_prompts_have_more_edges(options: Config) -> None:
    suite, tokenizer = GraphSuite(options), ByteTokenizer()
    short, long = (
        [suite.sample(tokenizer, TaskCell("bfs", length, 20), i).expected for i in range(20)]
        for length in (2560, 16384)
    )
    assert {each["depth"] for each in short} == {1, 2, 3}
    # 25 bytes an edge and about 1,400 around them; a search of three levels finds up to 27 nodes.
    assert all(36 <= each["edges"] <= 46 for each in short)
    assert all(584 <= each["edges"] <= 600 for each in long)


def test_a_dense_graph_is_as_long(options: Config) -> None:
    """More edges a node than there are others: the graph has fewer nodes, and each edge once."""
    suite = GraphSuite(replace(options, degree=10**9))
    sample = suite.sample(ByteTokenizer(), TaskCell("parents", 2560, 4), 0)
    text = bytes(sample.ids.tolist()).decode()
    edges = re.findall(r"^([0-9a-f]{10}) -> ([0-9a-f]{10})$", text, re.MULTILINE)
    assert 36 <= len(edges) == len(set(edges)) <= 46
    assert len({node for edge in edges for node in edge}) == 8  # 56 edges; 7 would have 42
    assert len(sample.ids) + sample.new_tokens == 2560


def test_walks_by_hand() -> None:
    graph = Graph([(0, 1), (0, 2), (1, 3), (2, 3), (3, 0), (3, 4), (2, 1)])
    assert (graph.at_depth(0, 1), graph.at_depth(0, 2)) == ({1, 2}, {3})
    assert graph.at_depth(0, 3) == {4}  # not the start, to which an edge leads back
    assert graph.at_depth(4, 1) == set()
    assert (graph.parents(3), graph.parents(1), graph.parents(4)) == ({1, 2}, {0, 2}, {3})


def test_edges_are_different_and_leave_every_node() -> None:
    edges = list(draw_edges(30, 3, np.random.default_rng(0)))
    assert len(set(edges)) == len(edges) == 90
    assert {source for source, _ in edges[:30]} == set(range(30))
    assert all(source != target for source, target in edges)
    assert len(list(draw_edges(2, 3, np.random.default_rng(0)))) == 2
    names = node_names(1000, np.random.default_rng(0))
    assert len(set(names)) == 1000
    assert all(re.fullmatch("[0-9a-f]{10}", name) for name in names)


# What the code on the data set's page answers for these texts; it was run once for this table.
PUBLISHED = [
    ("Final Answer: [a1, b2]", ["a1", "b2"]),
    ("Thinking...\nFinal Answer: [a1,b2 ]", ["a1", "b2"]),
    ("Final Answer: []", []),
    ("Final Answer: [ ]", []),
    ("Final Answer: [a1, , b2,]", ["a1", "b2"]),
    ("Final Answer: [[a1], [b2]]", ["a1]", "[b2"]),
    ("Final Answer:[a1]", ["a1"]),
    ("The Final Answer: see [a1] and [b2].", ["a1] and [b2"]),
    ("Final Answer: a1, b2", None),
    ("final answer: [a1]", None),
    ("Final Answer: [a1]\n", None),
    ("Final Answer: [a1]\nThat is all.", None),
    ("[a1]", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "nodes"), PUBLISHED)
def test_answers_are_read_as_published(response: str, nodes: list[str] | None) -> None:
    assert read_answer(response) == nodes


def test_f1_by_hand() -> None:
    assert f1(["a", "b"], ["b", "a", "a"]) == 1
    assert f1(["a", "x"], ["a", "b", "c"]) == pytest.approx(2 * 0.5 * (1 / 3) / (0.5 + 1 / 3))
    assert f1(["x"], ["a"]) == 0
    assert f1([], ["a"]) == 0
    assert f1(["a"], []) == 0
    assert f1([], []) == 1  # both are empty
    assert f1(None, []) == 0  # nothing could be read


def test_equality_can_be_asked_for(options: Config) -> None:
    sample = Sample(np.zeros(1), {"nodes": ["a", "b"], "edges": 12, "depth": 1}, 9)
    half = GraphSuite(options).score(sample, " [a]\nmore")
    assert half.correct == pytest.approx(2 / 3)
    exact = GraphSuite(replace(options, scoring="exact"))
    assert exact.score(sample, " [a]").correct == 0
    assert exact.score(sample, " [b, a]").correct == 1
    assert exact.settings() != GraphSuite(options).settings()


def test_samples_depend_on_their_cell_and_index_alone(options: Config) -> None:
    def ids(options: Config, index: int) -> list[int]:
        cell = TaskCell("parents", 2560, 4)
        return GraphSuite(options).sample(ByteTokenizer(), cell, index).ids.tolist()

    assert ids(options, 1) == ids(replace(options, samples=9), 1)
    assert ids(options, 1) != ids(options, 2)
    assert ids(options, 1) != ids(replace(options, seed=0), 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"lengths": [1024]},
            r"lengths=\[1024\]: 1024 tokens do not hold the instructions, 12 edg",
        ),
        ({"lengths": [2560, 8192]}, r"lengths=\[2560, 8192\]: the model has 4,096 positions"),
        ({"depths": [10**12]}, r"depths=\[1000000000000\]: a graph as large"),
        ({"depths": [40]}, r"depths=\[40\]: a graph as large .* no node at depth 40 of another"),
        ({"depths": [0]}, r"suite\.graph\.depths=\[0\]: at least one, each at least 1"),
        ({"depths": []}, r"suite\.graph\.depths=\[\]: at least one"),
        ({"tasks": ["dfs"]}, r"suite\.graph\.tasks=\['dfs'\]: one or both of bfs, parents"),
        ({"degree": 0}, r"suite\.graph\.degree=0: must be at least 1"),
        ({"scoring": "auc"}, r"suite\.graph\.scoring=auc: choose f1 or exact"),
    ],
)
def test_what_cannot_be_asked(options: Config, given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GraphSuite(replace(options, **given)).check(ByteTokenizer(), 4096)
