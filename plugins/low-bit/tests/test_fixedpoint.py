"""Histogram, rounding, choice of formats, exact products: against NumPy and integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from layerlab import LayerlabError
from layerlab_low_bit import decode, encode, msb_histogram
from layerlab_low_bit.method.fixedpoint import BIAS, round_to
from layerlab_low_bit.method.products import PIECE, Geometry, Product, matrix_product
from layerlab_low_bit.method.store import Store, choose, rates

KINDS = {kind: 8 for kind in ("activation", "weight", "error", "gradient", "master")}


def numpy_histogram(values: torch.Tensor) -> np.ndarray:
    flat = values.numpy().ravel()
    finite = flat[np.isfinite(flat)]
    _, exponent = np.frexp(finite[np.abs(finite) >= np.finfo(np.float32).tiny])
    counts = np.zeros(256, dtype=np.int64)
    np.add.at(counts, exponent - 1 + BIAS, 1)
    counts[0] = len(finite) - len(exponent)
    counts[255] = len(flat) - len(finite)
    return counts


@pytest.mark.parametrize("form", ["plain", "large", "channels_last", "strided", "empty"])
def test_the_histogram_is_numpys(form):
    torch.manual_seed(0)
    values = torch.randn(600_000 if form == "large" else 3 * 8 * 9 * 7) * torch.tensor(10.0).pow(3)
    values[::5] = 0.0
    values[1::7] *= 1e-30
    values[2:9] = torch.tensor([1.0, -1.0, 2.0, 1e-42, float("nan"), float("inf"), -float("inf")])
    if form == "channels_last":
        values = values.view(3, 8, 9, 7).to(memory_format=torch.channels_last)
    elif form == "strided":
        values = values.view(3, -1)[:, ::2]
    elif form == "empty":
        values = values[:0]
    assert np.array_equal(msb_histogram(values).numpy(), numpy_histogram(values))
    # The same, gathered while rounding.
    counts = torch.zeros(256, dtype=torch.int64)
    encode(values, 8, 3, histogram=counts)
    assert np.array_equal(counts.numpy(), numpy_histogram(values))


@pytest.mark.parametrize("bits", range(2, 17))
def test_rounding_to_the_nearest_is_numpys_and_saturates(bits):
    torch.manual_seed(bits)
    values = torch.cat([torch.randn(4000) * 3, torch.tensor([1e30, -1e30, 200.0, -200.0, 0.0])]).view(5, -1)
    position = 1
    most, lowest = 2 ** (bits - 1) - 1, 2.0 ** (position - bits + 2)
    expected = np.clip(np.round(values.numpy() / lowest), -most, most)
    codes = encode(values, bits, position)
    assert codes.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert np.array_equal(codes.numpy(), expected)
    assert torch.equal(decode(codes, position - bits + 2), torch.from_numpy(expected * lowest).float())
    # Everything up to the position fits: nothing of it is more than half a lowest bit off.
    fits = values.abs() < 2.0 ** (position + 1) - lowest
    assert ((decode(codes, position - bits + 2) - values)[fits].abs() <= lowest / 2).all()


def test_other_widths_are_refused_and_other_floats_are_taken():
    for bits in (1, 17):
        with pytest.raises(LayerlabError, match=f"2 to 16 bits here, got {bits}"):
            encode(torch.ones(3), bits, 0)
    values = torch.randn(1000, dtype=torch.float64)
    assert torch.equal(encode(values, 8, 1), encode(values.float(), 8, 1))
    assert torch.equal(msb_histogram(values), msb_histogram(values.float()))


def test_memory_order_is_kept():
    values = torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last)
    codes = encode(values, 8, 2)
    assert codes.stride() == values.stride()
    assert torch.equal(codes, encode(values.contiguous(), 8, 2))


@pytest.mark.parametrize("value", [0.3, -0.3, 5.6, -17.02, 0.004])
def test_stochastic_rounding_is_unbiased(value):
    torch.manual_seed(3)
    draws = decode(encode(torch.full((400_000,), value), 8, 4, stochastic=True), -2).double()
    assert len(draws.unique()) == 2
    assert abs(draws.mean() - value) < 4 * draws.std() / len(draws) ** 0.5
    # The nearest would be off by far more than that.
    nearest = decode(encode(torch.full((1,), value), 8, 4), -2)
    assert abs(nearest - value) > 4 * draws.std() / len(draws) ** 0.5


def test_stochastic_rounding_of_a_large_tensor_is_independent_from_part_to_part():
    """A sum's variance is that of independent draws, wherever in the tensor they are."""
    torch.manual_seed(5)
    values = torch.full((300_000,), 0.3)
    parts = torch.stack([encode(values, 8, 6, stochastic=True).view(30, -1).sum(1) for _ in range(60)]).double()
    for sums, count in ((parts.flatten(), 10_000), (parts.sum(1), 300_000)):
        relative = sums.var() / (count * 0.3 * 0.7)
        # Five standard deviations of a variance that is estimated from so many sums.
        assert abs(relative - 1) < 5 * (2 / len(sums)) ** 0.5


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("form", ["plain", "large", "channels_last", "strided", "double", "empty", "single"])
def test_rounding_in_place_gives_what_the_codes_stand_for(form, stochastic):
    torch.manual_seed(0)
    values = torch.randn(300_000 if form == "large" else 3 * 8 * 9 * 7) * 3
    if form == "channels_last":
        values = values.view(3, 8, 9, 7).to(memory_format=torch.channels_last)
    elif form == "strided":
        values = values.view(3, -1)[:, ::2]
    else:
        values = {"double": values.double(), "empty": values[:0], "single": values[0]}.get(form, values)
    histograms = torch.zeros(2, 256, dtype=torch.int64)
    torch.manual_seed(1)
    wanted = decode(encode(values, 6, 1, stochastic, histograms[0]), -3)
    torch.manual_seed(1)
    round_to(values, 6, 1, stochastic, histograms[1])
    assert torch.equal(values, wanted.to(values.dtype))
    assert torch.equal(*histograms)


def test_rounding_in_place_reports_nan_and_inf_as_rounding_does():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN"):
            round_to(torch.tensor([1.0, bad]), 8, 0)
        round_to(torch.tensor([1.0, bad]), 8, 0, histogram=torch.zeros(256, dtype=torch.int64))


def test_stochastic_rounding_leaves_what_is_exact():
    exact = torch.arange(-127, 128).float()
    for _ in range(20):
        assert torch.equal(encode(exact, 8, 6, stochastic=True).float(), exact)


def test_nan_and_inf_raise_where_no_histogram_counts_them():
    for bad in (float("nan"), float("inf"), -float("inf")):
        values = torch.zeros(300_000)
        values[123_456] = bad
        with pytest.raises(ValueError, match="NaN"):
            encode(values, 8, 0)
    encode(torch.full((4,), 3e38), 8, 0)


# ---------------------------------------------------------------------------------------- choice of formats


def test_the_smallest_position_within_the_bound_is_chosen():
    torch.manual_seed(1)
    for scale in (1e-6, 1.0, 300.0):
        values = torch.randn(100_000) * scale
        values[:30_000] = 0.0
        histogram = msb_histogram(values)[None]
        for bound in (0.0, 1e-4, 1e-2, 0.3):
            (position,) = choose(histogram, bound)
            nonzero = values[values != 0].abs()
            assert (nonzero >= 2.0 ** (position + 1)).float().mean() <= bound
            assert (nonzero >= 2.0**position).float().mean() > bound
    assert choose(msb_histogram(torch.zeros(10))[None], 0.5) == [None]


def test_rates_are_counted_against_the_format():
    values = torch.tensor([0.0, 0.001, -0.01, 0.5, 1.9, 2.0, -300.0])
    saturated, vanished, total = rates(msb_histogram(values)[None], [0], [4])[0].tolist()
    # Four bits at position 0: lowest bit 1/4, largest value 7/4.
    assert (saturated, vanished, total) == (2, 2, 6)


def positions(store: Store, scales: list[float]) -> list[int]:
    """What is chosen after each iteration of a scripted history."""
    chosen = []
    for step, scale in enumerate(scales):
        index = store.find("layer.error", "error")
        encode(torch.linspace(-1.9, 1.9, 1000) * scale, 8, store.positions[index] or 0, histogram=store.row(index))
        store.update(step)
        chosen.append(store.positions[index])
    return chosen


@pytest.mark.parametrize("steering", ["statistic", "delayed-max"])
def test_a_jump_up_is_met_in_the_next_iteration_and_a_jump_down_after_the_history(steering):
    store = Store(KINDS, steering, 1e-3, 1.0, 0, 4, torch.device("cpu"))
    assert positions(store, [1.0] * 5 + [1024.0] * 3) == [0] * 5 + [10] * 3
    assert positions(store, [1.0] * 6) == [10, 10, 10, 0, 0, 0]


def test_one_outlier_moves_the_largest_value_but_not_the_statistic():
    def after(steering: str) -> int:
        store = Store(KINDS, steering, 1e-3, 1.0, 0, 4, torch.device("cpu"))
        values = torch.linspace(-1.9, 1.9, 10_000)
        values[5] = 1000.0
        msb_histogram(values, store.row(store.find("x", "activation")))
        store.update(0)
        return store.positions[0]

    assert (after("statistic"), after("delayed-max"), after("current-max"), after("static")) == (0, 9, 9, 9)


def test_static_formats_stay():
    store = Store(KINDS, "static", 1e-3, 1.0, 0, 4, torch.device("cpu"))
    assert positions(store, [1.0, 1024.0, 1e-3]) == [0, 0, 0]


def test_a_tensor_beyond_the_bound_of_underflow_gets_twice_the_bits_until_it_is_back():
    store = Store(KINDS, "statistic", 0.0, 0.2, 0, 1, torch.device("cpu"))
    wide = torch.logspace(-12, 0, 1000, base=2.0)
    for values, bits in ((wide, 16), (wide, 16), (torch.ones(10), 8)):
        msb_histogram(values, store.row(store.find("x", "activation")))
        store.update(0)
        assert store.bits == [bits]


def test_rates_count_each_value_against_the_format_that_it_had():
    store = Store(KINDS, "statistic", 0.0, 1.0, 0, 2, torch.device("cpu"))
    saturated = 0
    for step, scale in enumerate([1.0, 1.0, 64.0, 64.0, 1.0, 1.0, 1.0, 4.0]):
        index = store.find("layer.error", "error")
        values = torch.linspace(-1.9, 1.9, 100) * scale
        # The format of this step: what it was before the step, or the first values' own.
        position = store.positions[index] = 0 if store.positions[index] is None else store.positions[index]
        saturated += int((values.abs() >= 2.0 ** (position + 1)).sum())
        msb_histogram(values, store.row(index))
        store.update(step)
        if step == 2:
            store.find("other.error", "error")
    store.end_epoch(1)
    row = store.frame().iloc[0]
    assert row["values"] == 800
    assert row["saturated"] * 800 == pytest.approx(saturated)
    assert saturated > 100


def test_tables_of_many_tensors_are_moved_a_few_times_as_they_grow():
    store = Store(KINDS, "statistic", 0.0, 1.0, 0, 2, torch.device("cpu"))
    places = set()
    for number in range(1000):
        msb_histogram(torch.full((number + 1,), 1.0), store.row(store.find(f"{number}.weight", "weight")))
        places.add(store.row(0).untyped_storage()._cdata)
    assert len(places) <= 12
    store.update(0)
    assert store.histograms[0].tolist() == list(range(1, 1001))


def test_an_update_names_the_first_tensor_that_is_not_finite():
    store = Store(KINDS, "statistic", 0.0, 1.0, 0, 2, torch.device("cpu"))
    for name, value in (("a.input", 1.0), ("b.input", float("nan")), ("c.input", float("inf"))):
        msb_histogram(torch.full((3,), value), store.row(store.find(name, "activation")))
    with pytest.raises(LayerlabError, match=r"layer 'b' \(input\) has 3 values that are NaN or Inf in step 8, and 1"):
        store.update(7)


# ---------------------------------------------------------------------------------------- products


def codes(*shape: int, most: int = 127) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, dtype=torch.int16).to(torch.int8)


@pytest.mark.parametrize(("units", "most"), [("int8", 127), ("fp8", 15)])
def test_units_give_the_exact_product(units, most):
    torch.manual_seed(0)
    for m, k, n in ((1, 1, 1), (5, 70, 19), (33, 16, 48), (3, 80_000, 2)):
        a, b = codes(m, k, most=most), codes(k, n, most=most)
        assert torch.equal(matrix_product(a, b, units).long(), a.long() @ b.long())
    # All at the limit: the longest sum of one product, and one that has to be cut.
    longest = 2**24 // 15**2 if units == "fp8" else (2**31 - 1) // 127**2
    for k in (longest, longest + 17):
        a = torch.full((2, k), most, dtype=torch.int8)
        assert matrix_product(a, a.t(), units).long().unique().tolist() == [most**2 * k]


def integer_products(dy, x, w, geometry):
    """The three products in float64, which is exact here."""
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    if geometry is None:
        y = functional.linear(x, w)
    else:
        y = functional.conv2d(x, w, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    return (y, *torch.autograd.grad(y, [x, w], dy.double()))


GEOMETRIES = {
    "linear": (None, (7, 40), (11, 40), (7, 11)),
    "3x3": (Geometry((1, 1), (1, 1), (1, 1), 1), (3, 5, 8, 9), (6, 5, 3, 3), (3, 6, 8, 9)),
    "strided": (Geometry((2, 1), (0, 2), (1, 2), 1), (2, 4, 9, 8), (5, 4, 3, 2), (2, 5, 4, 10)),
    "depthwise": (Geometry((1, 1), (1, 1), (1, 1), 6), (2, 6, 5, 5), (6, 1, 3, 3), (2, 6, 5, 5)),
    "padded beyond the kernel": (Geometry((1, 1), (3, 4), (1, 2), 1), (2, 3, 4, 5), (4, 3, 2, 3), (2, 4, 9, 9)),
    "strides beyond the kernel": (Geometry((3, 4), (0, 1), (1, 1), 1), (2, 3, 10, 9), (4, 3, 2, 1), (2, 4, 3, 3)),
    "many channels": (Geometry((1, 1), (1, 1), (1, 1), 1), (2, 40, 6, 5), (6, 40, 3, 3), (2, 6, 6, 5)),
    "1x1 in groups": (Geometry((2, 2), (0, 0), (1, 1), 2), (2, 6, 6, 6), (4, 3, 1, 1), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("units", ["int8", "fp8", "emulated"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_layers_products_are_the_integers(name, units, order):
    torch.manual_seed(0)
    geometry, *shapes = GEOMETRIES[name]
    x, w, dy = (codes(*shape, most=15 if units == "fp8" else 127) for shape in shapes)
    if geometry is not None:
        x, dy = (part.contiguous(memory_format=order) for part in (x, dy))
    product = Product(geometry, units, exact=True)
    got = (product.forward(x, w), product.input_gradient(dy, w, x.shape), product.weight_gradient(dy, x, w.shape))
    for mine, exact in zip(got, integer_products(dy, x, w, geometry), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, exact.float())


@pytest.mark.parametrize("units", ["int8", "emulated"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["large", "grouped"])
def test_images_taken_in_pieces_give_the_same_integers_in_the_same_order(name, order, units):
    torch.manual_seed(4)
    groups, kernel = (1, 3) if name == "large" else (4, 5)
    geometry = Geometry((1, 1), (kernel // 2, kernel // 2), (1, 1), groups)
    x = torch.randint(-127, 128, (20, 16, 40, 40), dtype=torch.int8).contiguous(memory_format=order)
    w = torch.randint(-127, 128, (24, 16 // groups, kernel, kernel), dtype=torch.int8)
    dy = torch.randint(-127, 128, (20, 24, 40, 40), dtype=torch.int8).contiguous(memory_format=order)
    assert x.nelement() * w[0].numel() > 2 * PIECE
    product = Product(geometry, units, exact=True)
    wide = [part.double().requires_grad_() for part in (x, w)]
    y = functional.conv2d(*wide, None, 1, kernel // 2, 1, groups)
    dx, dw = torch.autograd.grad(y, wide, dy.double())
    got = product.forward(x, w)
    assert torch.equal(got.double(), y)
    assert torch.equal(product.input_gradient(dy, w, x.shape).double(), dx)
    assert torch.equal(product.weight_gradient(dy, x, w.shape), dw.float())
    assert got.is_contiguous(memory_format=order)


@pytest.mark.parametrize("units", ["int8", "emulated"])
@pytest.mark.parametrize("added", [(0, 0), (1, 0)])
def test_a_transposed_convolution_s_products_are_the_integers(units, added):
    torch.manual_seed(0)
    geometry = Geometry((2, 3), (1, 0), (1, 2), 2, transposed=True, added=added)
    x, w = codes(2, 4, 5, 4), codes(4, 3, 3, 2)
    exact_x, exact_w = x.double().requires_grad_(), w.double().requires_grad_()
    exact = functional.conv_transpose2d(exact_x, exact_w, None, (2, 3), (1, 0), added, 2, (1, 2))
    dy = codes(*exact.shape)
    exact.backward(dy.double())
    product = Product(geometry, units, exact=True)
    assert torch.equal(product.forward(x, w), exact.float())
    assert torch.equal(product.input_gradient(dy, w, x.shape), exact_x.grad.float())
    assert torch.equal(product.weight_gradient(dy, x, w.shape), exact_w.grad.float())


def test_emulation_stays_exact_where_float32_sums_would_not():
    # Sums of up to 127² · 36864 are beyond float32's integers: every product has to see that by its bound.
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    torch.manual_seed(0)
    x, w, dy = (codes(*shape).abs_().clamp_(min=100) for shape in ((9, 192, 64, 8), (192, 192, 3, 3), (9, 192, 64, 8)))
    x[:, :, ::7, ::3] -= 1
    product = Product(geometry, "emulated", exact=True)
    exact = integer_products(dy, x, w, geometry)
    got = (product.forward(x, w), product.input_gradient(dy, w, x.shape), product.weight_gradient(dy, x, w.shape))
    rounded = Product(geometry, "emulated", exact=False).weight_gradient(dy, x, w.shape)
    for mine, want in zip(got, exact, strict=True):
        assert torch.equal(mine, want.float())
    assert not torch.equal(rounded, exact[2].float())


def test_sixteen_bit_codes_multiply_exactly_too():
    torch.manual_seed(0)
    x, w, dy = (torch.randint(-32767, 32768, shape, dtype=torch.int16) for shape in ((4, 300), (5, 300), (4, 5)))
    product = Product(None, "int8", exact=True)
    got = (product.forward(x, w), product.input_gradient(dy, w, x.shape), product.weight_gradient(dy, x, w.shape))
    for mine, want in zip(got, integer_products(dy, x, w, None), strict=True):
        assert torch.equal(mine, want.float())
