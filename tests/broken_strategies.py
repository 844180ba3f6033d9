"""Strategies that break one rule of the contract each; the name is the check of `layerlab.testing` that says so."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import AfterValidator, PrivateAttr
from torch import Tensor, nn

from layerlab import LayerlabError, Preflight, Refused, Run, Split, Strategy
from layerlab.testing.networks import mlp, plain_cnn


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


class SettingsRoundTrip(Strategy):
    name: ClassVar[str] = "settings-round-trip"
    first: Annotated[int, AfterValidator(lambda value: value - 1)] = 3
    """Counted from one, kept from zero: each way through YAML takes one away."""


def _climb(run: Run) -> None:
    """Turn the gradients round, so that the loss rises."""
    for parameter in run.model.parameters():
        if parameter.grad is not None:
            parameter.grad = -0.01 * parameter.grad.sign()


class TrainsMlp(Strategy):
    name: ClassVar[str] = "trains-mlp"

    def on_after_backward(self, run: Run) -> None:
        if not _convolutions(run.model):
            _climb(run)


class TrainsCnn(Strategy):
    name: ClassVar[str] = "trains-cnn"

    def on_after_backward(self, run: Run) -> None:
        if _convolutions(run.model) and not _norms(run.model):
            _climb(run)


class TrainsResidual(Strategy):
    name: ClassVar[str] = "trains-residual"

    @classmethod
    def example_network(cls, shape: tuple[int, int, int], classes: int) -> nn.Module:
        return plain_cnn()

    def on_after_backward(self, run: Run) -> None:
        if _norms(run.model):
            _climb(run)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Uphill(nn.Module):
    """Turns gradients round, so that training goes the wrong way."""

    def forward(self, x: Tensor) -> Tensor:
        return _Reversed.apply(x)


class TrainsExample(Strategy):
    name: ClassVar[str] = "trains-example"

    @classmethod
    def example_network(cls, shape: tuple[int, int, int], classes: int) -> nn.Module:
        return nn.Sequential(mlp(), Uphill())


class RefusedAtTheStart(Strategy):
    name: ClassVar[str] = "refused-at-the-start"

    def on_epoch_start(self, run: Run) -> None:
        if run.epoch == 3 and type(run.model).__name__ == "TwoModes":
            raise Refused("refused-at-the-start cannot cut this network; use another one.")


class CoverageSaid(Strategy):
    name: ClassVar[str] = "coverage-said"

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        return Preflight(tuple(name for name, module in network.named_modules() if isinstance(module, nn.Linear)))


class SharedModules(Strategy):
    """Puts a chain together anew from its different modules."""

    name: ClassVar[str] = "shared-modules"

    def on_fit_start(self, run: Run) -> None:
        if type(run.model) is nn.Sequential:
            run.restructure(nn.Sequential(*run.model.children()))


class TiedWeights(Strategy):
    """Gives every layer a weight of its own."""

    name: ClassVar[str] = "tied-weights"

    def on_fit_start(self, run: Run) -> None:
        seen: set[nn.Parameter] = set()
        for module in run.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter in seen:
                    setattr(module, name, nn.Parameter(parameter.detach().clone()))
                seen.add(parameter)
        run.restructure(run.model)


class FrozenByOthers(Strategy):
    """Lets everything learn in each epoch, and puts requires_grad back afterwards."""

    name: ClassVar[str] = "frozen-by-others"
    _frozen: list[nn.Parameter] = PrivateAttr(default_factory=list)

    def on_epoch_start(self, run: Run) -> None:
        own = {parameter for module in run.frozen for parameter in module.parameters(recurse=False)}
        self._frozen = [each for each in run.model.parameters() if not each.requires_grad and each not in own]
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def on_epoch_end(self, run: Run) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(False)


class Deterministic(Strategy):
    name: ClassVar[str] = "deterministic"
    _scale: float = PrivateAttr(1.0)

    def on_fit_start(self, run: Run) -> None:
        self._scale = random.uniform(0.5, 1.0)

    def on_after_backward(self, run: Run) -> None:
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= self._scale


class LeavesUsersModel(Strategy):
    name: ClassVar[str] = "leaves-users-model"

    def on_fit_start(self, run: Run) -> None:
        kind = type(run.model)
        if not hasattr(kind, "plain_forward"):
            kind.plain_forward = kind.forward
            kind.forward = lambda network, x: 2 * network.plain_forward(x)


class DataUntouched(Strategy):
    name: ClassVar[str] = "data-untouched"

    def on_fit_start(self, run: Run) -> None:
        if isinstance(run.data, Split):
            run.data.images[0, 0, 0, 0] = 7


class FinalModel(Strategy):
    name: ClassVar[str] = "final-model"

    def on_fit_end(self, run: Run) -> None:
        kind = type(run.model)

        class Unsqueezed(kind):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return kind.forward(self, x).softmax(1).unsqueeze(2)

        # Another class for the same object: other checks would see layers of other names, or a patched forward.
        run.model.__class__ = Unsqueezed


class FitsAgain(Strategy):
    name: ClassVar[str] = "fits-again"
    _count: int = PrivateAttr(0)

    def on_after_backward(self, run: Run) -> None:
        self._count += 1
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 1 + 0.01 * self._count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]


class Attaches(Strategy):
    name: ClassVar[str] = "attaches"

    def on_after_backward(self, run: Run) -> None:
        # What `fit` measures and a loop of the user's own does not.
        loss = run.history[-1].get("train/loss", 0.0) if run.history else 0.0
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 1 + 0.01 * loss


class HookCalls(Strategy):
    name: ClassVar[str] = "hook-calls"

    def training_step(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
        run.optimizer.zero_grad()
        with run.autocast():
            loss = run.loss(run.training_model(x), y)
        loss.backward()
        run.optimizer.step()
        return loss


class Resumes(Strategy):
    name: ClassVar[str] = "resumes"
    _count: int = PrivateAttr(0)

    def on_fit_start(self, run: Run) -> None:
        self._count = 0

    def on_after_backward(self, run: Run) -> None:
        self._count += 1
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 1 + 0.01 * self._count


class LeavesNothingBehind(Strategy):
    name: ClassVar[str] = "leaves-nothing-behind"

    def on_fit_start(self, run: Run) -> None:
        run.model.register_forward_hook(lambda module, inputs, output: None)


class GlobalSwitches(Strategy):
    name: ClassVar[str] = "global-switches"

    def on_epoch_end(self, run: Run) -> None:
        if run.epoch == 3:
            torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark


class MetricsFinite(Strategy):
    name: ClassVar[str] = "metrics-finite"

    def on_epoch_end(self, run: Run) -> None:
        run.log("metrics-finite/skipped", float("nan"))


class CostsLogged(Strategy):
    name: ClassVar[str] = "costs-logged"

    def on_after_backward(self, run: Run) -> None:
        # The last steps of an epoch take more, from the second epoch on, and nothing says so.
        if run.epoch > 1 and run.step % run.steps_per_epoch >= 0.75 * run.steps_per_epoch:
            torch.ones(200, 200) @ torch.ones(200, 200)


class Composes(Strategy):
    name: ClassVar[str] = "composes"
    _learning: list[nn.Parameter] = PrivateAttr(default_factory=list)

    def on_fit_start(self, run: Run) -> None:
        self._learning = [parameter for parameter in run.model.parameters() if parameter.requires_grad]

    def on_after_backward(self, run: Run) -> None:
        for parameter in self._learning:
            parameter.grad.clamp_(-1, 1)


class Bfloat16(Strategy):
    name: ClassVar[str] = "bfloat16"

    def training_step(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
        run.optimizer.zero_grad()
        with run.autocast():
            logits = run.training_model(x)
            if not np.isfinite(logits.detach().numpy()).all():
                raise LayerlabError("The network gives values that are not finite; lower the learning rate.")
            loss = run.loss(logits, y)
        run.backward(loss)
        run.optimizer.step()
        return loss


class Compiles(Strategy):
    name: ClassVar[str] = "compiles"
    _hook: Any = PrivateAttr(None)

    def on_fit_start(self, run: Run) -> None:
        self._hook = None

    def on_epoch_start(self, run: Run) -> None:
        # By now the layer's block is compiled without a hook.
        if run.epoch >= 2 and self._hook is None:
            norms = [module for module in run.model.modules() if isinstance(module, nn.BatchNorm2d)]
            for norm in norms[-1:]:
                self._hook = norm.register_forward_hook(lambda module, inputs, output: 0.5 * output)

    def on_fit_end(self, run: Run) -> None:
        if self._hook is not None:
            self._hook.remove()


class Pickles(Strategy):
    name: ClassVar[str] = "pickles"
    _scale: Callable[[float], float] = PrivateAttr(default_factory=lambda: lambda value: 0.5 * value)


EVERY = [
    SettingsRoundTrip, TrainsMlp, TrainsCnn, TrainsResidual, TrainsExample, RefusedAtTheStart, CoverageSaid,
    SharedModules, TiedWeights, FrozenByOthers, Deterministic, LeavesUsersModel, DataUntouched, FinalModel, FitsAgain,
    Attaches, HookCalls, Resumes, LeavesNothingBehind, GlobalSwitches, MetricsFinite, CostsLogged, Composes, Bfloat16,
    Compiles, Pickles,
]
