"""Layer skip learning: convolutions whose weights hardly moved in an epoch are left out of the next backward pass.

Y. Miyauchi et al., "Layer Skip Learning using LARS variables for 39% Faster Conversion Time and Lower Bandwidth",
IEEE ICECS 2018. Section III, equations (1) to (3), Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from layerlab import FitResult, LayerMap, Preflight, Run, Strategy
from layerlab_lars_skip.method.convolutions import Convolutions, find_convolutions, step_flops
from layerlab_lars_skip.method.planned import PlannedFreezing, alternation


def lars_variable(weight: Tensor, before: Tensor) -> float:
    """nw = ‖w‖₂ / ‖w − w_before‖₂, equations (1) to (3): large where a layer moved little for its size.

    Args:
        weight: a layer's weights at the end of an epoch, any shape.
        before: the same at the epoch's start.

    Returns:
        nw ≥ 0; infinite for a layer that did not move.
    """
    moved = torch.linalg.vector_norm(weight.double() - before.double()).item()
    size = torch.linalg.vector_norm(weight.double()).item()
    return size / moved if moved > 0 else math.inf


class LarsSkip(Strategy):
    """Skip the backward pass of the convolutions up to the last one whose LARS variable exceeds a threshold.

    After each epoch, nw of every convolution that learned in it is measured. In the next epoch, the last convolution
    l with nw > α and every layer nearer the input get no backward pass and no update (Algorithm 1); the convolutions
    after l and the fully connected layers learn. A skipped layer has not moved, so its nw is not defined for that
    epoch: `memory` says what counts instead. Neither is that of a layer that the user or another strategy froze, which
    is never taken for a finished one. In a network that ends in a convolution, that one is never skipped.
    """

    name: ClassVar[str] = "lars-skip"
    needs: ClassVar[frozenset[str]] = frozenset({"one tensor"})
    follows_layers: ClassVar[bool] = True

    alpha: float = Field(2.0, ge=0)
    """Threshold of rule `fixed`; infinite never skips."""
    rule: Literal["fixed", "own-history"] = "fixed"
    """`fixed`: nw > alpha, the paper's. `own-history`: nw above the geometric mean of the layer's own nw of the earlier
    epochs in which it learned, so that no threshold has to be found for a dataset or a network."""
    memory: Literal["forget", "keep"] = "forget"
    """What a skipped layer's nw counts as: `forget`, undefined, so that it learns again and is measured; `keep`, the
    last one measured."""
    forget_after: int | None = Field(None, ge=1)
    """With `keep`: forget it after this many skipped epochs in a row. Default: never."""

    _found: Convolutions = PrivateAttr(default_factory=Convolutions)
    _before: dict[int, Tensor] = PrivateAttr(default_factory=dict)
    _edge: int = PrivateAttr(0)
    _latest: list[float | None] = PrivateAttr(default_factory=list)
    _age: list[int] = PrivateAttr(default_factory=list)
    _log_sum: list[float] = PrivateAttr(default_factory=list)
    _count: list[int] = PrivateAttr(default_factory=list)

    @property
    def skipped(self) -> int:
        """How many convolutions, from the input on, the next epoch skips."""
        return self._edge

    @property
    def layers(self) -> list[str]:
        """The names of the network's convolutions in forward order."""
        return list(self._found.names)

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        """Say which layers can be skipped, and what an epoch saves that skips them all.

        Raises:
            Refused: as `on_fit_start`.
        """
        found = find_convolutions(network, example)
        prefix = found.prefixes[found.most - 1]
        skippable = {inner for module in prefix for inner in module.modules()}
        covered = [name for name, module in network.named_modules()
                   if module in skippable and next(module.parameters(recurse=False), None) is not None]
        notes = []
        if found.most < len(found.names):
            notes.append(f"{found.names[found.most]} always learns, so that something is left to learn.")
        saved = 1 - step_flops(network, example, prefix) / step_flops(network, example, ())
        return Preflight.of(
            network, covered, found.unmeasured, otherwise="no convolution that may be skipped comes after it",
            saves={"training FLOPs in an epoch that skips all of these": saved}, notes=notes)

    def on_fit_start(self, run: Run) -> None:
        """Find the convolutions in forward order.

        Raises:
            Refused: the network has none that learns, or nothing but them and a single one.
        """
        self._found = find_convolutions(run.model, run.example)
        count = len(self._found.names)
        self._edge = 0
        self._latest, self._age = [None] * count, [0] * count
        self._log_sum, self._count = [0.0] * count, [0] * count

    def on_epoch_start(self, run: Run) -> None:
        run.freeze(self.name, self._found.prefixes[self._edge - 1] if self._edge else ())
        self._before = {
            index: self._weight(run, index).detach().clone() for index in range(self._edge, len(self._found.names))
            if self._found.names[index] not in self._found.unmeasured
        }
        run.log("lars-skip/skipped_layers", self._edge)

    def on_epoch_end(self, run: Run) -> None:
        variables = {}
        for index, before in self._before.items():
            value = lars_variable(self._weight(run, index).detach(), before)
            # A layer that stood still was not trained: it is frozen by the user or by another strategy, or the tail of
            # the network trains without it. Its nw says nothing.
            if math.isfinite(value):
                variables[index] = value
                run.log(f"lars-skip/nw/{self._found.names[index]}", value)
        self._before = {}
        self.decide(variables)

    def decide(self, variables: dict[int, float]) -> int:
        """Algorithm 1: choose the next epoch's edge from this epoch's nw.

        Args:
            variables: index of a convolution in forward order → its nw, finite; those that did not learn are missing.

        Returns:
            The number of convolutions to skip.
        """
        self._edge = 0
        for index in range(len(self._latest)):
            threshold = self._threshold(index)
            if index in variables:
                self._latest[index], self._age[index] = variables[index], 0
                if variables[index] > 0:
                    self._log_sum[index] += math.log(variables[index])
                    self._count[index] += 1
            else:
                self._age[index] += 1
                forgotten = self.forget_after is not None and self._age[index] >= self.forget_after
                if self.memory == "forget" or forgotten:
                    self._latest[index] = None
            value = self._latest[index]
            if value is not None and value > threshold:
                self._edge = min(index + 1, self._found.most)
        return self._edge

    def _threshold(self, index: int) -> float:
        if self.rule == "fixed":
            return self.alpha
        return math.exp(self._log_sum[index] / self._count[index]) if self._count[index] else math.inf

    def _weight(self, run: Run, index: int) -> Tensor:
        weight = run.model.get_submodule(self._found.names[index]).weight
        assert isinstance(weight, Tensor)
        return weight

    def state_dict(self) -> dict[str, Any]:
        return {"edge": self._edge, "latest": self._latest, "age": self._age, "log_sum": self._log_sum,
                "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._edge, self._latest, self._age = state["edge"], list(state["latest"]), list(state["age"])
        self._log_sum, self._count = list(state["log_sum"]), list(state["count"])

    def placebo(self, result: FitResult) -> Strategy | None:
        """Alternation at fixed epochs that saves the same FLOPs; None where the run skipped nothing."""
        plan = alternation(result.history)
        return PlannedFreezing(plan=plan) if plan else None

    def layer_maps(self, history: Sequence[Mapping[str, Any]]) -> dict[str, LayerMap]:
        """Which convolution was skipped in which epoch, and nw of those that learned."""
        skipped = pd.DataFrame(
            {row["epoch"]: [int(index < row["lars-skip/skipped_layers"]) for index in range(len(self.layers))]
             for row in history}, index=self.layers)
        variables = pd.DataFrame(
            {row["epoch"]: [math.log10(row.get(f"lars-skip/nw/{layer}", 0) or math.nan) for layer in self.layers]
             for row in history}, index=self.layers)
        return {"skipped": LayerMap(skipped, "", ("learns", "skipped")),
                "LARS variable": LayerMap(variables, "log₁₀ of nw")}
