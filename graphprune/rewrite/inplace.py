"""A transformers model, its axes and what each factor keeps in, the same model, smaller, out: there is never a second one."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from graphprune.axes import Keep
from graphprune.execute import tensors_of
from graphprune.propagate import Axes
from graphprune.rewrite.blueprint import build_empty, put
from graphprune.rewrite.cut import cutter
from graphprune.rewrite.module import adopt


def cut_in_place(model: PreTrainedModel, axes: Axes, keep: Keep, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Make ``model`` what ``config`` describes: tensor by tensor, what is left takes the place of the whole, whose memory is free
    then unless somebody else holds it. Ties stay ties, gradients are forgotten. Returns the smaller tensors, as ``cut_all`` does.
    """
    cut, tensors, left = cutter(axes, keep), tensors_of(model, axes.trace), {}
    for name, traced in {tensor.name: tensor for tensor in axes.trace.tensors.values()}.items():
        whole = tensors.pop(name)
        left[name] = smaller = cut(name, whole).detach()
        if smaller.shape != whole.shape and traced.kind != "constant":
            own = nn.Parameter(smaller, requires_grad=whole.requires_grad) if isinstance(whole, nn.Parameter) else smaller
            put(model, traced.names, own)
    adopt(model, build_empty(type(model), config))
    return left
