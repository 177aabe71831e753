"""The model zoo: a transformers model type in, a small model with sharp random weights and its example inputs out.

    entry = build("llama", "causal")
    entry.model(**entry.inputs)

`python -m tests.zoo.configs --family causal` says of each type whether it builds, runs and exports.
"""

from __future__ import annotations

from tests.zoo.entries import FAMILIES, Entry, build, model_types
from tests.zoo.sweep import main
from tests.zoo.weights import sharpen

__all__ = ["FAMILIES", "Entry", "build", "model_types", "sharpen"]

if __name__ == "__main__":
    main()
