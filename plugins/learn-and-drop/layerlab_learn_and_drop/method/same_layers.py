"""What freezing alone gives: the layers that Learn&Drop drops, frozen in the same epochs."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import PrivateAttr
from torch import Tensor, nn

from layerlab import LayerlabError, Preflight, Run, Strategy
from layerlab_learn_and_drop.method.statistics import batch_norms, settle


class Decisions(dict[int, dict[int, tuple[str, ...]]]):
    """Seed → epoch → modules that were dropped or frozen in it. Copies of a strategy share one."""

    def __deepcopy__(self, memo: Any) -> Decisions:
        return self


class SameLayersFrozen(Strategy):
    """Freezes the layers that a `LearnAndDrop` of the same comparison drops, in the same epochs: what dropping adds.

    Made by `LearnAndDrop.same_layers_frozen()`; the arm stands after that of the strategy whose decisions it takes. Its
    batch-norm statistics are made anew as that strategy's are.
    """

    name: ClassVar[str] = "same-layers-frozen"
    needs: ClassVar[frozenset[str]] = frozenset({"one tensor"})
    follows_layers: ClassVar[bool] = True

    _shared: Decisions = PrivateAttr(default_factory=Decisions)

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        """Say that another arm decides."""
        return Preflight.of(network, notes=("It freezes those of these layers that learn-and-drop drops or freezes.",))

    def on_epoch_start(self, run: Run) -> None:
        """Freeze.

        Raises:
            LayerlabError: the strategy that decides has not come to this epoch.
        """
        decided = self._shared.get(run.generator.initial_seed(), {})
        if run.epoch not in decided:
            raise LayerlabError(
                "same-layers-frozen takes its decisions from learn-and-drop: make it with "
                "LearnAndDrop.same_layers_frozen() and give it to the same compare() as a later arm."
            )
        names = decided[run.epoch]
        new = [name for name in names if name not in decided.get(run.epoch - 1, ())]
        seed = run.generator.initial_seed() + run.epoch
        settle(run, run.model, batch_norms(run.model, new), run.data, seed)
        run.freeze(self.name, [run.model.get_submodule(name) for name in names])
        run.log(f"{self.name}/frozen_modules", len(names))
