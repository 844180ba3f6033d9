"""What the surgery leaves: exactness on known networks, bridged layers, and the forms in which a network is kept."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerlab import build_model
from layerlab_adaptive_pruning.method.folding import fold
from layerlab_adaptive_pruning.method.pruning import count
from layerlab_adaptive_pruning.method.structure import rebuild, structure
from layerlab_adaptive_pruning.method.surgery import Bridge, remove_channels, scales

BRIDGES: dict[str, str] = {"zero": "4.4.1", "relu": "4.4.2", "merge": "4.4.2, activation open", "random": "4.4.3"}
"""The ways to bridge a layer with one channel, and where the paper has them."""


def thin_layers(network: nn.Module, share: float = 1 / 3) -> dict[str, list[int]]:
    """The channels to remove so that the weakest inner layers have one left, at least one and a share of all of them.

    Returns:
        Path of a batch norm → all its channels but the one with the largest |γ|; of a block's norms `bn2` alone.
    """
    inner = {path: scale for path, scale in scales(network).items() if path.endswith("bn2")}
    weakest = sorted(inner, key=lambda path: float(inner[path].mean()))[: max(1, round(share * len(inner)))]
    return {path: [c for c in range(len(inner[path])) if c != int(inner[path].argmax())] for path in weakest}


def bridged(network: nn.Module, example: Tensor) -> dict[str, nn.Module]:
    """Copies of a trained network whose weakest layers are thin and bridged, by `BRIDGES`; it stays as it is.

    Args:
        network: trained.
        example: images, (batch, channels, height, width).
    """
    dead = thin_layers(network)
    return {bridge: remove_channels(copy.deepcopy(network), example, dead, bridge)[0] for bridge in get_args(Bridge)}


def exactness(names: Sequence[str], image_size: int = 32, share: float = 0.4) -> pd.DataFrame:
    """Removing channels with γ = β = 0 from well-known networks: what it changes, which is to be nothing.

    Every batch norm gets random statistics and scales, a share of them zero.

    Returns:
        A row a network: `parameters`, `left`, `convolutions`, `convolutions left`, `difference` (largest, of the
        logits, over their largest).
    """
    rows = []
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, image_size, image_size, generator=generator)
    for name in names:
        network = build_model(name, num_classes=10, **({"depth": 29} if name == "preact-resnet" else {})).eval()
        dead = {}
        for path, module in network.named_modules():
            if isinstance(module, _BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                with torch.no_grad():
                    for value in (module.weight, module.running_var):
                        value.copy_(torch.rand(len(value), generator=generator) + 0.5)
                    for value in (module.bias, module.running_mean):
                        value.copy_(0.2 * torch.randn(len(value), generator=generator))
                    gone = torch.rand(len(module.weight), generator=generator) < share
                    module.weight[gone] = module.bias[gone] = 0
                dead[path] = gone.nonzero().flatten().tolist()
        with torch.no_grad():
            before, size, layers = network(images), count(network), _convolutions(network)
            cut, _ = remove_channels(network, images, dead)
            difference = float((cut(images) - before).abs().max() / before.abs().max())
        rows.append({"network": name, "parameters": size, "left": count(cut), "convolutions": layers,
                     "convolutions left": _convolutions(cut), "difference": difference})
    return pd.DataFrame(rows, columns=[
        "network", "parameters", "left", "convolutions", "convolutions left", "difference",
    ]).set_index("network")


def _convolutions(network: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in network.modules())


def deployed(model: Any, network: Callable[[], nn.Module], example: Tensor, folder: Path) -> pd.DataFrame:
    """Save what comes out of a fit, build it again without pickle, fold and export it; hold each against the network.

    Args:
        model: the pruned network.
        network: builds the unpruned one.
        example: images.
        folder: where `pruned.pt` (weights), `pruned.json` (structure) and `pruned.onnx` go.

    Returns:
        A row a form: `bytes`, and the largest `difference` of its logits from the network's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = example[:2].cpu()
    # Training may have laid out the weights otherwise; the others are built anew.
    model = model.cpu().eval().to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        logits = model(images)
    torch.save(model.state_dict(), folder / "pruned.pt")
    (folder / "pruned.json").write_text(json.dumps(structure(model)))
    again = rebuild(network(), json.loads((folder / "pruned.json").read_text()))
    again.load_state_dict(torch.load(folder / "pruned.pt", weights_only=True))
    exported = torch.export.export(model, (images,))
    folded = torch.export.export(fold(model), (images,))
    with torch.no_grad():
        forms = {"weights and structure": (again.eval()(images), _bytes(folder, "pruned.pt", "pruned.json")),
                 "torch.export": (exported.module()(images), _size(exported)),
                 "folded, torch.export": (folded.module()(images), _size(folded))}
    try:
        import onnxruntime

        torch.onnx.export(exported, f=str(folder / "pruned.onnx"), verbose=False)
        session = onnxruntime.InferenceSession(str(folder / "pruned.onnx"))
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        forms["ONNX"] = (torch.from_numpy(found), _bytes(folder, "pruned.onnx", "pruned.onnx.data"))
    except ImportError:
        print("onnxscript and onnxruntime are not installed: ONNX is left out.")
    return pd.DataFrame(
        {name: {"bytes": size, "difference": float((out - logits).abs().max())} for name, (out, size) in forms.items()}
    ).T


def _size(exported: torch.export.ExportedProgram) -> int:
    """Bytes of the file that a network is exported to."""
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    return len(stream.getvalue())


def _bytes(folder: Path, *names: str) -> int:
    return sum((folder / name).stat().st_size for name in names if (folder / name).exists())
