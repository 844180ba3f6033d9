"""Averages of the weights over steps, and batch-norm statistics that belong to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import get_ema_multi_avg_fn

from layerlab.base.trees import predict
from layerlab.contract.run import Batches, Run
from layerlab.training.settings import Settings

OWNER = "average"
# Images from which the statistics of batch norms are taken anew.
IMAGES = 5000


class Averaging:
    """Keeps the average of a run's weights and puts it into the network when it is evaluated and at the end.

    `ema` is an exponential moving average beside the training (Polyak & Juditsky, 1992; Tarvainen & Valpola, arXiv
    1703.01780). `lookahead` sets the weights to the average at each of its updates (Zhang et al., arXiv 1907.08610).

    Args:
        settings: with what begins with `averaging`; `none` does nothing.
        run: whose parameters are averaged; `run.kept` holds the averages.
        images: of the training, from which batch norms take their statistics for averaged weights.
        whole: steps of the training.
    """

    def __init__(self, settings: Settings, run: Run, images: Batches, whole: int) -> None:
        self.settings, self.run, self.images, self.whole = settings, run, images, whole

    @property
    def on(self) -> bool:
        """Whether there is anything to do."""
        return self.settings.averaging != "none"

    @torch.no_grad()
    def follow(self) -> None:
        """After a step: update the averages, when it is time."""
        run, settings = self.run, self.settings
        if run.step % settings.averaging_every:
            return
        kept = run.kept.setdefault(OWNER, {})
        for parameter in run.model.parameters():
            if parameter.requires_grad and parameter not in kept:
                kept[parameter] = parameter.detach().clone()
        share = min(1.0, run.step / self.whole)
        decay = settings.averaging_decay * share**settings.averaging_power
        get_ema_multi_avg_fn(decay)(list(kept.values()), list(kept), 0)
        if settings.averaging == "lookahead":
            _copy(kept)

    def settle(self) -> None:
        """At the end of the training: the averages are the weights from now on."""
        if self.run.kept.get(OWNER):
            self._put()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The averages as weights for the block, where the training goes on from other ones (`ema`)."""
        if self.settings.averaging != "ema" or not self.run.kept.get(OWNER):
            yield
            return
        before = {name: each.clone() for name, each in self.run.model.state_dict().items()}
        self._put()
        yield
        self.run.model.load_state_dict(before)

    @torch.no_grad()
    def _put(self) -> None:
        _copy(self.run.kept[OWNER])
        refresh_statistics(self.run, self.images)


def _copy(kept: Mapping[nn.Parameter, Tensor]) -> None:
    """Set each parameter to its average."""
    for parameter, average in kept.items():
        parameter.copy_(average)


@torch.no_grad()
def refresh_statistics(run: Run, images: Batches) -> None:
    """Take the statistics of `run.model`'s batch norms anew, from augmented training images; frozen ones stay.

    Statistics that were collected while the weights moved do not belong to the average of those weights (Izmailov et
    al., arXiv 1803.05407, Section 3.2). No random state of the run is touched.
    """
    model = run.model
    norms = [each for each in model.modules() if isinstance(each, _NormBase) and each not in run.frozen
             and each.running_mean is not None]
    if not norms:
        return
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    # With a generator of its own but the same seed, from which images know their side and mirroring.
    generator = torch.Generator().manual_seed(run.generator.initial_seed())
    for number, (x, _) in enumerate(images.batches(run.batch_size, generator, torch.float32, run.memory_format), 1):
        with run.autocast():
            predict(model, x)
        if number * run.batch_size >= IMAGES:
            break
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    for module, mode in modes.items():
        module.training = mode
