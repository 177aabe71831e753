"""How each ATen operation relates axes. Importing this package fills the table."""

from graphprune.rules import contract, conv, create, index, join, norm, pointwise, recurrent, reduce, shape
from graphprune.rules.table import RULES, Literal, Op, Typed, Use, find_rule, is_in_place, rule

__all__ = [
    "RULES", "Literal", "Op", "Typed", "Use", "find_rule", "is_in_place", "rule",
    "contract", "conv", "create", "index", "join", "norm", "pointwise", "recurrent", "reduce", "shape",
]  # fmt: skip
