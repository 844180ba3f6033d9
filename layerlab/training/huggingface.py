"""Strategies as a callback of Hugging Face's trainer; imported only where transformers is installed."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from layerlab.base.errors import LayerlabWarning, Refused
from layerlab.training.attached import Attached, attach
from layerlab.training.driven import Driven
from layerlab.training.fit import Strategies
from layerlab.training.state_file import read_state, write_state

FILE = "layerlab.pt"


class HuggingFaceCallback(TrainerCallback):
    """See `layerlab.huggingface_callback`."""

    def __init__(self, strategies: Strategies, example: Tensor) -> None:
        self._given, self._example = strategies, example
        self._driven: Driven | None = None
        self._handles: list[Any] = []

    @property
    def attached(self) -> Attached | None:
        """The strategies, once training has begun."""
        return self._driven.attached if self._driven is not None else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach; where training goes on from a checkpoint, with the state that lies there."""
        self._remove()
        if args.world_size > 1 or args.n_gpu > 1:
            raise Refused("A strategy in transformers.Trainer acts in one process on one device; start one process and "
                          "show it one GPU (CUDA_VISIBLE_DEVICES=0).")
        model: nn.Module = kwargs["model"]
        # accelerate's wrappers pass on to what is inside.
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        schedule = getattr(kwargs["lr_scheduler"], "scheduler", kwargs["lr_scheduler"])
        epochs = state.num_train_epochs
        autocast = None
        if args.bf16 or args.fp16:
            dtype = torch.bfloat16 if args.bf16 else torch.float16
            autocast = partial(torch.autocast, args.device.type, dtype)
        driven = Driven(attach(
            model, optimizer, self._given, example=self._example.to(args.device), epochs=epochs,
            steps=-(-state.max_steps // epochs), schedule=schedule, autocast=autocast,
            batch_size=args.train_batch_size * args.gradient_accumulation_steps,
        ))
        if state.global_step:
            driven.attached.load_state_dict(_read(_folder(args, state), args.device))
        self._driven = driven
        self._handles = [
            model.register_forward_pre_hook(lambda *_: driven.begin_forward()),
            model.register_forward_hook(lambda *_: driven.end_forward(), always_call=True),
        ]

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin an epoch."""
        if self._driven is not None:
            self._driven.begin_epoch()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the gradients."""
        if self._driven is not None:
            self._driven.attached.after_backward()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the epoch and log what the strategies logged."""
        if self._driven is not None:
            logged = self._driven.end_epoch()
            if logged:
                state.log_history.append({**logged, "epoch": state.epoch, "step": state.global_step})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the strategies' state beside the trainer's; within an epoch there is none."""
        if self._driven is None or not state.is_world_process_zero:
            return
        if self._driven.within:
            warnings.warn("This checkpoint is written within an epoch, where a strategy's state is not whole: training "
                          "cannot go on from it. Set save_strategy=\"epoch\".", LayerlabWarning, stacklevel=2)
            return
        write_state(_folder(args, state) / FILE, self._driven.attached.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the strategies leave the network that is deployed."""
        if self._driven is not None:
            self._driven.attached.finish()
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._driven is not None:
            self._driven.leave()
            self._driven.attached.detach()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _read(folder: Path, device: torch.device) -> Any:
    """The strategies' state in a checkpoint.

    Raises:
        LayerlabError: it is not there, or damaged.
    """
    remedy = "go on from a checkpoint that this callback wrote at the end of an epoch, or start anew"
    if not (folder / FILE).exists():
        raise Refused(f"{folder} holds no {FILE}, the strategies' state; {remedy}.")
    return read_state(folder / FILE, "The strategies' state", remedy, remedy, device)
