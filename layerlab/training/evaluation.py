"""Accuracy and loss of a network on a split."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerlab.contract.run import Batches


def evaluate(
    model: nn.Module,
    data: Batches,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch_size: int = 512,
    autocast: Callable[[], Any] = nullcontext,
    memory_format: torch.memory_format = torch.contiguous_format,
    views: Literal["plain", "mirrored"] = "plain",
) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy (as shares) of a network on a split; leaves the network in evaluation mode.

    Args:
        model: maps images to logits.
        data: a `Split`, or whatever gives batches in its manner, on the network's device.
        loss: maps (logits, labels) to a scalar, the batch's mean. Default: cross-entropy.
        batch_size: images at a time.
        autocast: gives the context of forward and loss.
        memory_format: of the images.
        views: `mirrored` takes the mean logits of each image and its mirror image.

    Returns:
        `test/loss`; `test/top1` and `test/top5`, shares.

    Example:
        >>> from layerlab import build_model, evaluate, load_dataset
        >>> data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
        >>> sorted(evaluate(build_model("mlp", num_classes=10, image_size=8, width=16), data.test))
        ['test/loss', 'test/top1', 'test/top5']
    """
    loss = loss or nn.CrossEntropyLoss()
    model.eval()
    sums: Any = 0.0
    with torch.no_grad():
        for x, y in data.batches(batch_size, None, torch.float32, memory_format):
            with autocast():
                logits = model(x)  # (batch, classes)
                if views == "mirrored":
                    assert isinstance(x, Tensor)
                    logits = (logits + model(x.flip(-1))) / 2
                value = loss(logits, y)
            best = logits.topk(min(5, logits.shape[1])).indices == y.unsqueeze(1)
            sums = sums + torch.stack([value.float() * len(y), best[:, 0].sum(), best.sum()])
    mean_loss, top1, top5 = (sums / len(data)).tolist()
    return {"test/loss": mean_loss, "test/top1": top1, "test/top5": top5}
