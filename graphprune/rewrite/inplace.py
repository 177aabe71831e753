"""A transformers model, its axes and what each factor keeps in, the same model, smaller, out: there is never a second one."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from graphprune.axes import Keep
from graphprune.execute import tensors_of
from graphprune.propagate import Axes
from graphprune.rewrite.blueprint import build_empty, build_meta, hold
from graphprune.rewrite.cut import cutter
from graphprune.rewrite.module import adopt, settings_kept


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
            hold(model, traced.names, own)
    built = build_empty(type(model), config)
    with settings_kept(model, build_meta(type(model), model.config)):
        _renew_configs(model, built)
        adopt(model, built)
    return left


def _renew_configs(model: nn.Module, built: nn.Module) -> None:
    """Let every config of ``model`` say what that of ``built`` says, and ``built`` hold it: whoever shares it, the whole that the
    model is a part of, hears of its sizes."""
    mine = dict(model.named_modules())
    for path, module in built.named_modules():
        config = getattr(mine.get(path), "config", None)
        if isinstance(config, PreTrainedConfig) and isinstance(module.config, PreTrainedConfig):
            _renew(config, module.config)
            module.config = config


def _renew(config: PreTrainedConfig, new: PreTrainedConfig) -> None:
    for key in config.sub_configs:
        part, fresh = getattr(config, key, None), getattr(new, key, None)
        if isinstance(part, PreTrainedConfig) and isinstance(fresh, PreTrainedConfig):
            _renew(part, fresh)
            setattr(new, key, part)
    if config is not new:
        vars(config).clear()
        vars(config).update(vars(new))
