"""The difficult audio models."""

from __future__ import annotations

from tests.zoo.special import Special

AUDIO: dict[str, Special] = {}
