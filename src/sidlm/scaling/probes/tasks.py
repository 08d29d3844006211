"""Generators of probe tasks: problems, their split, and rows of tokens.

A *problem* is what has to be understood, a *row* one way to write it. The split is made over problems, before any
augmentation: the order of facts, of queries and of commuting operands and the names of symbols belong to the row.
`canonical` is the same for all ways to write a problem, and its hash alone says which side of the split it is on. A
function of a task gets a numpy generator and nothing else, so a seed gives the same problems everywhere.

Labels stand where the answer is to be given and are read off the row's last hidden states, as next tokens are;
elsewhere they are -100. "Fast and Simplex" (arXiv 2507.02754), section 5 and appendix A, for Match3; Sanford et al.
2023 and 2024 for Match3 and k-hop induction; Kozachinskiy et al. (arXiv 2501.19215) for the compositions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORE = -100
TEST_SHARE = 0.2
"""Share of the canonical problems that are for testing."""
Rng = np.random.Generator
Row = tuple[list[int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """problem(rng) -> a problem; canonical(problem) -> its hashable identity; row(problem, rng) -> (tokens, labels),
    both `length` long. chance: accuracy of an answer that ignores the row."""

    about: str
    vocab: int
    length: int
    chance: float
    problem: Callable[[Rng], Any]
    canonical: Callable[[Any], Any]
    row: Callable[[Any, Rng], Row]


def is_test(canonical: Any) -> bool:
    """The side of the split, from a hash that is the same on every machine."""
    digest = hashlib.blake2b(repr(canonical).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < TEST_SHARE * 2**64


def problems(task: Task, count: int, *, test: bool, seed: int) -> list[Any]:
    """`count` problems of one side of the split, all of another canonical form.

    Raises ValueError if the task has not so many.
    """
    rng = np.random.default_rng([seed, int(test)])
    found: dict[Any, Any] = {}
    for _ in range(50 * count + 2_000):
        problem = task.problem(rng)
        identity = task.canonical(problem)
        if is_test(identity) == test:
            found.setdefault(identity, problem)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"only {len(found)} of {count} different {'test' if test else 'training'} problems were found")


def batch(task: Task, chosen: list[Any], rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels, int64 (len(chosen), length) each, of freshly written rows of the problems."""
    rows = [task.row(problem, rng) for problem in chosen]
    tokens, labels = (np.array([row[i] for row in rows], dtype=np.int64) for i in (0, 1))
    return tokens, labels


def answered(tokens: list[int], answers: dict[int, int]) -> Row:
    """A row whose answer at each position is given."""
    return tokens, [answers.get(i, IGNORE) for i in range(len(tokens))]


def match3(modulus: int = 61, context: int = 10, queries: int = 6) -> Task:
    """Numbers, then queries: are there two of the numbers (or one twice) that sum with the query to 0 mod M?

    Half of the queries have such a pair. Appending the queries makes all pairs causal; theorem 5.1 has them all in one.
    """
    no, yes = 2 * modulus, 2 * modulus + 1

    def sums(numbers: tuple[int, ...]) -> set[int]:
        return {(-a - b) % modulus for a in numbers for b in numbers}

    def problem(rng: Rng) -> tuple[int, ...]:
        while True:
            numbers = tuple(int(x) for x in rng.integers(0, modulus, context))
            if min(len(sums(numbers)), modulus - len(sums(numbers))) >= queries:
                return numbers

    def row(numbers: tuple[int, ...], rng: Rng) -> Row:
        hits = sorted(sums(numbers))
        misses = sorted(set(range(modulus)) - set(hits))
        half = queries // 2
        asked = [(int(x), yes) for x in rng.choice(hits, half, replace=False)]
        asked += [(int(x), no) for x in rng.choice(misses, queries - half, replace=False)]
        asked = [asked[i] for i in rng.permutation(queries)]
        tokens = [numbers[i] for i in rng.permutation(context)] + [modulus + x for x, _ in asked]
        return answered(tokens, {context + i: answer for i, (_, answer) in enumerate(asked)})

    return Task(
        about=f"is x + y + z = 0 mod {modulus} for a query x and two of {context} numbers",
        vocab=2 * modulus + 2, length=context + queries, chance=0.5,
        problem=problem, canonical=lambda p: tuple(sorted(p)), row=row,
    )  # fmt: skip


def function_composition(size: int = 6, queries: int = 6) -> Task:
    """Facts of two random functions, f and g, in random order as pairs (argument, value); queries x ask for g(f(x))."""

    def problem(rng: Rng) -> tuple[tuple[int, ...], tuple[int, ...]]:
        f, g = rng.integers(0, size, (2, size)).tolist()
        return tuple(f), tuple(g)

    def row(functions: tuple[tuple[int, ...], tuple[int, ...]], rng: Rng) -> Row:
        f, g = functions
        facts = [(x, 3 * size + f[x]) for x in range(size)] + [(size + x, 3 * size + g[x]) for x in range(size)]
        tokens = [token for i in rng.permutation(len(facts)) for token in facts[i]]
        asked = [int(x) for x in rng.permutation(size)[:queries]]
        answers = {len(tokens) + i: 3 * size + g[f[x]] for i, x in enumerate(asked)}
        return answered([*tokens, *(2 * size + x for x in asked)], answers)

    return Task(
        about=f"g(f(x)) of two functions on {size} things, given by facts", vocab=4 * size,
        length=4 * size + queries, chance=1 / size, problem=problem, canonical=lambda p: p, row=row,
    )  # fmt: skip


def relation_composition(size: int = 6, pairs: int = 7, queries: int = 4) -> Task:
    """Pairs of two relations R and S in random order; queries (x, z): is there a y with x R y and y S z? Half yes."""
    no, yes = 6 * size, 6 * size + 1
    everything = [(x, z) for x in range(size) for z in range(size)]

    def composed(relations: Any) -> set[tuple[int, int]]:
        r, s = relations
        return {(x, z) for x, y in r for y2, z in s if y == y2}

    def problem(rng: Rng) -> tuple[tuple[tuple[int, int], ...], ...]:
        while True:
            both = tuple(
                tuple(sorted(everything[i] for i in rng.choice(size * size, pairs, replace=False))) for _ in range(2)
            )
            if queries // 2 <= len(composed(both)) <= size * size - queries:
                return both

    def row(relations: Any, rng: Rng) -> Row:
        facts = [(2 * side * size + a, (2 * side + 1) * size + b) for side in (0, 1) for a, b in relations[side]]
        tokens = [token for i in rng.permutation(len(facts)) for token in facts[i]]
        true = composed(relations)
        sides = (sorted(true), sorted(set(everything) - true))
        half = queries // 2
        asked = [(side, sides[side][i]) for side, n in ((0, half), (1, queries - half))
                 for i in rng.choice(len(sides[side]), n, replace=False)]  # fmt: skip
        answers = {}
        for i in rng.permutation(queries):
            side, (x, z) = asked[i]
            tokens += [4 * size + x, 5 * size + z]
            answers[len(tokens) - 1] = (yes, no)[side]
        return answered(tokens, answers)

    return Task(
        about=f"is (x, z) in the composition of two relations of {pairs} pairs on {size} things", vocab=6 * size + 2,
        length=4 * pairs + 2 * queries, chance=0.5, problem=problem, canonical=lambda p: p, row=row,
    )  # fmt: skip


def hop(word: list[int], at: int, hops: int) -> int | None:
    """The position `hops` induction steps back: each goes to just behind the last earlier occurrence of its symbol."""
    for _ in range(hops):
        before = [j for j in range(at) if word[j] == word[at]]
        if not before:
            return None
        at = before[-1] + 1
    return at


def k_hop(hops: int = 2, symbols: int = 6, length: int = 32, scored: int = 16) -> Task:
    """k-hop induction heads: at each of the last positions, the symbol that k steps of induction lead to.

    A row is a word with its symbols renamed: the problem is the word up to renaming.
    """

    def problem(rng: Rng) -> tuple[int, ...]:
        return tuple(int(x) for x in rng.integers(0, symbols, length))

    def canonical(word: tuple[int, ...]) -> tuple[int, ...]:
        names: dict[int, int] = {}
        return tuple(names.setdefault(x, len(names)) for x in word)

    def row(word: tuple[int, ...], rng: Rng) -> Row:
        names = rng.permutation(symbols)
        tokens = [int(names[x]) for x in word]
        ends = {i: hop(tokens, i, hops) for i in range(length - scored, length)}
        return answered(tokens, {i: tokens[end] for i, end in ends.items() if end is not None})

    return Task(
        about=f"{hops}-hop induction over {symbols} symbols", vocab=symbols, length=length, chance=1 / symbols,
        problem=problem, canonical=canonical, row=row,
    )  # fmt: skip


def modular_sum(modulus: int = 31) -> Task:
    """a + b + c mod p, one sum a row. Its three numbers commute, so all their orders are one problem."""

    def row(numbers: tuple[int, ...], rng: Rng) -> Row:
        return answered([*(numbers[i] for i in rng.permutation(3)), modulus], {3: sum(numbers) % modulus})

    return Task(
        about=f"a + b + c mod {modulus}", vocab=modulus + 1, length=4, chance=1 / modulus,
        problem=lambda rng: tuple(int(x) for x in rng.integers(0, modulus, 3)),
        canonical=lambda p: tuple(sorted(p)), row=row,
    )  # fmt: skip


def brackets(modulus: int = 5, leaves: int = 5) -> Task:
    """The value mod p of a bracketed expression of sums and products, equally often each value.

    Both operations commute: trees that differ in the order of operands are one problem.
    """
    plus, times, left, right, equals = range(modulus, modulus + 5)

    def tree(rng: Rng, count: int) -> Any:
        if count == 1:
            return int(rng.integers(0, modulus))
        first = int(rng.integers(1, count))
        return (int(rng.integers(0, 2)), tree(rng, first), tree(rng, count - first))

    def value(node: Any) -> int:
        if isinstance(node, int):
            return node
        kind, a, b = node
        return (value(a) * value(b) if kind else value(a) + value(b)) % modulus

    def problem(rng: Rng) -> Any:
        wanted = int(rng.integers(0, modulus))
        while True:  # products make 0 more frequent than the rest
            node = tree(rng, leaves)
            if value(node) == wanted:
                return node

    def canonical(node: Any) -> Any:
        if isinstance(node, int):
            return node
        return (node[0], *sorted((canonical(node[1]), canonical(node[2])), key=repr))

    def written(node: Any, rng: Rng) -> list[int]:
        if isinstance(node, int):
            return [node]
        kind, a, b = node if rng.integers(0, 2) else (node[0], node[2], node[1])
        return [left, *written(a, rng), times if kind else plus, *written(b, rng), right]

    def row(node: Any, rng: Rng) -> Row:
        tokens = [*written(node, rng), equals]
        return answered(tokens, {len(tokens) - 1: value(node)})

    return Task(
        about=f"bracketed expressions of {leaves} numbers mod {modulus}", vocab=modulus + 5, length=4 * leaves - 2,
        chance=1 / modulus, problem=problem, canonical=canonical, row=row,
    )  # fmt: skip


TASKS: dict[str, Callable[[], Task]] = {
    "match3": match3,
    "match3-17": lambda: match3(modulus=17, context=4),
    "function-composition": function_composition,
    "relation-composition": relation_composition,
    "k-hop": k_hop,
    "modular-sum": modular_sum,
    "brackets": brackets,
}
