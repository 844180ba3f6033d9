"""Networks that begin with trained weights: torchvision's by name, or a file's, and a new head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from layerlab import Fit, LayerlabError, Refused, Strategy, build_model, fit, load_dataset, load_model, save_model

SMALL: dict[str, Any] = {"depth": 8, "channels": 1}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """torch's cache of weights, in which those of a network lie that is trained nowhere."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    trained = torchvision.models.squeezenet1_1()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    torch.save(trained.state_dict(), folder / Path(url).name)
    return folder


def test_torchvision_s_weights_are_taken_by_name_with_a_new_head(cache):
    network = build_model("squeezenet1_1", num_classes=7, weights="DEFAULT")
    trained = torch.load(next(cache.iterdir()), weights_only=True)
    for name, value in network.state_dict().items():
        if name.startswith("classifier.1"):
            assert value.shape[0] == 7
        else:
            assert torch.equal(value, trained[name]), name
    whole = build_model("squeezenet1_1", weights="IMAGENET1K_V1")
    assert all(torch.equal(value, trained[name]) for name, value in whole.state_dict().items())


def test_a_file_s_weights_are_taken_and_fine_tuned_from_there(tmp_path):
    digits = load_dataset("digits", limit=500, test_limit=200, device="cpu")
    first = fit(lambda: build_model("resnet-cifar", num_classes=10, **SMALL), digits, epochs=4, progress=False)
    torch.save({"state_dict": first.model.state_dict()}, tmp_path / "trained.pt")
    save_model(tmp_path / "saved.pt", first, digits, "resnet-cifar", num_classes=10, **SMALL)
    for file in ("trained.pt", "saved.pt"):
        tuned = fit(lambda file=file: build_model("resnet-cifar", num_classes=10, weights=tmp_path / file, **SMALL),
                    digits, epochs=1, lr=0.01, progress=False)
        anew = fit(lambda: build_model("resnet-cifar", num_classes=10, **SMALL), digits, epochs=1, lr=0.01,
                   progress=False)
        assert tuned.final["test/top1"] > anew.final["test/top1"] + 0.2
    again = save_model(tmp_path / "again.pt", tuned, digits, "resnet-cifar", num_classes=10,
                       weights=str(tmp_path / "trained.pt"), **SMALL)
    (tmp_path / "trained.pt").unlink()
    assert load_model(again).top1 == tuned.final["test/top1"]


@pytest.mark.parametrize(
    ("name", "weights", "sentence"),
    [
        ("resnet18", "DEFAULTS", "Unknown weights of resnet18 'DEFAULTS'. Did you mean 'DEFAULT'.*Or pass a file"),
        ("resnet-cifar", "DEFAULT", "Unknown weights of resnet-cifar 'DEFAULT'.*Or pass a file"),
        ("resnet-cifar", "no.pt", "cannot be read as weights.*torch.save"),
        ("resnet-cifar", "other.pt", "another network's than resnet-cifar.*build the network"),
        ("resnet-cifar", "numbers.pt", "holds no weights by name"),
    ],
)
def test_weights_that_are_none_are_refused_in_one_sentence(tmp_path, monkeypatch, name, weights, sentence):
    monkeypatch.chdir(tmp_path)
    Path("no.pt").write_bytes(b"nothing")
    torch.save(build_model("mlp", num_classes=10, image_size=8, width=16).state_dict(), "other.pt")
    torch.save({"epoch": 3}, "numbers.pt")
    with pytest.raises(LayerlabError, match=sentence):
        build_model(name, num_classes=10, weights=weights, **(SMALL if name != "resnet18" else {}))


def test_weights_that_cannot_be_fetched_are_said_to_belong_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", fails)
    with pytest.raises(LayerlabError, match=r"cannot be fetched \(no network\); put the file resnet18-f37072fd\.pth"):
        build_model("resnet18", num_classes=10, weights="DEFAULT")


# float16 -------------------------------------------------------------------------------------------------------------


class Overflows(Strategy):
    """Makes the gradient of two steps too large for 16 bits."""

    name = "overflows"

    def training_step(self, run: Any, x: Any, y: Any) -> Any:
        times = 1e6 if run.step in (2, 3) else 1.0
        run.optimizer.zero_grad(set_to_none=True)
        with run.autocast():
            loss = times * run.loss(run.training_model(x), y)
        before = [each.detach().clone() for each in run.model.parameters()]
        if run.backward(loss):
            run.optimizer.step()
        moved = any(not torch.equal(*pair) for pair in zip(before, run.model.parameters(), strict=True))
        assert moved == (times == 1.0)
        return loss / times


def test_float16_leaves_out_a_step_whose_gradient_overflows_and_goes_on(tmp_path):
    digits = load_dataset("digits", limit=256, test_limit=100, device="cpu")
    network = build_model("mlp", num_classes=10, image_size=8, width=32)
    settings: dict[str, Any] = {"precision": "float16", "lr": 0.05, "batch_size": 32, "epochs": 3}
    whole = fit(network, digits, Overflows(), progress=False, **settings)
    assert whole.final["test/top1"] > 0.4
    assert all(value.isfinite().all() for value in whole.model.state_dict().values())
    first = Fit(network, digits, Overflows(), checkpoint=tmp_path, **settings)
    first.train_epoch()
    assert first.run.scaler.get_scale() < 2.0**16
    resumed = Fit(network, digits, Overflows(), checkpoint=tmp_path, **settings)
    assert resumed.run.scaler.get_scale() == first.run.scaler.get_scale()
    again = fit(network, digits, Overflows(), checkpoint=tmp_path, progress=False, **settings)
    pairs = zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_float16_is_close_to_float32_also_in_parts_and_clipped():
    digits = load_dataset("digits", limit=256, test_limit=100, device="cpu")
    network = build_model("mlp", num_classes=10, image_size=8, width=32)
    settings: dict[str, Any] = {"lr": 0.05, "batch_size": 32, "epochs": 1, "accumulate": 2, "clip_norm": 0.5}
    one, other = (fit(network, digits, precision=kind, progress=False, **settings) for kind in ("float32", "float16"))
    assert other.final["test/loss"] == pytest.approx(one.final["test/loss"], rel=0.02)


def test_float16_is_refused_with_a_strategy_that_uses_gradients_while_backward_runs():
    digits = load_dataset("digits", limit=256, test_limit=100, device="cpu")
    with pytest.raises(Refused, match=r"memory-reorder uses gradients while backward runs.*precision='bfloat16'"):
        fit(build_model("mlp", num_classes=10, image_size=8, width=32), digits, "memory-reorder", precision="float16",
            progress=False)
