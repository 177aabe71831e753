"""graphprune: a compiler that makes PyTorch models physically smaller."""

from graphprune._version import __version__
from graphprune.collecting import uncollected

with uncollected():
    from graphprune.budget import Budget
    from graphprune.capture import see_inputs
    from graphprune.compiler import Result, compile
    from graphprune.data import Calibration, calibrate
    from graphprune.emission import rewrite
    from graphprune.facts import Pruned
    from graphprune.gradients import language_loss, see_gradients
    from graphprune.groups import Group, Groups, couple
    from graphprune.masks import sparsify
    from graphprune.output import save
    from graphprune.pieces import Layers, branches, layers
    from graphprune.plan import Plan, load_plan
    from graphprune.propagate import Axes, propagate
    from graphprune.recover import recover
    from graphprune.replay import replay
    from graphprune.rewrite.checkpoint import load
    from graphprune.score import Scores, combine, gather_units, score, to_units
    from graphprune.select import select
    from graphprune.source import open_source
    from graphprune.sparse import Matrix, Moments, Norms, Pattern, Sparse, lowest
    from graphprune.streamed import compile_streamed
    from graphprune.trace import Trace, trace
    from graphprune.training import Penalty, Successive, become, shrink
    from graphprune.verify import check_masked as verify

__all__ = [
    "Axes",
    "Budget",
    "Calibration",
    "Group",
    "Groups",
    "Layers",
    "Matrix",
    "Moments",
    "Norms",
    "Pattern",
    "Penalty",
    "Plan",
    "Pruned",
    "Result",
    "Scores",
    "Sparse",
    "Successive",
    "Trace",
    "__version__",
    "become",
    "branches",
    "calibrate",
    "combine",
    "compile",
    "compile_streamed",
    "couple",
    "gather_units",
    "language_loss",
    "layers",
    "load",
    "load_plan",
    "lowest",
    "open_source",
    "propagate",
    "recover",
    "replay",
    "rewrite",
    "save",
    "score",
    "see_gradients",
    "see_inputs",
    "select",
    "shrink",
    "sparsify",
    "to_units",
    "trace",
    "verify",
]  # fmt: skip
