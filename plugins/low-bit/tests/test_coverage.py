"""Which layers train in fixed point: every matrix and kernel that products take, or the pre-flight says why not."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from layerlab import Dataset, LayerlabWarning, fit, load_dataset
from layerlab_low_bit import LowBit
from layerlab_low_bit.method.attention import attention
from layerlab_low_bit.method.peers import Bfloat16

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset("digits", limit=128, test_limit=32, device="cpu")


class Rows(nn.Module):
    """A transformer over the rows of an image; a learnt query reads the sequence, with widths of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 12))
        self.read = nn.MultiheadAttention(12, 3, kdim=16, vdim=16, batch_first=True)
        self.last = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.encoder(self.embed(x[:, 0]))  # (batch, rows, 16)
        read, _ = self.read(self.query.expand(len(x), 1, 12), rows, rows)
        return self.last(read[:, 0])


class Waves(nn.Module):
    """Convolutions over one dimension, plain, in groups and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(8, 12, 3, stride=2, padding=1)
        self.mix = nn.Conv1d(12, 12, 3, padding="same", groups=4)
        self.up = nn.ConvTranspose1d(12, 6, 4, stride=2, padding=1)
        self.last = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mix(torch.relu(self.down(x[:, 0]))))  # (batch, 12, 4)
        return self.last(torch.relu(self.up(x)).mean(2))


def in_fixed_point(strategy: LowBit) -> set[str]:
    return set(strategy.statistics.query("kind == 'weight'")["tensor"])


@pytest.mark.parametrize(("network", "floats"), [(Rows, {"query"}), (Waves, set())])
def test_every_matrix_and_kernel_trains_in_fixed_point(data, network, floats):
    result = fit(network, data, LowBit(), epochs=1, batch_size=32, lr=0.01, progress=False)
    matrices = {name for name, parameter in result.model.named_parameters() if parameter.dim() > 1}
    assert matrices - in_fixed_point(result.strategies[0]) == floats


@pytest.mark.parametrize("network", [Rows, Waves])
def test_sixteen_bits_train_as_floats_do(data, network):
    options = dict(epochs=2, batch_size=32, lr=0.01, progress=False)
    plain, narrow = (fit(network, data, strategy, **options) for strategy in ((), LowBit(bits=16)))
    assert narrow.final["train/loss"] == pytest.approx(plain.final["train/loss"], rel=0.02)


FORMS = ({}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 7, "vdim": 9})
MASKS = {
    "none": {},
    "attention": {"attn_mask": torch.ones(5, 6).tril(1).log()},
    "by head": {"attn_mask": torch.zeros(12, 5, 6, dtype=torch.bool).index_fill_(2, torch.tensor([2]), True)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True] * 2, [False] * 6, [True] + [False] * 5])},
}


@pytest.mark.parametrize(
    ("mask", "needs", "options"),
    itertools.product(MASKS, [True, False], FORMS),
)
def test_attention_is_torch_s(mask, needs, options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 4, **options)
    query = torch.randn(5, 3, 8)
    key, value = torch.randn(6, 3, options.get("kdim", 8)), torch.randn(6, 3, options.get("vdim", 8))
    calls: list[Tensor] = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(weight)
        return functional.linear(x, weight, bias)

    class Ours(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is functional.multi_head_attention_forward:
                return attention(linear, *args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    wanted, weights = module(query, key, value, need_weights=needs, **MASKS[mask])
    with Ours():
        got, own = module(query, key, value, need_weights=needs, **MASKS[mask])
    assert len(calls) == 4
    torch.testing.assert_close(got, wanted)
    if needs:
        torch.testing.assert_close(own, weights)


class Volume(nn.Module):
    """A convolution over three dimensions, which stays in floats, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv3d(1, 4, (1, 3, 3))
        self.last = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.deep(x[:, :, None]).mean((2, 3, 4)))


def normed() -> nn.Module:
    """Weights that are made of others in each step, with and without a bias, and a batch norm."""
    made = nn.utils.parametrizations.weight_norm
    return nn.Sequential(made(nn.Conv2d(1, 4, 3, bias=False)), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         made(nn.Linear(144, 12)), nn.Linear(12, 10))


class Tied(nn.Module):
    """Two layers with one weight, of which an embedding only looks things up in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.table = nn.Embedding(64, 64)
        self.second.weight = self.table.weight = self.first.weight
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x.flatten(1))))
        return self.last(x + self.table(torch.zeros(len(x), dtype=torch.int64)))


@pytest.mark.parametrize(
    ("network", "covered", "left_out"),
    [(normed, {"0.parametrizations.weight", "4", "4.parametrizations.weight", "5"}, {"1"}),
     (Tied, {"first", "second", "last"}, {"table"}), (Volume, {"last"}, {"deep"}),
     (Waves, {"down", "mix", "up", "last"}, set()),
     (Rows, {"embed", "encoder.self_attn", "read", "last"}, {"encoder.norm1", "encoder.norm2"})],
)
def test_the_pre_flight_names_what_stays_in_floats(data, network, covered, left_out):
    found = LowBit().preflight(network(), next(data.test.batches(2))[0])
    assert covered <= set(found.covered)
    assert left_out <= found.left_out.keys()
    assert not left_out & set(found.covered)


@pytest.mark.parametrize(("network", "norm"), [(normed, "1"), (Rows, "encoder.norm1")])
def test_the_pre_flight_says_what_is_kept_in_few_bits_and_what_is_made_anew(data, network, norm):
    example = next(data.test.batches(2))[0]
    found = LowBit(bits=6).preflight(network(), example)
    assert found.left_out[norm] == "it computes in float32, and keeps 6 bits for backward"
    assert LowBit(store_activations=False).preflight(network(), example).left_out[norm] == "its numbers stay float32"
    made = [note for note in found.notes if "made anew in each step" in note]
    assert [note.partition(" are")[0] for note in made] == (["The weights of 0, 4"] if network is normed else [])


@pytest.mark.parametrize(("strategy", "form", "instructions"), [
    (LowBit(bits=5, units="fp8"), "fp8", ()), (LowBit(units="int8"), "int8", ("avx_vnni", "avx512_vnni", "amx_int8")),
    (Bfloat16(), "bfloat16", ("avx512_bf16", "amx_bf16", "bf16"))])
def test_a_format_without_instructions_is_warned_of_and_one_with_them_is_not(
    data, strategy, form, instructions, recwarn
):
    fit(Waves, data, strategy, epochs=1, batch_size=64, progress=False, measure=False)
    said = [str(each.message) for each in recwarn if issubclass(each.category, LayerlabWarning)]
    there = any(torch.cpu.get_capabilities().get(name) for name in instructions)
    assert [each.partition(",")[0] for each in said] == (
        [] if there else [f"This cpu has no instructions for {form}"])
