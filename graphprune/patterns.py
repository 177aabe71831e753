"""A name in, what equal layers have in common of it out."""

from __future__ import annotations

import re


def unnumbered(name: str) -> str:
    """``layers.3.mlp.fc1`` → ``layers.#.mlp.fc1``."""
    return re.sub(r"\d+", "#", name)
