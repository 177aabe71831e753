"""How each ATen operation relates axes. Importing this package fills the table."""

from graphprune.rules import contract, conv, create, index, join, norm, pointwise, recurrent, reduce, shape
from graphprune.rules.create import NUMBERED
from graphprune.rules.table import RULES, Literal, Op, Typed, Use, find_rule, is_in_place, is_open, rule

__all__ = [
    "NUMBERED",
    "RULES",
    "Literal",
    "Op",
    "Typed",
    "Use",
    "contract",
    "conv",
    "create",
    "find_rule",
    "index",
    "is_in_place",
    "is_open",
    "join",
    "norm",
    "pointwise",
    "recurrent",
    "reduce",
    "rule",
    "shape",
]  # fmt: skip
