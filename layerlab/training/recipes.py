"""Settings of `fit` that belong together, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# After airbench94 (Jordan, arXiv 2404.00498) with Muon, for two processor cores in the place of a GPU: a narrower
# network, `airnet`, smaller batches, small images first, and more epochs. Rates are airbench's, converted to this batch
# and momentum: Muon's, whose updates have one size whatever the batch, by the root of the batch's ratio (500 / 2,000).
FAST: Mapping[str, Any] = {
    "epochs": 27,
    "batch_size": 500,
    "augment": "translate-alternate",
    "padding": 2,
    "sizes": ((0.0, 0.75), (0.5, 1.0)),
    "whitening": True,
    "optimizer": "muon",
    "muon_lr": 0.12,
    "muon_norm": True,
    "lr": 3.6,
    "bias_scale": 16.0,
    "momentum": 0.6,
    "weight_decay": 0.002,
    "schedule": "triangle",
    "schedule_each": "step",
    "warmup": 0.0,
    "label_smoothing": 0.2,
    "averaging": "lookahead",
    "averaging_decay": 0.77,
    "averaging_every": 5,
    "averaging_power": 3.0,
    "views": "shifted",
    "views_from": 1.0,
    "channels_last": "auto",
}

RECIPES: Mapping[str, Mapping[str, Any]] = {"fast": FAST}
