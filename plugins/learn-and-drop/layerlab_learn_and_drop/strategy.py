"""Learn&Drop: layers that stopped learning leave the training network, which goes on from their stored feature maps.

Cruciata et al., "Learn&Drop: Fast Learning of CNNs based on Layer Dropping", arXiv 2604.23403. The paper's scores are
known from its abstract and summaries only; `method.scores` says how they are read here.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from layerlab import Batches, FitResult, LayerMap, Preflight, Run, Strategy, devices
from layerlab.measure import synchronise
from layerlab_learn_and_drop.method.cutting import Cut, Plan, check_cut, make_plan, split
from layerlab_learn_and_drop.method.features import Features, Making, NoRoom, Storage
from layerlab_learn_and_drop.method.same_layers import Decisions, SameLayersFrozen
from layerlab_learn_and_drop.method.scores import Gradients, relative_change, trend
from layerlab_learn_and_drop.method.statistics import batch_norms, memory_format, settle

NAME = "learn-and-drop"
_BYTES = {"compute": 4, "bfloat16": 2, "int8": 1}
_NOTHING = (0, False, 0, 0, 0)


class LearnAndDrop(Strategy):
    """Drop the layers nearest the input once their scores say that they have learned.

    After each epoch every layer that learned in it gets two scores: its change, and whether that still rises or falls.
    `score` says what a change is; that of weights is divided by the learning rate's share of its first value, so that
    a falling rate does not pass for having learned. A layer is done when its change is at most `settled` times its
    largest so far and its trend between −`flat` and `flat`; done stays done. The longest prefix of done layers leaves
    the training network at the start of the next epoch, if the FLOPs that this saves in the epochs that are left exceed
    those of evaluating the prefix over the training set. Its batch norms' statistics are made anew first. The last
    layer always learns. `run.model` remains the whole network.
    """

    name: ClassVar[str] = NAME
    needs: ClassVar[frozenset[str]] = frozenset({"one tensor", "targets", "fixed order"})
    replaces_network: ClassVar[bool] = True
    follows_layers: ClassVar[bool] = True

    score: Literal["weights", "gradients"] = "weights"
    """What a layer's change is: `weights`, how far an epoch moves them; `gradients`, the mean size of a step's
    gradient; both relative to the size of the weights."""
    settled: float = Field(0.5, gt=0)
    """A layer's change has to be at most this share of its largest so far."""
    flat: float = Field(0.25, ge=0)
    """Its change has to fall or rise by at most this in an epoch (natural logarithm)."""
    window: int = Field(3, ge=2)
    """Epochs over which the trend is taken, and after which a layer can be done at the earliest."""
    at_most: float = Field(1.0, gt=0, le=1)
    """Never drop more than this share of the whole network's forward FLOPs."""
    drops: dict[int, int] = Field(default_factory=dict)
    """Epoch, counted from 1, to the number of layers that are dropped from it on: a plan in the place of the scores'
    decision. Empty: the scores decide."""
    flops_per_byte: float = Field(10.0, ge=0)
    """Features that are larger than the images are stored only if their making takes at least so many FLOPs for each
    byte; below that reading takes longer than computing them anew, and the prefix is frozen instead."""
    augmentation: Literal["none", "copies", "refresh"] = "refresh"
    """What becomes of augmented images: `none`, features of the plain images; `copies`, features of `copies` augmented
    passes, which the epochs read in turn; `refresh`, one augmented pass, made anew every `refresh_every` epochs."""
    copies: int = Field(3, ge=1)
    """Of the training set's features, with `augmentation="copies"`."""
    refresh_every: int = Field(3, ge=1)
    """Epochs, with `augmentation="refresh"`."""
    storage: Storage = "compute"
    """Of features: `compute`, the network's own type; `bfloat16`; `int8`, 8 bits over each image's own range."""
    memory_budget: float | None = Field(None, ge=0)
    """Bytes of features that may lie on the device; more go into a mapped file. Default: half of what is free."""
    folder: str | None = None
    """Where that file lies. Default: with the fit's checkpoint, or in the system's temporary folder."""

    _plan: Plan = PrivateAttr()
    _images: Batches = PrivateAttr()
    _changes: list[list[float]] = PrivateAttr(default_factory=list)
    _done: list[bool] = PrivateAttr(default_factory=list)
    _before: dict[int, list[Tensor]] = PrivateAttr(default_factory=dict)
    _first_rate: float = PrivateAttr(0.0)
    _rate: float = PrivateAttr(0.0)
    _count: int = PrivateAttr(0)
    _dropped: bool = PrivateAttr(False)
    _since: int = PrivateAttr(0)
    _seed: int = PrivateAttr(0)
    _fresh: int = PrivateAttr(0)
    _before_that: tuple[int, bool, int, int, int] = PrivateAttr(_NOTHING)
    _gradients: Gradients | None = PrivateAttr(None)
    _image_bytes: int = PrivateAttr(0)
    _norms: bool = PrivateAttr(False)
    _too_large: float = PrivateAttr(math.inf)
    _applied: tuple[Any, ...] = PrivateAttr(())
    _parts: tuple[Cut, tuple[nn.Module, nn.Module]] | None = PrivateAttr(None)
    _features: Features | None = PrivateAttr(None)
    _temporary: Any = PrivateAttr(None)
    _shared: Decisions = PrivateAttr(default_factory=Decisions)
    _record: dict[int, tuple[str, ...]] = PrivateAttr(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The names of the network's layers in forward order."""
        return [layer.name for layer in self._plan.layers]

    @property
    def prefix(self) -> int:
        """How many layers, from the input on, are dropped or frozen from the next epoch on."""
        return self._count

    @property
    def dropped(self) -> bool:
        """Whether that prefix is dropped rather than frozen."""
        return self._dropped

    def same_layers_frozen(self) -> SameLayersFrozen:
        """A strategy that freezes what this one drops, in the same epochs: for a later arm of the same `compare`."""
        twin = SameLayersFrozen()
        twin._shared = self._shared
        return twin

    # ---------------------------------------------------------------------------- hooks

    def preflight(self, network: nn.Module, example: Tensor) -> Preflight:
        """Cut a copy behind the first and the last layer that can go; say which can, and what a step then saves.

        Raises:
            Refused: the network cannot be cut.
        """
        plan = make_plan(network, example)
        allowed = [cut for cut in plan.cuts.values() if cut.flops <= self.at_most * plan.flops]
        reached = allowed or [plan.cuts[min(plan.cuts)]]
        for cut in dict.fromkeys((reached[0], reached[-1])):
            check_cut(network, cut, example)
        gone = {parameter for name in reached[-1].modules for parameter in network.get_submodule(name).parameters()}
        covered = [name for name, module in network.named_modules() if allowed and not gone.isdisjoint(
            module.parameters(recurse=False))]
        notes = []
        if not allowed:
            notes.append(f"No prefix has at most {self.at_most:g} of the forward FLOPs (at_most): nothing is dropped.")
        return Preflight.of(
            network, covered, otherwise="it always learns: no cut that at_most allows lies behind it",
            saves={"forward FLOPs of a step": reached[-1].flops / plan.flops} if allowed else {}, notes=notes)

    def on_fit_start(self, run: Run) -> None:
        """Find the layers and the cuts.

        Raises:
            Refused: torch.fx cannot trace the network, it runs other operations in training than in inference, or it
                has a single layer or no place to cut.
        """
        self._release()
        self._image_bytes = run.example[0].numel()  # as uint8
        self._norms = bool(batch_norms(run.model, dict(run.model.named_modules())))
        self._plan, self._images = make_plan(run.model, run.example), run.data
        count = len(self._plan.layers)
        self._changes, self._done = [[] for _ in range(count)], [False] * count
        self._before, self._first_rate = {}, 0.0
        self._count, self._dropped, self._since, self._seed, self._fresh = self._before_that = _NOTHING
        self._gradients = None
        self._too_large, self._applied = math.inf, ()
        self._record = self._shared[run.generator.initial_seed()] = {}

    def on_epoch_start(self, run: Run) -> None:
        run.log(f"{NAME}/feature_flops", 0)
        run.log(f"{NAME}/feature_seconds", 0)
        self._apply(run)
        self._record[run.epoch] = self._plan.cuts[self._count].modules if self._count else ()
        self._rate = _rate(run)
        self._before = {
            index: [weight.clone() for weight in self._weights(run, index)]
            for index in range(self._count, len(self._plan.layers))
        }
        if self.score == "gradients":
            self._gradients = Gradients({index: self._parameters(run, index) for index in self._before})
        run.log(f"{NAME}/dropped_layers", self._count if self._dropped else 0)
        run.log(f"{NAME}/frozen_layers", self._count if not self._dropped else 0)
        features = self._features
        run.log(f"{NAME}/feature_bytes", features.nbytes if features else 0)
        run.log(f"{NAME}/features_in_file", features is not None and features.file is not None)

    def on_after_backward(self, run: Run) -> None:
        if self._gradients is not None:
            self._gradients.add()

    def on_epoch_end(self, run: Run) -> None:
        frozen = {id(parameter) for module in run.frozen for parameter in module.parameters(recurse=False)}
        rate = (self._rate + _rate(run)) / 2
        if rate > 0:
            self._first_rate = self._first_rate or rate
            changes: dict[int, float] = {}
            for index, before in self._before.items():
                # A layer that another strategy kept from learning shows nothing by standing still.
                if any(id(parameter) in frozen for parameter in self._parameters(run, index)):
                    continue
                change: float | None
                if self._gradients is None:
                    change = relative_change(self._weights(run, index), before) * self._first_rate / rate
                else:
                    change = self._gradients.score(index, before)
                if change is not None:
                    changes[index] = change
            self.observe(changes)
            for index, change in changes.items():
                run.log(f"{NAME}/change/{self.layers[index]}", change)
                slope = trend(self._changes[index], self.window)
                if math.isfinite(slope):
                    run.log(f"{NAME}/trend/{self.layers[index]}", slope)
        self._before, self._gradients = {}, None
        self._decide(run)

    def on_fit_end(self, run: Run) -> None:
        """Leave the whole network and the images, and no feature maps."""
        run.training_model, run.data = run.model, self._images
        self._release()

    def placebo(self, result: FitResult) -> Strategy | None:
        """One drop at half of the epochs that saves as many FLOPs, whatever the scores and `at_most`; None without one.

        Where even the longest prefix saves too little from there on, it is dropped earlier.
        """
        saved = 0.0
        for row in result.history:
            if row[f"{NAME}/dropped_layers"] or row[f"{NAME}/frozen_layers"]:
                saved += self._saved_in_an_epoch(int(row[f"{NAME}/dropped_layers"] + row[f"{NAME}/frozen_layers"]))
            saved -= row[f"{NAME}/feature_flops"] / len(self._images)
        if saved <= 0:
            return None
        epochs = len(result.history)
        for start in range(epochs // 2 + 1, 1, -1):
            left = epochs - start + 1
            savings = {count: self.cost(0, left) - self.cost(count, left) for count in self._plan.cuts}
            if start == 2 or max(savings.values()) >= saved:
                break
        count = min(savings, key=lambda count: abs(savings[count] - saved))
        return LearnAndDrop(**self.model_dump() | {"drops": {start: count}, "at_most": 1.0})

    def layer_maps(self, history: Sequence[Mapping[str, Any]]) -> dict[str, LayerMap]:
        """What became of each layer in each epoch, and its two scores where it learned."""
        def table(value: Callable[[Mapping[str, Any], int], float]) -> pd.DataFrame:
            return pd.DataFrame({row["epoch"]: [value(row, index) for index in range(len(self.layers))]
                                 for row in history}, index=self.layers)

        def state(row: Mapping[str, Any], index: int) -> int:
            return 2 if index < row[f"{NAME}/dropped_layers"] else int(index < row[f"{NAME}/frozen_layers"])

        return {
            "layers": LayerMap(table(state), "", ("learns", "frozen", "dropped")),
            "change": LayerMap(table(lambda row, index: math.log10(
                row.get(f"{NAME}/change/{self.layers[index]}", 0) or math.nan)), "log₁₀ of the relative change"),
            "trend": LayerMap(table(lambda row, index: row.get(f"{NAME}/trend/{self.layers[index]}", math.nan)),
                              "trend of its logarithm, per epoch"),
        }

    # ---------------------------------------------------------------------------- scores and decision

    def observe(self, changes: dict[int, float]) -> int:
        """Take an epoch's changes and say which layers are done.

        Args:
            changes: index of a layer in forward order → its change; layers that did not learn are missing.

        Returns:
            The length of the longest prefix of done layers.
        """
        for index, change in changes.items():
            history = self._changes[index]
            history.append(change)
            slope = trend(history, self.window)
            if change <= self.settled * max(history) and abs(slope) <= self.flat:
                self._done[index] = True
        return self.ready

    @property
    def ready(self) -> int:
        """The length of the longest prefix of layers that are done."""
        return self._done.index(False) if False in self._done else len(self._done)

    def cost(self, count: int, epochs: int, made: bool = False) -> float:
        """FLOPs an image of training for so many epochs with the first `count` layers dropped, the making included.

        Backward is taken as twice the forward pass. Features that are `made` cost only their refreshing, new ones a
        pass for the batch norms' statistics as well.
        """
        if not count:
            return epochs * 3 * self._plan.flops
        passes = 0 if made else max(1, self._passes)
        if self._refreshes:
            passes = math.ceil(epochs / self.refresh_every)
        if self._norms and not made:
            passes += 1
        before = self._plan.cuts[count].flops
        return epochs * 3 * (self._plan.flops - before) + passes * before

    def _saved_in_an_epoch(self, count: int) -> float:
        """FLOPs an image: dropped, a prefix saves all three passes, frozen the two of backward."""
        cut = self._plan.cuts[count]
        return (3 if self._worth_storing(cut) else 2) * cut.flops

    def _decide(self, run: Run) -> None:
        """Choose the next epochs' prefix and whether it is dropped or frozen."""
        left = run.epochs - run.epoch
        ready = self.drops.get(run.epoch + 1, 0) if self.drops else self.ready
        allowed = [
            count for count, cut in self._plan.cuts.items()
            if self._count < count <= ready and cut.flops <= self.at_most * self._plan.flops
            and self._estimate(cut) < self._too_large
        ]
        if not allowed or not left:
            return
        best = max(allowed) if self.drops else min(allowed, key=lambda count: self.cost(count, left))
        if not self.drops and self.cost(best, left) >= self.cost(self._count, left, made=True):
            return
        drop = self._worth_storing(self._plan.cuts[best])
        if self._dropped and not drop:
            return
        self._before_that = (self._count, self._dropped, self._since, self._seed, self._fresh)
        self._count, self._dropped, self._since = best, drop, run.epoch + 1
        self._seed = int(torch.randint(2**62, (), generator=run.generator))

    def _estimate(self, cut: Cut) -> float:
        """Bytes of the features, before any are made."""
        return cut.elements * _BYTES[self.storage] * len(self._images) * max(1, self._passes)

    def _worth_storing(self, cut: Cut) -> bool:
        """Whether features are smaller than the images, or save enough FLOPs for each byte that is read.

        A count and no stopwatch, so that the same seed gives the same weights on every machine.
        """
        size = cut.elements * _BYTES[self.storage]
        return size <= self._image_bytes or cut.flops >= self.flops_per_byte * size

    # ---------------------------------------------------------------------------- network and data

    def _apply(self, run: Run) -> None:
        """Put the decided prefix in force, where it is not."""
        age = run.epoch - self._since
        version = age // self.refresh_every if self._refreshes else 0
        wanted = (self._count, self._dropped, version)
        if self._count and self._applied != wanted:
            if not self._dropped:
                self._settle(run, run.model)
                run.freeze(NAME, [run.model.get_submodule(name) for name in self._plan.cuts[self._count].modules])
            elif not self._drop(run, version):
                self._go_back(run)
                return
            self._applied = wanted
        if self._features is not None:
            self._features.current = age % self._features.passes

    def _go_back(self, run: Run) -> None:
        """Return to what was in force before a drop for which there was no room."""
        self._count, self._dropped, self._since, self._seed, self._fresh = self._before_that
        self._before_that = _NOTHING
        if self._count == 0:
            run.training_model, run.data = run.model, self._images
            run.model.train()
            run.apply_freezing()
        self._apply(run)

    def _drop(self, run: Run, version: int) -> bool:
        """Cut the network, make or take the features, and let the tail train on them; False if they have no room."""
        start = time.perf_counter()
        cut = self._plan.cuts[self._count]
        prefix, tail = self._split(run, cut)
        before = {name: value.clone() for name, value in prefix.named_buffers()}
        self._settle(run, prefix)
        making = self._making(run, prefix, version)
        key = self._key(prefix, making)
        if self._applied[:2] == (self._count, self._dropped):
            self._close()  # of the same size, and of no more use
        try:
            features = making.make_or_take(
                run.device, self._budget(run), self._folder(run) / f"features-{key}.bin", key)
        except NoRoom as error:
            for name, value in prefix.named_buffers():
                value.copy_(before[name])
            self._too_large = min(self._too_large, self._estimate(cut))
            warnings.warn(
                f"learn-and-drop: {error}; the layers up to {self.layers[self._count - 1]} are not dropped, training "
                "goes on without. Make room, or store in fewer bits (storage=\"int8\").",
                stacklevel=2,
            )
            return False
        self._close()
        self._features = features
        run.freeze(NAME, ())
        run.training_model, run.data = tail, features
        tail.train()
        run.apply_freezing()
        if not features.reused:
            made = cut.flops * making.rows * features.passes
            run.log(f"{NAME}/feature_flops", run.logged[f"{NAME}/feature_flops"] + made)
            run.spend(made)
        synchronise(run.device)
        run.log(f"{NAME}/feature_seconds", time.perf_counter() - start)
        return True

    def _settle(self, run: Run, network: nn.Module) -> None:
        """Make the statistics of the batch norms that stop learning anew, once for each of them."""
        if self._fresh >= self._count:
            return
        cut = self._plan.cuts[self._count]
        earlier = self._plan.cuts[self._fresh].modules if self._fresh else ()
        norms = batch_norms(run.model, [name for name in cut.modules if name not in earlier])
        flops = settle(run, network, norms, self._images, self._seed)
        run.log(f"{NAME}/feature_flops", run.logged[f"{NAME}/feature_flops"] + flops)
        self._fresh = self._count

    def _split(self, run: Run, cut: Cut) -> tuple[nn.Module, nn.Module]:
        """The parts, which the drop and every refresh of its features share."""
        if self._parts is None or self._parts[0] is not cut:
            self._parts = (cut, split(run.model, cut))
        return self._parts[1]

    def _making(self, run: Run, prefix: nn.Module, version: int) -> Making:
        return Making(
            prefix, self._images, self.storage, self._passes, (self._seed + version) % 2**62, run.batch_size,
            run.autocast, memory_format(run),
        )

    @property
    def _passes(self) -> int:
        """Augmented passes that are stored; 0 for the plain images."""
        if self.augmentation == "none" or getattr(self._images, "augment", "") == "none":
            return 0
        return self.copies if self.augmentation == "copies" else 1

    @property
    def _refreshes(self) -> bool:
        return self.augmentation == "refresh" and self._passes > 0

    def _key(self, prefix: nn.Module, making: Making) -> str:
        """A digest of what decides the features, for the file's name."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in prefix.state_dict().items():
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        digest.update(f"{self._count}|{making.storage}|{making.passes}|{making.seed}|{making.rows}".encode())
        return digest.hexdigest()

    def _budget(self, run: Run) -> float:
        return devices.free_memory(run.device) / 2 if self.memory_budget is None else self.memory_budget

    def _folder(self, run: Run) -> Path:
        if self.folder is not None:
            return Path(self.folder)
        if run.folder is not None:
            return run.folder
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="layerlab-features-", ignore_cleanup_errors=True)
        return Path(self._temporary.name)

    def _close(self) -> None:
        if self._features is not None:
            self._features.close()
            self._features = None

    def _release(self) -> None:
        self._close()
        self._parts = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _parameters(self, run: Run, index: int) -> list[nn.Parameter]:
        return [run.model.get_parameter(name) for name in self._plan.layers[index].parameters]

    def _weights(self, run: Run, index: int) -> list[Tensor]:
        return [parameter.detach() for parameter in self._parameters(run, index)]

    # ---------------------------------------------------------------------------- going on after an interruption

    def state_dict(self) -> dict[str, Any]:
        return {
            "changes": self._changes, "done": self._done, "first_rate": self._first_rate, "count": self._count,
            "dropped": self._dropped, "since": self._since, "seed": self._seed, "fresh": self._fresh,
            "too_large": self._too_large, "before_that": list(self._before_that),
            "record": {epoch: list(names) for epoch, names in self._record.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._changes, self._done = [list(history) for history in state["changes"]], list(state["done"])
        self._first_rate, self._count, self._dropped = state["first_rate"], state["count"], state["dropped"]
        self._since, self._seed, self._too_large = state["since"], state["seed"], state["too_large"]
        self._fresh = state["fresh"]
        count, dropped, since, seed, fresh = state["before_that"]
        self._before_that = (count, dropped, since, seed, fresh)
        self._record.update({epoch: tuple(names) for epoch, names in state["record"].items()})


def _rate(run: Run) -> float:
    return float(run.optimizer.param_groups[0]["lr"])
