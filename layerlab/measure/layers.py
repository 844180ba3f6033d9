"""What each convolution and linear layer of a network costs, from its shapes alone: no data, no memory."""

from __future__ import annotations

import copy
import math

import pandas as pd
import torch
from torch import nn

from layerlab.base.arguments import validated
from layerlab.workload.order import forward_order


@validated
def layer_costs(model: nn.Module, input_shape: tuple[int, int, int], batch_size: int = 1) -> pd.DataFrame:
    """Multiply-accumulates and memory traffic of each convolution and linear layer, in forward order.

    Runs the network on the meta device. The first layer's input gradient (dX) is never needed and is counted apart.

    Args:
        model: any network; it is copied.
        input_shape: (channels, height, width).
        batch_size: images a step; scales everything but the weights.

    Returns:
        One row a layer: `layer`, `kind` (conv or linear), `inputs`, `outputs`, `weights` (elements), `forward_macs`,
        `dx_macs`, `dw_macs`, and for each of forward, dx and dw two accountings of traffic in elements:
        `*_operands`, in which every multiply-accumulate reads its two operands from memory (no reuse at all), and
        `*_tensors`, in which each tensor that takes part is moved once.
    """
    network = copy.deepcopy(model).to("meta").eval()
    example = torch.empty(batch_size, *input_shape, device="meta")
    rows = []

    def note(name: str, layer: nn.Conv2d | nn.Linear):
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            weight = layer.weight
            # Multiply-accumulates: every output element takes one weight row of products.
            macs = output.numel() * math.prod(weight.shape[1:])
            inputs, outputs, weights = arguments[0].numel(), output.numel(), weight.numel()
            row = {"layer": name, "kind": "linear" if isinstance(layer, nn.Linear) else "conv",
                   "inputs": inputs, "outputs": outputs, "weights": weights}
            for part in ("forward", "dx", "dw"):
                row[f"{part}_macs"] = macs
                row[f"{part}_operands"] = 2 * macs
                # Forward reads x and w and writes y; dX reads dy and w and writes dx; dW reads dy and x, writes dw.
                row[f"{part}_tensors"] = inputs + outputs + weights
            rows.append(row)

        return hook

    for name, module in forward_order(network, torch.empty(2, *input_shape, device="meta")):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(note(name, module))
    with torch.no_grad():
        network(example)
    return pd.DataFrame(rows)
