"""Updating a parameter as soon as its gradient is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerlab import Refused


class Updater:
    """Applies an optimizer's update to one parameter as soon as its gradient is there, and frees the gradient.

    The optimizer's own `step` does it, shown one parameter at a time, so that its state stays where checkpoints look
    for it and its learning rate is the schedule's.

    Args:
        optimizer: one whose update of a parameter depends on that parameter alone.

    Raises:
        Refused: LBFGS; or functions registered around its step, such as clipping the whole model's gradient,
            which would see one gradient at a time.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise Refused("memory-reorder updates one layer at a time and LBFGS needs all gradients at once; "
                          "use another optimizer, such as sgd or adamw.")
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise Refused(
                "memory-reorder frees each gradient as soon as it is applied, so that a function registered around the "
                "optimizer's step (clipping the whole model's gradient, say) would see one gradient at a time; remove "
                "it."
            )
        self.optimizer = optimizer
        self._group = {p: group for group in optimizer.param_groups for p in group["params"]}

    def holds(self, parameter: Tensor) -> bool:
        """Whether the optimizer has this parameter."""
        return parameter in self._group

    def apply(self, parameter: nn.Parameter) -> None:
        """Update from `parameter.grad` and free it."""
        self._step(parameter, self._group[parameter])
        parameter.grad = None

    def takes_rows(self, parameter: Tensor) -> bool:
        """Whether the update is element by element with state that starts from zero, so that rows can go one by one."""
        group, kind = self._group.get(parameter), type(self.optimizer)
        if group is None:
            return False
        if kind is torch.optim.SGD:
            return group["dampening"] == 0
        return kind in (torch.optim.Adam, torch.optim.AdamW)

    def prepare(self, parameter: Tensor) -> None:
        """Make the state that the optimizer's first step would make, as zeros."""
        group, state = self._group[parameter], self.optimizer.state[parameter]
        if type(self.optimizer) is torch.optim.SGD:
            if group["momentum"] and state.get("momentum_buffer") is None:
                # 0·m + g = g: the same as the copy of g that the first step makes.
                state["momentum_buffer"] = torch.zeros_like(parameter)
            return
        if state:
            return
        counts_on_device = group["capturable"] or group["fused"]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if counts_on_device else "cpu")
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        for name in names:
            state[name] = torch.zeros_like(parameter)

    def apply_rows(self, parameter: Tensor, rows: slice, gradient: Tensor) -> None:
        """Update some rows of a parameter whose state is prepared; `advance` counts the step once for all."""
        state = self.optimizer.state[parameter]
        part = parameter.detach()[rows]
        part.grad = gradient
        # Rows are views, so that what the step writes lands in the whole; the step count must not, or it would rise
        # with every part.
        self.optimizer.state[part] = {
            name: value[rows] if isinstance(value, Tensor) and value.shape == parameter.shape
            else value.clone() if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        try:
            self._step(part, self._group[parameter])
        finally:
            del self.optimizer.state[part]

    def advance(self, parameter: Tensor) -> None:
        """Count a step that `apply_rows` made in parts."""
        if "step" in self.optimizer.state[parameter]:
            self.optimizer.state[parameter]["step"] += 1

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        optimizer.param_groups = [{**group, "params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
