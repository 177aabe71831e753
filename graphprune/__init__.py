"""graphprune: a compiler that makes PyTorch models physically smaller."""

from graphprune._version import __version__
from graphprune.capture import language_loss, see_gradients, see_inputs
from graphprune.compiler import Pruned, Result, compile, rewrite
from graphprune.data import Calibration, calibrate
from graphprune.groups import Group, Groups, couple
from graphprune.plan import Plan, load_plan
from graphprune.propagate import Axes, propagate
from graphprune.score import Scores, combine, gather_units, score, to_units
from graphprune.select import Budget, select
from graphprune.source import open_source
from graphprune.trace import Trace, trace
from graphprune.verify import check_masked as verify


__all__ = [
    "Axes", "Budget", "Calibration", "Group", "Groups", "Plan", "Pruned", "Result", "Scores", "Trace",
    "calibrate", "combine", "compile", "couple", "gather_units", "language_loss", "load_plan", "open_source", "propagate",
    "__version__", "rewrite", "score", "see_gradients", "see_inputs", "select", "to_units", "trace", "verify",
]  # fmt: skip
