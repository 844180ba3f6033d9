"""Networks by name, and the order of their layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerlab import LayerlabError, build_model, fit, forward_order, load_dataset, load_model, prefixes, save_model
from layerlab.measure import layer_costs


def test_vgg_f_is_the_published_network():
    table = layer_costs(build_model("vgg-f"), (3, 224, 224)).set_index("layer")
    macs = table["forward_macs"].tolist()
    assert macs[:5] == [67_744_512, 298_598_400, 99_680_256, 99_680_256, 99_680_256]
    assert sum(macs[5:]) == pytest.approx(58.6e6, rel=1e-3)


@pytest.mark.parametrize(("name", "options", "parameters", "macs"), [
    # Caffe's LeNet; Table 6 of He et al., CVPR 2016 (0.27 M, 0.85 M); NOTES.md of adaptive-layer-pruning.
    ("lenet", {}, 431_080, 2_293_000),
    ("resnet-cifar", {"depth": 20}, 269_722, 40_551_040),
    ("resnet-cifar", {"depth": 56}, 853_018, 125_485_696),
    ("preact-resnet", {"depth": 164}, 1_703_258, 247_646_720),
    ("vgg-cifar", {"depth": 11, "batch_norm": False}, 9_225_610, 152_769_536),
    ("airnet", {}, 498_104, 33_066_272),
    # 1.97 M parameters: Jordan, arXiv 2404.00498.
    ("airbench94", {}, 1_972_792, 118_147_360),
])
def test_networks_for_small_images_are_the_published_ones(name, options, parameters, macs):
    model = build_model(name, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    shape = (1, 28, 28) if name == "lenet" else (3, 32, 32)
    assert layer_costs(model, shape)["forward_macs"].sum() == macs
    assert model.eval()(torch.randn(2, *shape)).shape == (2, 10)


def test_layers_come_in_forward_order_not_as_declared(residual):
    model = residual()
    names = [name for name, _ in forward_order(model, torch.randn(2, 1, 8, 8))]
    assert names == ["conv1", "bn1", "conv2", "bn2", "classifier"]
    assert next(name for name, _ in model.named_modules() if name in names) == "classifier"


def test_a_layer_with_a_parametrized_weight_is_one_layer_with_or_without_a_bias():
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(
        norm(nn.Conv2d(1, 4, 3, bias=False)), nn.BatchNorm2d(4), norm(nn.Conv2d(4, 4, 3)), nn.Flatten(),
        nn.Linear(64, 2),
    )
    example = torch.randn(2, 1, 8, 8)
    assert [name for name, _ in forward_order(model, example)] == ["0", "1", "2", "4"]
    assert [prefix for _, prefix in prefixes(model, example)] == [[model[0], model[1]], [model[0], model[1], model[2]]]


def test_tracing_leaves_no_trace(residual):
    model = residual().train()
    before = model.bn1.running_mean.clone()
    forward_order(model, torch.randn(2, 1, 8, 8))
    assert model.training
    assert model.bn1.training
    assert torch.equal(model.bn1.running_mean, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_network_is_traced_without_compiling_it_anew(residual):
    model, compiled = residual(), []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model.compile(backend=backend)
    names = [name for name, _ in forward_order(model, torch.randn(2, 1, 8, 8))]
    assert names == ["conv1", "bn1", "conv2", "bn2", "classifier"]
    assert not compiled


def test_a_prefix_takes_its_normalisation_along(residual):
    model = residual()
    found = prefixes(model, torch.randn(2, 1, 8, 8))
    assert [name for name, _ in found] == ["conv1", "conv2"]
    assert found[0][1] == [model.conv1, model.bn1]
    assert found[1][1] == [model.conv1, model.bn1, model.conv2, model.bn2]


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "densenet121", "mobilenet_v2", "vit_b_16"])
def test_backward_ends_at_the_edge_of_a_frozen_prefix_of_any_network(name):
    model = build_model(name, num_classes=3, **({"image_size": 32} if name.startswith("vit") else {}))
    x = torch.randn(2, 3, 32, 32)
    layers = prefixes(model, x)
    assert len(layers) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    _, frozen = layers[len(layers) // 2]
    for module in frozen:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    model(x).sum().backward()
    names = {module: n for n, module in model.named_modules()}
    assert all(p.grad is None for module in frozen for p in module.parameters(recurse=False))
    learning = [names[m] for _, m in forward_order(model, x) if m not in set(frozen)]
    assert learning
    assert all(p.grad is not None for n in learning for p in model.get_submodule(n).parameters(recurse=False))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet8", {}, r"Unknown model 'resnet8'. Did you mean 'resnet\d+'\?"),
        ("vgg-f", {"image_size": 32}, "at least 48 pixels"),
        ("lenet", {"image_size": 8}, "at least 16 pixels"),
        ("resnet-cifar", {"depth": 18}, r"6n \+ 2 layers.*depth=18"),
        ("preact-resnet", {"depth": 18}, r"9n \+ 2 layers.*depth=18"),
        ("vgg-cifar", {"depth": 13}, "11 or 16 layers"),
        ("mlp", {"size": 3}, r"'mlp' cannot be built.*it takes num_classes, image_size"),
        ("resnet18", {"size": 3}, "'resnet18' cannot be built"),
        ("resnet18", {"channels": 1}, "takes 3-channel images"),
    ],
)
def test_bad_input(name, options, message):
    with pytest.raises(LayerlabError, match=message):
        build_model(name, **options)


class Versioned(nn.Linear):
    """Weights of its first version were half as large."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *more):
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = 2 * state[f"{prefix}weight"]
        super()._load_from_state_dict(state, prefix, metadata, *more)


class Remembers(nn.Linear):
    """Keeps more than tensors."""

    memory: object = None

    def get_extra_state(self):
        return self.memory

    def set_extra_state(self, state):
        self.memory = state


class Forgets(nn.Linear):
    """Loads other weights than it gives."""

    def _load_from_state_dict(self, state, prefix, *more):
        state[f"{prefix}bias"] = state[f"{prefix}bias"] + 1
        super()._load_from_state_dict(state, prefix, *more)


def _trained(kind, **settings):
    data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
    build = lambda: nn.Sequential(nn.Flatten(), kind(64, 10))  # noqa: E731
    return build, data, fit(build, data, epochs=1, progress=False, **settings)


@pytest.mark.parametrize("memory", [None, {"seen": [1, 2.5]}, torch.ones(2)])
@pytest.mark.parametrize("kind", [Versioned, Remembers])
def test_a_saved_network_comes_back_with_its_versions_and_what_its_modules_keep(kind, memory, tmp_path):
    build, data, result = _trained(kind)
    result.model[1].memory = memory
    again = load_model(save_model(tmp_path / "model.pt", result, data), build).model
    assert torch.equal(again[1].weight, result.model[1].weight)
    if kind is Remembers:
        assert repr(again[1].memory) == repr(memory)


def test_a_network_that_would_not_come_back_is_not_saved_and_the_file_before_stays(tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(b"before")
    _, data, result = _trained(Forgets)
    with pytest.raises(LayerlabError, match=r"model.pt was not written: '1.bias' comes back from it as another value"):
        save_model(file, result, data)
    _, data, result = _trained(Remembers)
    result.model[1].memory = tmp_path
    with pytest.raises(LayerlabError, match=r"The network has a pathlib.* at '1._extra_state'.* let get_extra_state"):
        save_model(file, result, data)
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_one_flipped_bit_of_a_saved_network_is_noticed(tmp_path):
    build, data, result = _trained(nn.Linear)
    file = save_model(tmp_path / "model.pt", result, data)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(LayerlabError, match=r"model.pt is damaged .*its content is not what was written"):
        load_model(file, build)


class Fails(nn.Linear):
    def forward(self, x):
        raise KeyError("gone")


class Unique(nn.Linear):
    def __deepcopy__(self, memo):
        raise OSError("only one of me")


@pytest.mark.parametrize(("network", "said"), [
    (lambda: nn.Sequential(nn.Flatten(), Fails(64, 10)), r"does not take images .*KeyError: 'gone', line \d+ of"),
    (lambda: 1 / 0, r"cannot be built \(ZeroDivisionError: .*, line \d+ of test_models.py\)"),
    (nn.Sequential(nn.Flatten(), Unique(64, 10)), r"cannot be copied \(OSError: only one of me"),
    (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), r"learn their size from the first image \(1.weight\)"),
    (lambda: nn.Sequential(nn.LazyBatchNorm2d(affine=False), nn.Flatten(), nn.Linear(64, 10)), "learn their size"),
])
def test_a_network_s_own_error_ends_in_a_sentence(network, said):
    data = load_dataset("digits", limit=256, test_limit=64, device="cpu")
    with pytest.raises(LayerlabError, match=said):
        fit(network, data, epochs=1, progress=False)
