"""Strategies in Lightning's and in Hugging Face's trainer: the real packages, with the weights of the plain loop."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import Freezer, Residual, same_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from layerlab import (
    LayerlabWarning,
    Refused,
    Run,
    Strategy,
    attach,
    huggingface_callback,
    lightning_callback,
    strategies,
)

EPOCHS, BATCH = 4, 128


def package(name: str, extra: str) -> Any:
    """The package, or a skip that says how to get it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"needs {name}: pip install 'layerlab[{extra}]'")


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, loss_of: Any, given: Any, example: Tensor,
          epochs: int = EPOCHS) -> nn.Module:
    """The same training in a plain loop."""
    attached = attach(model, optimizer, given, example=example)
    for _ in range(epochs):
        with attached.epoch():
            for batch in batches:
                optimizer.zero_grad()
                with attached.forward():
                    loss = loss_of(model, batch)
                loss.backward()
                attached.after_backward()
                optimizer.step()
    attached.finish()
    return model


class Marks(Strategy):
    """Has a context for forward passes, of which one can see whether it is in force."""

    name: ClassVar[str] = "marks"
    depth: ClassVar[int] = 0

    def on_fit_start(self, run: Run) -> None:
        @contextmanager
        def marked() -> Iterator[None]:
            Marks.depth += 1
            yield
            Marks.depth -= 1

        run.autocast = marked

    def on_fit_end(self, run: Run) -> None:
        run.autocast = nullcontext


# ---------------------------------------------------------------------------- Lightning


@pytest.fixture
def images(digits) -> DataLoader:
    x, y = (torch.cat(part) for part in zip(*digits.train.batches(BATCH), strict=True))
    return DataLoader(TensorDataset(x[:512], y[:512]), batch_size=BATCH, generator=torch.Generator())


def images_loss(module: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(module(x), y)


@pytest.fixture
def module() -> Any:
    pl = package("lightning.pytorch", "lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = Residual()
            self.net.drop.p = 0.0
            self.best = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return images_loss(self, batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", images_loss(self, batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Module


def trainer(folder: Path, callbacks: list[Any], **options: Any) -> Any:
    settings: dict[str, Any] = {"max_epochs": EPOCHS, "enable_checkpointing": False, **options}
    return package("lightning.pytorch", "lightning").Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        default_root_dir=str(folder), **settings)


EXAMPLE = torch.zeros(2, 1, 8, 8)
quiet = pytest.mark.filterwarnings("ignore")


@quiet
@pytest.mark.parametrize("given", ["lars-skip", strategies("low-bit", gradient_rounding="nearest"), Freezer()], ids=str)
@pytest.mark.parametrize("validates", [False, True])
def test_a_lightning_module_acts_and_ends_with_the_weights_of_the_plain_loop(
    module, images, tmp_path, given, validates
):
    callback = lightning_callback(given, example=EXAMPLE)
    trained, own = module(), module()
    made = trainer(tmp_path, [callback])
    made.fit(trained, images, images if validates else None)
    plain(own, own.configure_optimizers(), images, images_loss, given, EXAMPLE)
    assert same_weights(trained, own)
    untouched = module()
    trainer(tmp_path, []).fit(untouched, images)
    assert not same_weights(trained, untouched)
    name = callback.attached.strategies[0].name
    logged = [each for each in made.callback_metrics if each.startswith(f"{name}/")]
    assert logged
    if given == "lars-skip":
        assert max(row["lars-skip/skipped_layers"] for row in callback.attached.history) > 0
        assert all(parameter.requires_grad for parameter in trained.parameters())


@quiet
def test_accumulated_gradients_in_lightning_are_one_step(module, images, tmp_path):
    callback = lightning_callback("lars-skip", example=EXAMPLE)
    trainer(tmp_path, [callback], accumulate_grad_batches=2, max_epochs=2, gradient_clip_val=1.0).fit(module(), images)
    assert callback.attached.run.step == 4


@quiet
def test_lightning_goes_on_from_its_checkpoint_with_the_same_weights(module, images, tmp_path):
    pl = package("lightning.pytorch", "lightning")
    whole = module()
    trainer(tmp_path, [lightning_callback([Freezer(), "lars-skip"], example=EXAMPLE)]).fit(whole, images)
    keeps = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, [lightning_callback([Freezer(), "lars-skip"], example=EXAMPLE), keeps], max_epochs=2,
            enable_checkpointing=True).fit(module(), images)
    again, callback = module(), lightning_callback([Freezer(), "lars-skip"], example=EXAMPLE)
    trainer(tmp_path, [callback]).fit(again, images, ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert same_weights(whole, again)
    assert [row["epoch"] for row in callback.attached.history] == [1, 2, 3, 4]


def test_a_lightning_checkpoint_within_an_epoch_says_that_nothing_goes_on_from_it(module, images, tmp_path):
    pl = package("lightning.pytorch", "lightning")
    keeps = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, [lightning_callback("lars-skip", example=EXAMPLE), keeps], max_epochs=1,
                enable_checkpointing=True).fit(module(), images)
    assert [each for each in caught if issubclass(each.category, LayerlabWarning)
            and "written within an epoch" in str(each.message)]
    with pytest.raises(Refused, match="was written within an epoch, without the strategies' state"):
        trainer(tmp_path, [lightning_callback("lars-skip", example=EXAMPLE)]).fit(
            module(), images, ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)


@quiet
def test_what_lightning_cannot_do_with_a_strategy_gets_one_sentence(module, images, tmp_path):
    with pytest.raises(Refused, match=r"give example=… or set the module's example_input_array"):
        trainer(tmp_path, [lightning_callback("lars-skip")]).fit(module(), images)
    with pytest.raises(Refused, match=r"^memory-reorder replaces the training step.*it needs layerlab.fit"):
        trainer(tmp_path, [lightning_callback("memory-reorder", example=EXAMPLE)]).fit(module(), images)
    manual = module()
    manual.automatic_optimization = False
    with pytest.raises(Refused, match=r"needs automatic optimization with one optimizer.*use layerlab.attach"):
        trainer(tmp_path, [lightning_callback("lars-skip", example=EXAMPLE)]).fit(manual, images)


@quiet
def test_what_lightning_calls_forward_is_within_the_strategies_context_and_backward_is_not(module, images, tmp_path):
    seen: dict[str, set[int]] = {"training": set(), "backward": set(), "validation": set()}

    class Looks(module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen["training"].add(Marks.depth)
            loss = super().training_step(batch, batch_idx)
            loss.register_hook(lambda _: seen["backward"].add(Marks.depth))
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen["validation"].add(Marks.depth)

    trainer(tmp_path, [lightning_callback(Marks(), example=EXAMPLE)]).fit(Looks(), images, images)
    assert seen == {"training": {1}, "backward": {0}, "validation": {1}}


@quiet
def test_an_error_in_a_lightning_step_leaves_no_block_open(module, images, tmp_path):
    class Fails(module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("mine")

    before = torch.overrides._len_torch_function_stack()
    with pytest.raises(RuntimeError, match="mine"):
        trainer(tmp_path, [lightning_callback("low-bit", example=EXAMPLE)]).fit(Fails(), images)
    assert torch.overrides._len_torch_function_stack() == before


# ---------------------------------------------------------------------------- Hugging Face

@pytest.fixture
def hugging() -> None:
    """A skip where a package is missing."""
    for name in ("accelerate", "transformers"):
        package(name, "huggingface")


WORDS = {0: "bad poor dull slow sad", 1: "good fine nice quick glad"}
VOCABULARY = {word: 1 + index for index, word in enumerate(" ".join(WORDS.values()).split())}


def texts() -> list[dict[str, Any]]:
    """Sixty-four texts of eight words, most of which belong to the text's class."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for index in range(64):
        label = index % 2
        words = [WORDS[label if place < 6 else 1 - label].split()[int(torch.randint(5, (), generator=draw))]
                 for place in range(8)]
        found.append({"input_ids": torch.tensor([VOCABULARY[word] for word in words]), "labels": torch.tensor(label)})
    return found


def text_cnn() -> nn.Module:
    """A text classifier with two convolutions, as transformers has models."""
    transformers = package("transformers", "huggingface")

    class Config(transformers.PretrainedConfig):
        model_type = "text-cnn"

    class TextCnn(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.embedding = nn.Embedding(1 + len(VOCABULARY), 8)
            self.first, self.second = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
            self.norm = nn.BatchNorm1d(8)
            self.classifier = nn.Linear(8, 2)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """Leave them as torch makes them."""

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            x = self.embedding(input_ids).transpose(1, 2)  # (batch, channels, length)
            x = self.norm(self.second(torch.relu(self.first(x))))
            logits = self.classifier(x.mean(2))
            loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
            return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)

    torch.manual_seed(0)
    return TextCnn(Config())


def bert() -> nn.Module:
    """A transformer of two small layers."""
    transformers = package("transformers", "huggingface")
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=1 + len(VOCABULARY), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2))


def text_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def hugging_face(model: nn.Module, folder: Path, callbacks: list[Any], **options: Any) -> Any:
    transformers = package("transformers", "huggingface")

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *arguments: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    settings: dict[str, Any] = {
        "output_dir": str(folder), "num_train_epochs": EPOCHS, "per_device_train_batch_size": 16, "max_grad_norm": 0.0,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no",
        **options}
    optimizer = optimizer_of(model)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    return InOrder(model=model, args=transformers.TrainingArguments(**settings), train_dataset=texts(),
                   eval_dataset=texts(), callbacks=callbacks, optimizers=(optimizer, constant))


IDS = torch.ones(2, 8, dtype=torch.long)


@pytest.mark.usefixtures("hugging")
@quiet
@pytest.mark.parametrize(("build", "given"), [
    (text_cnn, strategies("lars-skip", alpha=4)), (text_cnn, Freezer()),
    (bert, strategies("low-bit", gradient_rounding="nearest")), (bert, Freezer()),
], ids=["cnn-lars-skip", "cnn-freezer", "bert-low-bit", "bert-freezer"])
def test_a_text_classifier_in_hugging_face_s_trainer_acts_and_ends_with_the_weights_of_the_plain_loop(
    tmp_path, build, given
):
    callback = huggingface_callback(given, example=IDS)
    trained = build()
    made = hugging_face(trained, tmp_path, [callback], eval_strategy="epoch")
    made.train()
    batches = [{name: torch.stack([each[name] for each in texts()[start : start + 16]])
                for name in ("input_ids", "labels")} for start in range(0, 64, 16)]
    own = build()
    plain(own, optimizer_of(own), batches, text_loss, given, IDS)
    assert same_weights(trained, own)
    untouched = build()
    hugging_face(untouched, tmp_path, []).train()
    assert not same_weights(trained, untouched)
    logged = [row for row in made.state.log_history if any(name.startswith(f"{given.name}/") for name in row)]
    assert len(logged) == EPOCHS
    if given.name == "lars-skip":
        assert max(row["lars-skip/skipped_layers"] for row in logged) > 0
        trained.eval()
        whole = {name: torch.stack([each[name] for each in texts()]) for name in ("input_ids", "labels")}
        assert (trained(**whole).logits.argmax(1) == whole["labels"]).float().mean() > 0.9
    assert not trained._forward_pre_hooks
    assert not trained._forward_hooks


@pytest.mark.usefixtures("hugging")
@quiet
def test_what_hugging_face_calls_forward_is_within_the_context_also_in_a_second_try(tmp_path):
    seen: set[tuple[bool, int]] = set()
    model = text_cnn()
    model.classifier.register_forward_hook(lambda module, *_: seen.add((module.training, Marks.depth)))
    made = hugging_face(model, tmp_path, [huggingface_callback(Marks(), example=IDS)], eval_strategy="epoch")
    failing = model.second.register_forward_hook(lambda *_: 1 / 0 if torch.is_grad_enabled() else None)
    with pytest.raises(ZeroDivisionError):
        made.train()
    failing.remove()
    seen.clear()
    made.train()
    # The example is tried before training, outside of it.
    assert seen == {(True, 1), (False, 1), (False, 0)}
    assert Marks.depth == 0


@pytest.mark.usefixtures("hugging")
@quiet
def test_hugging_face_s_trainer_goes_on_from_its_checkpoint_with_the_same_weights(tmp_path):
    given = [Freezer(), strategies("lars-skip", alpha=4)]
    whole = text_cnn()
    hugging_face(whole, tmp_path / "whole", [huggingface_callback(given, example=IDS)]).train()
    folder = tmp_path / "parts"
    hugging_face(text_cnn(), folder, [huggingface_callback(given, example=IDS)], save_strategy="epoch").train()
    (folder / "checkpoint-8" / "layerlab.pt").stat()
    again, callback = text_cnn(), huggingface_callback(given, example=IDS)
    hugging_face(again, folder, [callback]).train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert same_weights(whole, again)
    assert [row["epoch"] for row in callback.attached.history] == [1, 2, 3, 4]


@pytest.mark.usefixtures("hugging")
def test_a_checkpoint_of_hugging_face_s_within_an_epoch_is_none_to_go_on_from(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hugging_face(text_cnn(), tmp_path, [huggingface_callback("lars-skip", example=IDS)], save_strategy="steps",
                     save_steps=3, num_train_epochs=1).train()
    assert [each for each in caught if issubclass(each.category, LayerlabWarning)
            and 'Set save_strategy="epoch"' in str(each.message)]
    with pytest.raises(Refused, match=r"checkpoint-3 holds no layerlab.pt, the strategies' state"):
        hugging_face(text_cnn(), tmp_path, [huggingface_callback("lars-skip", example=IDS)]).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.usefixtures("hugging")
@quiet
def test_accumulated_gradients_in_hugging_face_s_trainer_are_one_step(tmp_path):
    callback = huggingface_callback("lars-skip", example=IDS)
    hugging_face(text_cnn(), tmp_path, [callback], gradient_accumulation_steps=2, num_train_epochs=2).train()
    assert callback.attached.run.step == 4


# ---------------------------------------------------------------------------- without them


@pytest.mark.parametrize(("make", "name", "extra"), [
    (lightning_callback, "lightning", "lightning"), (huggingface_callback, "transformers", "huggingface"),
    (huggingface_callback, "accelerate", "huggingface"),
])
def test_a_package_that_is_missing_is_named_with_how_to_install_it(monkeypatch, make, name, extra):
    if make is huggingface_callback and name == "accelerate":
        package("transformers", extra)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refused, match=rf"needs the package {name} .*pip install 'layerlab\[{extra}\]'"):
        make("lars-skip", example=EXAMPLE)
