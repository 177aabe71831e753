"""What a constructor computes is there in a model that holds no weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphprune.rewrite.blueprint import build_empty
from tests.zoo.entries import build, model_types


@pytest.mark.zoo
@pytest.mark.parametrize("name", model_types("all")[1::8])
def test_buffers_are_those_of_the_constructor(name: str) -> None:
    model: Any = build(name, "all").model
    found = dict(build_empty(type(model), model.config).named_buffers())
    wanted = dict(type(model)._from_config(model.config).named_buffers())
    assert found.keys() == wanted.keys()
    for buffer, values in wanted.items():
        torch.testing.assert_close(found[buffer], values, rtol=0, atol=0, equal_nan=True)
    assert all(parameter.is_meta for parameter in build_empty(type(model), model.config).parameters())
