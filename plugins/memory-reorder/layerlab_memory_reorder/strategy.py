"""Memory reorder: the same gradients from less memory.

A. Ike et al., "Technologies for Practical Application of Deep Learning", Fujitsu Sci. Tech. J. 53 (2017), section 4;
K. Shirahata et al., "Memory reduction method for deep neural network training", IEEE MLSP 2016.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr
from torch import Tensor, nn

from layerlab import LayerlabError, Preflight, Refused, Run, Strategy, first_line
from layerlab_memory_reorder.method.coverage import coverage
from layerlab_memory_reorder.method.executor import FUSIBLE, Takeover
from layerlab_memory_reorder.method.plan import Order


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
    """

    name: ClassVar[str] = "memory-reorder"
    needs: ClassVar[frozenset[str]] = frozenset({"one tensor", "targets"})
    acts_in_backward: ClassVar[bool] = True

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

    _takeover: Takeover | None = PrivateAttr(None)
    _epoch: int = PrivateAttr(-1)

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        """Which layers follow the plan, and what a step needs against PyTorch's own best, by dry runs of 32 images.

        Raises:
            Refused: a step on a copy fails.
        """
        try:
            self.rehearse(network, example)
        except (LayerlabError, RuntimeError) as error:
            raise Refused(f"memory-reorder cannot train {type(network).__name__}: a step on a copy failed "
                          f"({first_line(error)}); use a network that computes the same in training as in evaluation, "
                          "or train it without this strategy.") from error
        settings = {"order": self.order, "slab": self.slab, "at_once": self.at_once, "fuse": self.fuse}
        return coverage(network, example, settings, self.checkpointing)

    def on_fit_start(self, run: Run) -> None:
        """Refuse what needs the gradients after backward.

        Raises:
            Refused: another strategy has the hook on_after_backward; an optimizer that needs all gradients at
                once, or functions registered around its step.
        """
        self._release()
        if run.after_backward:
            owners = {type(getattr(hook, "__self__", hook)).__name__ for hook in run.after_backward}
            raise Refused(
                f"memory-reorder frees each gradient as soon as it is applied, and {', '.join(sorted(owners))} reads "
                "gradients after backward (hook on_after_backward), as clipping the whole model's gradient would; use "
                "them in separate fits."
            )
        self._take(run)
        self._release()

    def training_step(self, run: Run, x: Tensor, y: Tensor) -> Tensor:
        """Forward, backward with its updates, and the update of what is left."""
        if self._takeover is None or self._epoch != run.epoch:
            # At the first step, when every strategy has adapted the network and its freezing for this epoch.
            self._release()
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

    def on_fit_end(self, run: Run) -> None:
        """Leave the network as it came."""
        self._release()

    def _take(self, run: Run) -> Takeover:
        return Takeover(run.training_model, run.optimizer, run.example, self.order, self.slab, self.at_once, self.fuse,
                        self.checkpointing)

    def _release(self) -> None:
        if self._takeover is not None:
            self._takeover.detach()
        self._takeover = None
