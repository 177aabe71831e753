"""How each ATen operation relates axes. Importing this package fills the table."""

from graphprune.rules import contract, conv, create, index, join, norm, pointwise, reduce, shape
from graphprune.rules.table import RULES, Literal, Op, Typed, Use, find_rule, rule

__all__ = [
    "RULES", "Literal", "Op", "Typed", "Use", "find_rule", "rule",
    "contract", "conv", "create", "index", "join", "norm", "pointwise", "reduce", "shape",
]  # fmt: skip
