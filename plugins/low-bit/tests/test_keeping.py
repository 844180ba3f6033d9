"""What is kept for backward in few bits: PyTorch's gradients on the same numbers, from less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import slow
from torch import Tensor, nn
from torch.nn import functional

from layerlab import Fit, build_model, noise
from layerlab_low_bit import LowBit
from layerlab_low_bit.method.keeping import BatchNorm, Encoded, MaxPool, Places, ReLU

SHAPE = (6, 12, 20, 20)


def coded(tensor: Tensor) -> Encoded | Places:
    """Halves, which the inputs here are; and places in 16 bits."""
    if tensor.dtype == torch.int64:
        return Places(tensor.to(torch.int16))
    return Encoded((2 * tensor).round().to(torch.int8), -1)


def halves(*shape: int, order: torch.memory_format = torch.contiguous_format) -> Tensor:
    values = torch.randint(-20, 21, shape, generator=torch.Generator().manual_seed(1)) / 2
    return values.contiguous(memory_format=order)


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (lambda x: ReLU.apply(x, False, coded), torch.relu),
    "relu in place": (lambda x: ReLU.apply(2 * x, True, coded), lambda x: torch.relu(2 * x)),
    "pool": (lambda x: MaxPool.apply(x, ((2, 2), (2, 2), (0, 0), (1, 1), False), coded),
             lambda x: functional.max_pool2d(x, 2)),
    "pool that overlaps": (lambda x: MaxPool.apply(x, ((3, 3), (2, 2), (1, 1), (1, 1), True), coded),
                           lambda x: functional.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
}


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_pytorchs_functions(name, order):
    mine, theirs = CASES[name]
    inputs = [halves(*SHAPE, order=order).requires_grad_() for _ in range(2)]
    outputs = [function(x) for function, x in zip((mine, theirs), inputs, strict=True)]
    assert torch.equal(*outputs)
    towards = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2))
    for y in outputs:
        y.backward(towards)
    assert torch.equal(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [SHAPE, (64, 130), (40, 200, 48, 48)], ids=["small", "linear", "in pieces"])
def test_a_batch_norms_gradients_are_pytorchs(shape, training):
    ours, theirs = (nn.BatchNorm1d(shape[1]) if len(shape) == 2 else nn.BatchNorm2d(shape[1]) for _ in range(2))
    with torch.no_grad():
        ours.weight.uniform_(0.5, 2)
        ours.running_var.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    theirs.train(training)
    inputs = [halves(*shape).requires_grad_() for _ in range(2)]
    y = BatchNorm.apply(inputs[0], ours.weight, ours.bias, (ours.running_mean, ours.running_var), training, 0.1, 1e-5,
                        coded)
    towards = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    wanted = theirs(inputs[1])
    for each in (y, wanted):
        each.backward(towards)
    assert torch.equal(y, wanted)
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-6)
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-4, atol=1e-3), name
    assert torch.equal(ours.running_mean, theirs.running_mean)


def test_what_was_kept_is_let_go_in_backward():
    x = halves(*SHAPE).requires_grad_()
    y = ReLU.apply(x, False, coded)
    y.sum().backward(retain_graph=True)
    assert y.grad_fn.kept is None
    with pytest.raises(RuntimeError, match="do not go backward through a graph twice"):
        y.sum().backward()


def peak(build: Callable[[], nn.Module], shape: tuple[int, int, int], strategy: LowBit | tuple[()]) -> float:
    """MB of a step with momentum at batch 128, by layerlab's meter."""
    fit = Fit(copy.deepcopy(build()), noise(128, shape, "cpu"), strategy, epochs=1, batch_size=128)
    return fit.train_epoch()["cost/peak_memory_bytes"] / 1e6


@pytest.mark.parametrize(("build", "shape", "units", "share"), [
    (lambda: build_model("lenet", channels=1), (1, 28, 28), "int8", 0.85),
    (lambda: build_model("lenet", channels=1), (1, 28, 28), "emulated", 0.85),
    (lambda: build_model("resnet-cifar", depth=8, channels=1), (1, 24, 24), "int8", 0.65),
    pytest.param(lambda: build_model("vgg-cifar", depth=11), (3, 32, 32), "emulated", 0.75, marks=slow),
], ids=["lenet-int8", "lenet", "resnet-8-int8", "vgg-11"])
def test_the_peak_of_a_training_step_falls(build, shape, units, share):
    assert peak(build, shape, LowBit(units=units)) < share * peak(build, shape, ())
