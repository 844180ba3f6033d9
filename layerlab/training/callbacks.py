"""Strategies as a callback of Lightning's or Hugging Face's trainer; neither package is imported before it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from torch import Tensor

from layerlab.base.errors import Refused, first_line
from layerlab.training.fit import Strategies

if TYPE_CHECKING:
    from layerlab.training.huggingface import HuggingFaceCallback
    from layerlab.training.lightning import LightningCallback


def lightning_callback(strategies: Strategies, *, example: Tensor | None = None) -> LightningCallback:
    """Strategies as a callback for `lightning.pytorch.Trainer`, with the weights that `attach` gives.

    What they log goes to Lightning's loggers, their state into its checkpoints.

    Args:
        strategies: one or several, or the names of installed ones.
        example: one batch's input as the module's `forward` takes it. Default: its `example_input_array`.

    Returns:
        The callback; its `attached` is as `attach` returns it, once training has begun.

    Raises:
        Refused: Lightning is not installed. When training begins: as `attach`; several processes or optimizers, manual
            optimization, no example.

    Example:
        >>> import torch
        >>> from layerlab import lightning_callback
        >>> callback = lightning_callback("lars-skip", example=torch.rand(2, 3, 32, 32))  # doctest: +SKIP
        >>> Trainer(max_epochs=10, callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
    """
    _needs("lightning", "lightning")
    from layerlab.training.lightning import LightningCallback

    return LightningCallback(strategies, example)


def huggingface_callback(strategies: Strategies, *, example: Tensor) -> HuggingFaceCallback:
    """Strategies as a `TrainerCallback` for `transformers.Trainer`, with the weights that `attach` gives.

    What they log stands in `trainer.state.log_history`; their state lies in each checkpoint's folder, in `layerlab.pt`.
    The trainer clips gradients before strategies see them; `max_grad_norm=0` turns that off. The forward pass includes
    the loss where the model computes it.

    Args:
        strategies: one or several, or the names of installed ones.
        example: the model's main input, such as `input_ids` (batch, length) or `pixel_values`.

    Returns:
        The callback; its `attached` is as `attach` returns it, once training has begun.

    Raises:
        Refused: transformers or accelerate is not installed. When training begins: as `attach`; several processes; a
            checkpoint without the strategies' state.

    Example:
        >>> import torch
        >>> from layerlab import huggingface_callback
        >>> callback = huggingface_callback("lars-skip", example=torch.zeros(2, 16).long())  # doctest: +SKIP
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
    """
    _needs("transformers", "huggingface")
    _needs("accelerate", "huggingface")
    from layerlab.training.huggingface import HuggingFaceCallback

    return HuggingFaceCallback(strategies, example)


def _needs(package: str, extra: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise Refused(f"This callback needs the package {package} ({first_line(error)}): pip install "
                      f"'layerlab[{extra}]'.") from None
