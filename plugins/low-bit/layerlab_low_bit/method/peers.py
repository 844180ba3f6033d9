"""Peers of the same purpose, as arms of a comparison: torch's bfloat16, torchao's and bitsandbytes' eight bits."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from layerlab import Refused, Run, Strategy
from layerlab_low_bit.method.products import warn_without_units

Build = Callable[[], nn.Module]


class Bfloat16(Strategy):
    """Torch's autocast to bfloat16, as an arm of a comparison."""

    name: ClassVar[str] = "bfloat16"

    def on_fit_start(self, run: Run) -> None:
        """Forward and loss under autocast, with a warning where the device computes that slowly."""
        warn_without_units("bfloat16", run.device, "leave this arm out, or run it on another machine")
        run.autocast = lambda: torch.autocast(run.device.type, torch.bfloat16)


def torchao_networks(build: Build) -> dict[str, Build]:
    """The same network for torchao's kinds of low-bit training, which act on linear layers only.

    Its int8 products, and float8 with scales of the current tensors, emulated where there are no such units, of the
    layers whose sides such units take. Its int8 weights are left out: no foreach optimizer takes them.
    """
    # torchao's import writes to stderr what concerns torchao alone.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig, int8_mixed_precision
    from torchao.quantization import quantize_

    # Checkpoints are read with weights_only.
    torch.serialization.add_safe_globals([
        Int8MixedPrecisionTrainingConfig, int8_mixed_precision.Int8MixedPrecisionTrainingLinearWeight])

    def int8() -> nn.Module:
        network = build()
        quantize_(network, Int8MixedPrecisionTrainingConfig())
        return network

    def float8() -> nn.Module:
        emulate = not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9))
        config = Float8LinearConfig(emulate=emulate)
        return convert_to_float8_training(
            build(), config=config, module_filter_fn=lambda layer, _: emulate or _fits(layer))

    return {"torchao int8": int8, "torchao float8": float8}


def _fits(layer: nn.Module) -> bool:
    """Whether a GPU's float8 units take a linear layer: its sides are multiples of 16."""
    return isinstance(layer, nn.Linear) and layer.in_features % 16 == 0 and layer.out_features % 16 == 0


class EightBitSGD(Strategy):
    """bitsandbytes' SGD, whose momentum has eight bits a value, in blocks with a scale each (Dettmers et al., 2022)."""

    name: ClassVar[str] = "bitsandbytes-sgd"

    momentum: float = 0.9
    """Of SGD."""

    def on_fit_start(self, run: Run) -> None:
        """Put the optimizer in the place of the run's, with its rate and decay; the rate stays constant.

        Raises:
            Refused: bitsandbytes is not installed.
        """
        if not has_bitsandbytes():
            raise Refused("This arm needs bitsandbytes; install it with pip install 'layerlab-low-bit[peers]'.")
        import bitsandbytes

        (group,) = run.optimizer.param_groups
        run.optimizer = bitsandbytes.optim.SGD8bit(
            group["params"], lr=group["lr"], momentum=self.momentum, weight_decay=group["weight_decay"])
        run.schedule = torch.optim.lr_scheduler.ConstantLR(run.optimizer, factor=1.0, total_iters=0)


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def bitsandbytes_networks(build: Build) -> dict[str, Build]:
    """The same network with bitsandbytes' eight-bit linear layers (LLM.int8()).

    On a CPU they train, but evaluation of a layer that has float weights calls an operator that bitsandbytes 0.50 has
    for GPUs alone.

    Args:
        build: makes the network.

    Returns:
        Name of the arm → what builds its network; empty without bitsandbytes or without a GPU.
    """
    if not (has_bitsandbytes() and torch.cuda.is_available()):
        return {}

    def int8() -> nn.Module:
        import bitsandbytes

        network = build()
        for name, layer in list(network.named_modules()):
            if isinstance(layer, nn.Linear):
                narrow = bitsandbytes.nn.Linear8bitLt(
                    layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=True)
                narrow.load_state_dict(layer.state_dict())
                network.set_submodule(name, narrow)
        return network

    return {"bitsandbytes int8": int8}
