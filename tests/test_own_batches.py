"""Data, batches, losses and metrics of the user's own, as people bring them to `fit` and `compare`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset
from torchvision.transforms import v2

from layerlab import Fit, LayerlabWarning, Refused, Strategy, compare, evaluate, fit, load_dataset, own_data, strategies
from layerlab.base.errors import LayerlabError

QUICK: dict[str, Any] = {"epochs": 2, "lr": 0.1, "progress": False, "measure": False}
WORDS = 11


def table(rows: int = 192, columns: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A table with an easy rule: (rows, columns), and the class of each row."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return x, (x.sum(1) > 0).long()


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))


class Rows(torch.utils.data.Dataset):
    """A dataset whose examples are changed at random each time, as augmentation does."""

    def __init__(self, rows: int = 192, seed: int = 0) -> None:
        self.x, self.y = table(rows, seed=seed)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 0.1 * torch.randn(5), self.y[index]


class Named(Rows):
    """The same with names, as Hugging Face's datasets have them."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return {"left": x[:2], "right": x[2:], "label": y}


class TwoSides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 8), nn.Linear(3, 8)
        self.output = nn.Linear(8, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.output(torch.relu(self.left(left) + self.right(right)))


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def loaders(batch_size: int = 32, **options: Any) -> tuple[DataLoader, DataLoader]:
    return DataLoader(Rows(), batch_size, shuffle=True, **options), DataLoader(Rows(64, seed=1), 50)


def named_loaders() -> dict[str, DataLoader]:
    return {"train": DataLoader(Named(), 32, shuffle=True), "test": DataLoader(Named(64), 50)}


# A language of words that follow each other: the next is one or two further, so that a network can learn it.
def sentences(rows: int = 128, length: int = 12, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 3, (rows, length), generator=draw)
    return (torch.randint(WORDS, (rows, 1), generator=draw) + steps.cumsum(1)) % WORDS


class TinyLanguageModel(nn.Module):
    """A causal language model: what it says of a place knows nothing of the places after it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.conv1, self.conv2 = nn.Conv1d(width, width, 2), nn.Conv1d(width, width, 2)
        self.output = nn.Linear(width, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words).transpose(1, 2)  # (batch, width, length)
        for conv in (self.conv1, self.conv2):
            x = torch.relu(conv(nn.functional.pad(x, (1, 0))))
        return self.output(x.transpose(1, 2))  # (batch, length, words)


def next_word(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch[:, :-1]).transpose(1, 2), batch[:, 1:])


# The stories ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "network"),
    [
        (lambda: (table(), table(64, seed=1)), perceptron),
        (lambda: [list(table()), list(table(64, seed=1))], perceptron),
        (lambda: (TensorDataset(*table()), TensorDataset(*table(64, seed=1))), perceptron),
        (lambda: (Rows(), Rows(64, seed=1)), perceptron),
        (lambda: Rows(), perceptron),
        (lambda: (list(zip(*table(), strict=True)), Rows(64, seed=1)), perceptron),
        (loaders, perceptron),
        (lambda: {"train": Rows(), "valid": Rows(64, seed=2), "test": Rows(64, seed=1)}, perceptron),
        (lambda: (Named(), Named(64)), TwoSides),
        (named_loaders, TwoSides),
        (lambda: ({"left": table()[0][:, :2], "right": table()[0][:, 2:], "label": table()[1]},) * 2, TwoSides),
        (lambda: ((table()[0][:, :2], table()[0][:, 2:], table()[1]),) * 2, TwoSides),
        (lambda: (({"left": table()[0][:, :2], "right": table()[0][:, 2:]}, table()[1]),) * 2, TwoSides),
    ],
    ids=["tensors", "lists", "tensor-datasets", "datasets", "one-dataset", "lists-of-examples",
         "loaders", "three-halves", "dict-datasets",
         "dict-loaders", "dicts-of-tensors", "two-inputs", "dict-and-target"],
)
def test_data_of_one_s_own_train_as_they_are(data, network):
    batch_size = {} if data in (loaders, named_loaders) else {"batch_size": 32}
    result = fit(network, data(), **{**QUICK, **batch_size, "epochs": 6})
    assert result.final["test/top1"] > 0.8
    assert 0.4 < result.chance < 0.7
    assert "top-1" in str(result)


def test_a_tensor_pair_of_bytes_and_classes_is_a_dataset_of_images():
    digits = load_dataset("digits", limit=256, test_limit=64, device="cpu")
    pair = [(half.images, half.labels) for half in (digits.train, digits.test)]
    data = own_data(pair, device="cpu")
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    settings = {**QUICK, "augment": "crop-flip", "padding": 1}
    assert same_weights(fit(network, data, **settings).model, fit(network, digits, **settings).model)


def test_a_hugging_face_dataset_trains_as_it_is():
    datasets = pytest.importorskip("datasets")
    x, y = table()
    made = datasets.Dataset.from_dict(
        {"text": [f"row {row}" for row in range(len(x))], "values": x.tolist(), "label": y.tolist()},
        features=datasets.Features(text=datasets.Value("string"), values=datasets.List(datasets.Value("float32")),
                                   label=datasets.ClassLabel(names=["low", "high"])))
    halves = made.train_test_split(0.25, seed=0)
    data = own_data(halves, device="cpu")
    assert (data.class_names, data.classes, len(data.train)) == (("low", "high"), 2, 144)
    assert "left out, since they hold no numbers: text" in str(data)
    for given in (halves, made, DataLoader(made.with_format("torch").remove_columns("text"), 32)):
        halves = (given, given) if isinstance(given, DataLoader) else given
        batch_size = {} if isinstance(given, DataLoader) else {"batch_size": 32}
        assert fit(perceptron, halves, **{**QUICK, **batch_size, "epochs": 8}).final["test/top1"] > 0.8


@pytest.mark.parametrize("loss", [next_word, None])
def test_a_tiny_language_model_trains_through_the_same_contract_with_a_strategy_that_freezes(loss):
    """Next-word loss of (model, batch), or of (output, target) with the words moved by one."""
    train, test = sentences(), sentences(32, seed=1)
    pairs = (train, test) if loss else ((train[:, :-1], train[:, 1:]), (test[:, :-1], test[:, 1:]))
    measured = loss or (lambda output, target: nn.functional.cross_entropy(output.transpose(1, 2), target))
    both = compare(
        TinyLanguageModel, pairs, {"full": (), "skip": strategies("lars-skip", rule="own-history")}, loss=measured,
        metrics="perplexity", epochs=6, lr=0.5, batch_size=16, progress=False,
    )
    full, skip = both.results["full", 0], both.results["skip", 0]
    assert full.final["test/perplexity"] == pytest.approx(math.exp(full.final["test/loss"]))
    # Two words may follow each word; any of eleven before anything is learnt.
    assert full.final["test/perplexity"] < 4 < evaluate(
        TinyLanguageModel(), own_data(pairs, device="cpu").test, measured, metrics="perplexity")["test/perplexity"]
    assert max(row["lars-skip/skipped_layers"] for row in skip.history) > 0
    assert skip.total("cost/backward_flops") < full.total("cost/backward_flops")
    assert "perplexity" in str(both)
    assert "top-1" not in str(both)


def test_a_regression_has_no_accuracy_and_its_metrics_are_functions_or_objects_of_torchmetrics():
    x, _ = table()
    pair = ((x, x.sum(1, keepdim=True).double()), (x[:50], x[:50].sum(1, keepdim=True).double()))
    metrics: dict[str, Any] = {"error": lambda output, target: (output - target).abs().mean()}
    torchmetrics = pytest.importorskip("torchmetrics")
    metrics["object"] = torchmetrics.MeanAbsoluteError()
    result = fit(nn.Linear(5, 1), pair, loss=nn.MSELoss(), metrics=metrics, batch_size=32, **QUICK)
    assert result.final["test/error"] == pytest.approx(result.final["test/object"], rel=1e-5)
    assert "test/top1" not in result.final
    assert math.isnan(result.chance)
    with torch.no_grad():
        assert result.final["test/error"] == pytest.approx(
            (result.model(pair[1][0]) - pair[1][1]).abs().mean().item(), rel=1e-5)


def test_transforms_of_torchvision_change_training_batches_alone():
    x = torch.rand(64, 3, 8, 8)
    y = torch.arange(64) % 4
    data = own_data(((x, y), (x, y)), transform=v2.Compose([v2.RandomHorizontalFlip(1.0), v2.MixUp(num_classes=4)]),
                    device="cpu")
    mixed, target = next(data.train.batches(16, torch.Generator().manual_seed(0)))
    assert target.shape == (16, 4)
    again, _ = next(data.train.batches(16, torch.Generator().manual_seed(0)))
    assert torch.equal(mixed, again)
    assert torch.equal(next(data.test.batches(64))[0], x)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    assert math.isfinite(fit(network, data, batch_size=16, **QUICK).final["test/top1"])


def test_a_loss_of_model_and_batch_takes_images_of_a_dataset_too():
    digits = load_dataset("digits", limit=256, test_limit=64, device="cpu")
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    losses = (None, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]))
    one, other = (fit(network, digits, loss=loss, accumulate=3, **QUICK) for loss in losses)
    assert same_weights(one.model, other.model)
    assert one.final["test/top1"] == other.final["test/top1"]


class Texts(torch.utils.data.Dataset):
    """Sentences of different lengths, which only a collate_fn makes into a batch."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[str, int]:
        return ("good " if index % 2 else "bad ") * (1 + index % 3), index % 2


def padded(examples: list[tuple[str, int]]) -> dict[str, Tensor]:
    rows = [torch.tensor([ord(each) for each in text]) for text, _ in examples]
    return {"letters": nn.utils.rnn.pad_sequence(rows, batch_first=True), "lengths": torch.tensor(list(map(len, rows))),
            "label": torch.tensor([label for _, label in examples])}


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letters, self.output = nn.Embedding(128, 8, padding_idx=0), nn.Linear(8, 2)

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        return self.output(self.letters(letters).sum(1) / lengths.unsqueeze(1))


def test_texts_of_different_lengths_train_with_the_loader_s_own_collate_fn(tmp_path):
    loader = DataLoader(Texts(), 16, shuffle=True, collate_fn=padded)
    settings = {**QUICK, "epochs": 6, "lr": 0.5, "checkpoint": tmp_path}
    first = fit(Reader, (loader, loader), **settings)
    assert first.final["test/top1"] > 0.9
    assert same_weights(fit(Reader, (loader, loader), **settings).model, first.model)


def test_a_dataset_that_makes_its_own_batches_keeps_them():
    x, y = table()
    batches = [(x[start : start + 24], y[start : start + 24]) for start in range(0, 192, 24)]
    for loader in (DataLoader(batches, batch_size=None, shuffle=True),
                   DataLoader(TensorDataset(x, y), batch_sampler=[list(range(start, start + 24)) for start in
                                                                  range(0, 192, 24)])):
        result = fit(perceptron, (loader, loader), **QUICK)
        assert result.steps == 2 * 8
        assert result.settings.batch_size == 24


def test_where_there_are_no_classes_the_loss_says_whether_a_method_pays():
    data = (sentences(), sentences(32, seed=1))
    both = compare(TinyLanguageModel, data, {"full": (), "skip": strategies("lars-skip", rule="own-history")},
                   loss=next_word, seeds=[0, 1, 2], epochs=6, lr=0.5, batch_size=16, equal="flops", progress=False)
    pays = both.pays("skip")
    plain = both.of("skip · equal flops")
    for value, mine, theirs in zip(pays.points.values, both.of("skip"), plain, strict=True):
        assert value == pytest.approx(theirs.final["test/loss"] - mine.final["test/loss"])
    assert "lower loss against training" in str(both)


# Order, resume, arms -------------------------------------------------------------------------------------------------


def weighted() -> tuple[DataLoader, DataLoader]:
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 192, 192, generator=torch.Generator().manual_seed(7))
    return DataLoader(Rows(), 32, sampler=sampler), DataLoader(Rows(64), 50)


@pytest.mark.parametrize(
    "data",
    [loaders, weighted, lambda: (Rows(), Rows(64)), lambda: (table(), table(64)),
     lambda: loaders(generator=torch.Generator().manual_seed(3)), lambda: loaders(num_workers=2)],
    ids=["shuffled", "weighted", "dataset", "tensors", "generator", "workers"],
)
def test_an_interrupted_fit_ends_with_the_same_weights(tmp_path, data):
    settings: dict[str, Any] = {"epochs": 3, "lr": 0.1, "measure": False}
    whole = fit(perceptron, data(), progress=False, **settings)
    torch.manual_seed(99)
    first = Fit(perceptron, data(), checkpoint=tmp_path, **settings)
    first.train_epoch()
    torch.rand(5)
    again = fit(perceptron, data(), checkpoint=tmp_path, progress=False, **settings)
    assert same_weights(again.model, whole.model)
    assert [row["train/loss"] for row in again.history] == [row["train/loss"] for row in whole.history]


class Noisy(Strategy):
    """Draws random numbers of torch, which is its own business."""

    name = "noisy"

    def on_after_backward(self, run: Any) -> None:
        torch.rand(3)


def test_arms_see_the_same_batches_whatever_a_strategy_draws():
    def network() -> nn.Module:
        return nn.Linear(5, 2)

    both = compare(network, loaders(), {"plain": (), "noisy": Noisy()}, epochs=2, lr=0.1, progress=False)
    assert same_weights(both.results["plain", 0].model, both.results["noisy", 0].model)
    assert both.untouched == ("noisy",)

    def initial() -> nn.Module:
        torch.manual_seed(0)
        return network()

    other = [fit(initial, loaders(), seed=seed, **QUICK).model for seed in (0, 1)]
    assert not same_weights(*other)


class Writes(Strategy):
    """Writes into the data, which other arms train with."""

    name = "writes"

    def on_epoch_start(self, run: Any) -> None:
        if hasattr(run.data, "origin"):  # not where it is only rehearsed
            run.data.origin.tree[0].zero_()


def test_an_arm_that_writes_into_the_user_s_tensors_is_refused_and_they_stay_as_they_were():
    train = table()
    before = train[0].clone()
    with pytest.raises(Refused, match="writes' changes the training examples in place"):
        compare(perceptron, (train, table(64)), {"plain": (), "writes": Writes()}, **QUICK)
    assert torch.equal(train[0], before)


class Own:
    """A sampler with random numbers that nobody can seed."""

    def __iter__(self):
        return iter(torch.randperm(192, generator=torch.Generator().manual_seed(id(self) % 1000)).tolist())

    def __len__(self) -> int:
        return 192


def test_a_loader_that_cannot_be_resumed_exactly_is_said_to_be_so_once(tmp_path):
    halves = DataLoader(Rows(), 32, sampler=Own()), DataLoader(Rows(64), 50)
    with pytest.warns(LayerlabWarning, match="cannot be resumed exactly.*generator") as said:
        compare(perceptron, halves, {"one": (), "two": ()}, seeds=[0, 1], checkpoint=tmp_path, **QUICK)
    assert len([each for each in said if "resumed" in str(each.message)]) == 1


def test_a_sampler_of_torch_is_not_said_to_be_inexact(tmp_path, recwarn):
    fit(perceptron, loaders(sampler=None), checkpoint=tmp_path, **QUICK)
    rows = Rows()
    sampled = DataLoader(rows, 32, sampler=RandomSampler(rows)), DataLoader(Rows(64), 50)
    fit(perceptron, sampled, checkpoint=tmp_path / "other", **QUICK)
    assert not [each for each in recwarn if "resumed" in str(each.message)]


def test_another_content_of_the_data_is_no_checkpoint_of_theirs(tmp_path):
    x, y = table()
    fit(perceptron, ((x, y), (x, y)), checkpoint=tmp_path, **QUICK)
    with pytest.raises(LayerlabError, match="other arguments"):
        fit(perceptron, ((x + 1, y), (x, y)), checkpoint=tmp_path, **QUICK)


def needing(*needs: str) -> Strategy:
    class Needing(Strategy):
        name = "needing"

    Needing.needs = frozenset(needs)
    return Needing()


GIVEN: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (table(), table()),
    "dataset": lambda: (Rows(), Rows(64)),
    "loader": loaders,
    "dicts": named_loaders,
    "numbers": lambda: ((table()[0], table()[0]),) * 2,
    "pictures": lambda: ((torch.rand(64, 1, 4, 4), torch.arange(64) % 2),) * 2,
    "digits": lambda: load_dataset("digits", limit=64, test_limit=8, device="cpu"),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "dicts": TwoSides, "numbers": lambda: nn.Linear(5, 5),
    "digits": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    "pictures": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2)),
}


@pytest.mark.parametrize(
    ("need", "gives"),
    [
        ("one tensor", {"tensors", "dataset", "loader", "numbers", "pictures", "digits"}),
        ("images", {"pictures", "digits"}),
        ("targets", set(GIVEN)),
        ("classes", set(GIVEN) - {"numbers"}),
        ("fixed order", {"tensors", "dataset", "numbers", "pictures", "digits"}),
        ("resident", {"tensors", "numbers", "pictures", "digits"}),
    ],
)
def test_a_strategy_is_refused_where_the_data_are_not_what_it_needs(need, gives):
    taken = set()
    for name, data in GIVEN.items():
        own = {} if name in ("loader", "dicts") else {"batch_size": 32}
        loss = nn.MSELoss() if name == "numbers" else None
        try:
            Fit(NETWORKS.get(name, perceptron), data(), needing(need), loss=loss, **own)
        except Refused as refusal:
            sentence = str(refusal)
            assert sentence.startswith("needing needs ")
            assert "does not give; give" in sentence
            assert sentence.endswith(", or leave the strategy out.")
        else:
            taken.add(name)
    assert taken == gives


@pytest.mark.parametrize(
    ("name", "data", "network", "loss", "sentence"),
    [
        ("learn-and-drop", loaders, perceptron, None, "needs examples that can be read again in one order"),
        ("low-bit", named_loaders, TwoSides, None, "low-bit needs batches that give the network one tensor"),
        ("memory-reorder", lambda: (sentences(), sentences()), TinyLanguageModel, next_word,
         "memory-reorder needs batches with a tensor of targets"),
        ("network-with-subnetworks", lambda: (table(), table()), perceptron,
         lambda model, batch: model(batch[0]).mean(), r"calls the loss with \(output, target\), and this loss takes"),
    ],
)
def test_the_bundled_strategies_say_what_they_need(name, data, network, loss, sentence):
    own = {} if data in (loaders, named_loaders) else {"batch_size": 32}
    with pytest.raises(Refused, match=sentence):
        fit(network, data(), name, loss=loss, **own, **QUICK)


def test_a_need_that_there_is_not_is_told_to_the_strategy_s_author():
    with pytest.raises(Refused, match="needs 'pictures' of its data, which is none of one tensor, images"):
        Fit(perceptron, (table(), table()), needing("pictures"))


# What is refused -----------------------------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self):
        yield from zip(*table(), strict=True)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (lambda: table(), r"different shapes, which are no \(train, test\); give \(\(x, y\), \(test_x, test_y\)\)"),
        (lambda: loaders()[0], r"data cannot be a DataLoader of Rows; give \(train, test\)"),
        (lambda: "digits", "data cannot be 'digits'.*load_dataset"),
        (lambda: 3, "data cannot be 3; give"),
        (lambda: {"training": Rows(), "cats": Rows()}, "'cats', not all of which are halves"),
        (lambda: {"test": Rows()}, "no 'train'"),
        (lambda: (table(), table()[0]), "batches of one form"),
        (lambda: ((table()[0], table()[1][:-1]),) * 2, "192 and 191 rows"),
        (lambda: (["a", "b"], ["c"]), "A batch of the train half is a sequence of str; batches"),
        (lambda: ((1, 2), Rows()), "The train half cannot be a tuple; give"),
        (lambda: (DataLoader(Endless(), 32),) * 2, "has no length"),
        (lambda: (Endless(), Rows()), "IterableDataset.*DataLoader"),
        (lambda: (DataLoader(["a", "b"], 2), Rows()), "A batch of the train half is a sequence of str"),
        (lambda: ([(torch.zeros(3), "cat")], Rows()), "A batch of the train half is a sequence of Tensor, "),
    ],
)
def test_what_is_no_data_is_refused_in_one_sentence(data, sentence):
    with pytest.raises(LayerlabError, match=sentence) as error:
        fit(perceptron, data(), batch_size=8, **QUICK)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: fit(perceptron, loaders(), batch_size=16, **QUICK), "batches are of 32, so that batch_size=16"),
        (lambda: fit(perceptron, (table(), table()), augment="crop", **QUICK), "augment='crop' is for images"),
        (lambda: fit(perceptron, (table(), table()), views="mirrored", **QUICK), "views='mirrored' mirrors images"),
        (lambda: fit(nn.Linear(4, 2), (table(), table()), **QUICK), r"does not take float32 of shape \(2, 5\)"),
        (lambda: fit(perceptron, (table(), table()), loss=lambda a, b: a, **QUICK), "The loss does not map the output"),
        (lambda: fit(TinyLanguageModel, (sentences(), sentences()), **QUICK), r"no target,.*loss=function\(model"),
        (lambda: fit(perceptron, (table(), table()), metrics="perplexty", **QUICK), "Did you mean 'perplexity'"),
        (lambda: fit(perceptron, (table(), table()), metrics={"a": 3}, **QUICK), "The metric 'a' is 3"),
        (lambda: fit(perceptron, (table(), table()), metrics={"a": lambda o, t: o @ t}, **QUICK), "metric 'a' does"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused_in_one_sentence(call: Callable[[], Any], sentence: str):
    with pytest.raises(Refused, match=sentence):
        call()
