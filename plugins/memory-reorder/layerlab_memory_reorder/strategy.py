"""Memory reorder: the same gradients from less memory.

A. Ike et al., "Technologies for Practical Application of Deep Learning", Fujitsu Sci. Tech. J. 53 (2017), section 4;
K. Shirahata et al., "Memory reduction method for deep neural network training", IEEE MLSP 2016.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BeforeValidator, ByteSize, Field, PrivateAttr, model_validator
from torch import Tensor, nn

from layerlab import LayerlabError, Preflight, Refused, Run, Strategy, first_line
from layerlab_memory_reorder.method.budget import Choice, Planner
from layerlab_memory_reorder.method.coverage import coverage
from layerlab_memory_reorder.method.executor import FUSIBLE, Takeover
from layerlab_memory_reorder.method.plan import Order
from layerlab_memory_reorder.method.program import Program
from layerlab_memory_reorder.method.replay import Schedule


def _fused(value: Any) -> Any:
    if isinstance(value, bool):
        return FUSIBLE if value else ()
    return value


class MemoryReorder(Strategy):
    """Train with plain PyTorch's gradients and updates, in an order that needs less memory.

    In each convolution's and linear layer's backward, the larger of the two gradients (of the input, of the weights) is
    arranged to need no memory of its own: a large input gradient goes last and takes over the layer's input's memory;
    a large weight gradient goes last, is made in slabs, and each slab is applied at once and freed. Gradients do not
    outlive their update. It replaces the training step, and `run.optimizer` holds all state, as without it.

    With a `budget` it computes a part of the activations again in backward, so that a step allocates at most so many
    bytes; which part, it finds before the first step on copies of the network. The same bytes come out.

    Example:
        >>> from layerlab_memory_reorder import MemoryReorder
        >>> MemoryReorder(budget="500MB").budget
        500000000
    """

    name: ClassVar[str] = "memory-reorder"
    needs: ClassVar[frozenset[str]] = frozenset({"one tensor", "targets"})
    acts_in_backward: ClassVar[bool] = True
    memory_setting: ClassVar[str] = "budget"

    order: Order = "larger-first"
    """`larger-first`: each layer in the order that needs less. `weight-first`: the weight gradient first in all."""
    slab: int = Field(16 * 2**20, ge=0)
    """Bytes of a linear layer's weight gradient that exist at a time where it goes last; 0: whole, and first."""
    at_once: int = Field(2**18, ge=0)
    """Weights of at least this many bytes are updated during backward; the small rest at the step's end, together."""
    fuse: Annotated[tuple[Literal["relu", "pool", "norm"], ...], BeforeValidator(_fused)] = FUSIBLE
    """Which layers keep less for backward than PyTorch's, which is not in the paper: `relu` nothing (the layer that
    reads its result knows the sign), `pool` 2 bytes for the place of each winner, `norm` (local response normalisation)
    its operand alone. True: all three; False: none, and with `slab` = 0 the paper's part alone."""
    checkpointing: bool = False
    """Blocks keep only their input and are computed again in backward: less memory for about a third more time."""
    budget: ByteSize | None = Field(None, gt=0)
    """Bytes that a training step may allocate at most, weights and the optimizer's state included, the data set not: a
    number, or a text such as 2GB (10⁹ bytes each) or 500MiB. None: no limit."""

    _takeover: Takeover | None = PrivateAttr(None)
    _epoch: int = PrivateAttr(-1)
    _schedule: Schedule | None = PrivateAttr(None)
    _forecast: dict[str, float] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if self.budget is not None and self.checkpointing:
            raise ValueError("a budget decides by itself what is computed again; leave checkpointing out")
        return self

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        """Which layers follow the plan, and what a step needs against PyTorch's own best, by dry runs of 32 images.

        Raises:
            Refused: a step on a copy fails.
        """
        try:
            # Which batch a budget is for, only a run knows.
            self.model_copy(update={"budget": None}).rehearse(network, example)
        except (LayerlabError, RuntimeError) as error:
            raise Refused(f"memory-reorder cannot train {type(network).__name__}: a step on a copy failed "
                          f"({first_line(error)}); use a network that computes the same in training as in evaluation, "
                          "or train it without this strategy.") from error
        settings = {"order": self.order, "slab": self.slab, "at_once": self.at_once, "fuse": self.fuse}
        return coverage(network, example, settings, self.checkpointing)

    def on_fit_start(self, run: Run) -> None:
        """Refuse what needs the gradients after backward; with a budget, choose what is computed again.

        Raises:
            Refused: another strategy has the hook on_after_backward; an optimizer that needs all gradients at
                once, or functions registered around its step; a budget below the least possible peak.
        """
        self._release()
        if run.after_backward:
            owners = {type(getattr(hook, "__self__", hook)).__name__ for hook in run.after_backward}
            raise Refused(
                f"memory-reorder frees each gradient as soon as it is applied, and {', '.join(sorted(owners))} reads "
                "gradients after backward (hook on_after_backward), as clipping the whole model's gradient would; use "
                "them in separate fits."
            )
        self._schedule, self._forecast = None, {}
        self._take(run)
        if self.budget is not None:
            self._plan(run, self.budget)

    def training_step(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
        """Forward, backward with its updates, and the update of what is left."""
        if self._takeover is None or self._epoch != run.epoch:
            # At the first step, when every strategy has adapted the network and its freezing for this epoch.
            self._release()
            if self.budget is not None and not (self._schedule and self._schedule.fits(Program(run.training_model))):
                # Another strategy has changed the network's structure.
                self._plan(run, self.budget)
            self._takeover = self._take(run)
            self._takeover.attach()
            self._epoch = run.epoch
        run.optimizer.zero_grad(set_to_none=True)
        with run.autocast():
            loss = run.loss(run.training_model(x), y)
        run.backward(loss)
        self._takeover.finish()
        return loss

    def on_epoch_end(self, run: Run) -> None:
        """Leave the network plain: evaluation, checkpoints and other strategies see nothing of this one."""
        self._release()
        for name, value in self._forecast.items():
            run.log(f"{self.name}/{name}", value)

    def on_fit_end(self, run: Run) -> None:
        """Leave the network as it came."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """What is computed again, so that a resumed fit goes on in the same way."""
        if self._schedule is None:
            return {}
        return {"schedule": self._schedule.state(), "forecast": dict(self._forecast)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the interrupted fit's choice."""
        if state:
            self._schedule, self._forecast = Schedule.of_state(state["schedule"]), dict(state["forecast"])

    def _plan(self, run: Run, budget: int) -> None:
        """Choose what is computed again within the budget.

        Raises:
            Refused: the least possible peak is above it; training in 16 bits.
        """
        with run.autocast():
            if torch.is_autocast_enabled(run.device.type):
                raise Refused("memory-reorder forecasts a step's memory in float32; leave precision='float32' with a "
                              "budget, or leave the budget out.")
        x, y = next(run.data.batches(run.batch_size, None, torch.float32, run.memory_format))
        settings = {"order": self.order, "slab": self.slab, "at_once": self.at_once, "fuse": self.fuse}
        was_training = run.training_model.training
        run.training_model.train()

        def loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            # A loss may have weights of its own, for classes, say.
            own = copy.deepcopy(run.loss).to("meta") if x.is_meta and isinstance(run.loss, nn.Module) else run.loss
            return own(network(x), y)

        # Dropout draws from the random state, which belongs to the training.
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            planner = Planner(run.training_model, run.optimizer, x, y, loss, **settings)
            choice = planner.choose(budget)
        run.training_model.train(was_training)
        self._schedule, self._forecast = choice.schedule, _numbers(choice)

    def _take(self, run: Run) -> Takeover:
        return Takeover(run.training_model, run.optimizer, run.example, self.order, self.slab, self.at_once, self.fuse,
                        self.checkpointing, self._schedule)

    def _release(self) -> None:
        if self._takeover is not None:
            self._takeover.detach()
        self._takeover = None


def _numbers(choice: Choice) -> dict[str, float]:
    """What is logged of a choice."""
    return {"forecast_mb": choice.forecast / 1e6, "measured_mb": choice.measured / 1e6, "forecast_time": choice.time}
