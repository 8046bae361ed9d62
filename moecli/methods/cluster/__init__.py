"""Decide which experts become one: what every `cluster/...` method shares. Nothing is merged here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pydantic import PositiveInt

from moecli.core.errors import Problem
from moecli.core.model import ModelFacts, ModelSketch
from moecli.core.stage import Options


class Cluster(Options):
    """Options of a clustering method."""

    keep: PositiveInt
    """Experts left per layer, that is, clusters."""

    def problems(self, model: ModelFacts) -> Iterator[Problem]:
        if self.keep > model.experts:
            yield Problem(
                "keep",
                f"`keep` must be at most the model's {model.experts} experts, got {self.keep}",
                hint=f"`keep` counts the experts left per layer; `keep: {max(1, model.experts // 2)}` halves them",
            )

    def forecast(self, model: ModelSketch) -> ModelSketch:
        return replace(model, planned=self.keep)
