"""Datasets: embedded, parquet, folders; cached, streamed, augmented; and what is said of damaged ones."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import slow
from PIL import Image

from layerlab import LayerlabError, load_dataset
from layerlab.workload.places import available


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _parquet(folder: Path, half: str, images: list[bytes], labels: list[int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": data, "path": None} for data in images]
    file = folder / f"{half}-00000-of-00001.parquet"
    pq.write_table(pa.table({"image": rows, "label": labels}), file)
    return file


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path, pixels) -> Path:
    """A root whose `cifar10` holds 20 + 10 tiny images in two halves."""
    folder = tmp_path / "root" / "cifar10"
    images = [_png(image) for image in pixels]
    _parquet(folder, "train", images[:20], [i % 10 for i in range(20)])
    _parquet(folder, "test", images[20:], list(range(10)))
    return folder.parent


def test_digits_are_embedded_and_every_class_is_in_both_halves():
    data = load_dataset("digits", device="cpu")
    assert data.shape == (1, 8, 8)
    assert len(data.train) + len(data.test) == 1797
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.max() == 255
    for half in (data.train, data.test):
        assert set(half.labels.tolist()) == set(range(10))
    assert load_dataset("digits", image_size=32, channels=3, device="cpu").shape == (3, 32, 32)


def test_parquet_gives_the_pixels_that_were_stored(root, pixels):
    data = load_dataset("cifar10", root=root, image_size=8, device="cpu")
    assert torch.equal(data.train.images, torch.from_numpy(pixels[:20]).permute(0, 3, 1, 2))
    assert data.test.labels.tolist() == list(range(10))
    assert data.source == str(root / "cifar10")


def test_batches_are_normalised_and_complete_in_order(root):
    data = load_dataset("cifar10", root=root, image_size=8, device="cpu")
    x = torch.cat([x for x, _ in data.train.batches(7)])
    assert x.shape == (20, 3, 8, 8)
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    image = data.train.images[3].float()
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (data.train.mean, data.train.std))
    assert torch.allclose(x[3], (image - mean) / std, atol=1e-5)


def test_shuffled_batches_leave_out_the_rest_and_follow_the_generator(root):
    train = load_dataset("cifar10", root=root, image_size=8, device="cpu").augmented("crop-flip", 2).train

    def once(seed: int) -> torch.Tensor:
        return torch.cat([x for x, _ in train.batches(6, torch.Generator().manual_seed(seed))])

    assert once(0).shape[0] == 18
    assert torch.equal(once(0), once(0))
    assert not torch.equal(once(0), once(1))


def test_augmentation_is_a_shift_with_zeros_outside_and_a_mirror(root):
    train = load_dataset("cifar10", root=root, image_size=8, device="cpu").augmented("crop-flip", 2).train
    seen = set()
    # One image a pass: find the shift and mirror that explain what came out.
    raw = torch.nn.functional.pad(train.images, [2] * 4)
    for seed in range(12):
        for x, y in train.batches(20, torch.Generator().manual_seed(seed)):
            order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(train.labels[order], y)
            for row, index in enumerate(order[:5].tolist()):
                matches = [
                    (dy, dx, flip)
                    for dy in range(5) for dx in range(5) for flip in (False, True)
                    if torch.allclose(x[row], train.normalise(
                        (lambda w, f=flip: w.flip(-1) if f else w)(raw[index, :, dy:dy + 8, dx:dx + 8])[None])[0])
                ]
                assert matches
                seen.add(matches[0])
    assert {dy for dy, _, _ in seen} == {dx for _, dx, _ in seen} == set(range(5))
    assert {flip for _, _, flip in seen} == {False, True}


def test_limits_keep_the_classes_in_proportion(root):
    data = load_dataset("cifar10", root=root, image_size=8, limit=10, test_limit=5, device="cpu")
    assert sorted(data.train.labels.tolist()) == list(range(10))
    assert len(data.test) == 5
    assert data.fingerprint != load_dataset("cifar10", root=root, image_size=8, device="cpu").fingerprint


def test_what_is_held_out_is_a_part_of_the_training_images_and_nothing_is_in_both():
    data = load_dataset("digits", limit=128, test_limit=64, device="cpu")
    apart = data.held_out(every=4)
    assert (len(apart.train), len(apart.test)) == (96, 32)
    assert torch.equal(apart.test.images, data.train.images[3::4])
    assert torch.equal(apart.test.labels, data.train.labels[3::4])
    whole = {image.numpy().tobytes() for image in data.train.images}
    halves = [{image.numpy().tobytes() for image in split.images} for split in (apart.train, apart.test)]
    assert halves[0] | halves[1] == whole
    assert not halves[0] & halves[1]
    assert apart.fingerprint != data.fingerprint


def test_what_does_not_fit_is_streamed_with_the_same_pixels(root):
    resident = load_dataset("cifar10", root=root, image_size=8, limit=17, device="cpu").augmented("crop", 1)
    streamed = load_dataset("cifar10", root=root, image_size=8, limit=17, device="cpu", memory_budget=0)
    streamed = streamed.augmented("crop", 1)
    assert not isinstance(streamed.train.images, torch.Tensor)
    for a, b in ((resident.train, streamed.train), (resident.test, streamed.test)):
        for generator in (None, 5):
            seeds = [torch.Generator().manual_seed(5) if generator else None for _ in (a, b)]
            pairs = zip(a.batches(4, seeds[0]), b.batches(4, seeds[1]), strict=True)
            for (x, y), (other_x, other_y) in pairs:
                assert torch.equal(y, other_y)
                assert torch.allclose(x, other_x, atol=0.05)  # the statistics come from a sample


@pytest.mark.parametrize("memory_budget", [None, 0])
def test_the_shares_of_several_processes_are_the_batches_of_one(root, memory_budget):
    options = {} if memory_budget is None else {"memory_budget": memory_budget}
    train = load_dataset("cifar10", root=root, image_size=8, device="cpu", **options).augmented("crop-flip", 1).train
    shares = [replace(train, share=(index, 3)) for index in range(3)]
    # Batches of 5 among 3 processes: an uneven part each.
    passes = [list(split.batches(5, torch.Generator().manual_seed(1))) for split in (train, *shares)]
    for whole, *parts in zip(*passes, strict=True):
        assert [len(labels) for _, labels in parts] == [1, 2, 2]
        for one, several in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(one, torch.cat(several))
    # In order, as for the evaluation, each process reads everything.
    assert sum(len(labels) for _, labels in shares[1].batches(7)) == len(train)


@pytest.fixture
def mine(tmp_path) -> Callable[..., Path]:
    """Writes images into `mine/<place>`, all of one brightness, so that each tells its label."""

    def write(place: str, brightness: int, count: int = 3, suffix: str = "png", size=(12, 9)) -> Path:
        folder = tmp_path / "mine" / place
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", size, (brightness,) * 3).save(folder / f"{number}.{suffix}")
        return tmp_path / "mine"

    return write


def _brightness(split) -> dict[int, set[int]]:
    """Label → the brightness of its images, to the nearest ten."""
    found: dict[int, set[int]] = {}
    for image, label in zip(split.images, split.labels.tolist(), strict=True):
        found.setdefault(label, set()).add(10 * round(image.float().mean().item() / 10))
    return found


@pytest.mark.parametrize("second", ["val", "test", "validation"])
def test_an_image_folder_of_ones_own(mine, second):
    for half in ("train", second):
        mine(f"{half}/cat", 50, suffix="jpg")
        folder = mine(f"{half}/dog", 200, suffix="PNG")
    # What Jupyter, macOS and people leave in folders is no class and no image.
    mine("train/.ipynb_checkpoints", 0)
    (folder / "train" / "cat" / "._1.jpg").write_bytes(b"resource fork")
    (folder / "train" / "cat" / "notes.txt").write_text("about cats")
    data = load_dataset(str(folder), image_size=16, device="cpu")
    assert (data.classes, data.shape, len(data.train), len(data.test)) == (2, (3, 16, 16), 6, 6)
    assert data.class_names == ("cat", "dog")
    assert _brightness(data.train) == _brightness(data.test) == {0: {50}, 1: {200}}
    # The shorter side of the images where no size is given.
    assert load_dataset(str(folder), device="cpu").shape == (3, 9, 9)
    assert load_dataset(str(folder), channels=1, device="cpu").shape == (1, 9, 9)


def test_a_test_half_without_some_of_the_classes_keeps_the_labels(mine):
    for name, brightness in (("ant", 50), ("bee", 100), ("cat", 150)):
        mine(f"train/{name}", brightness)
    mine("test/bee", 100)
    data = load_dataset(str(mine("test/cat", 150)), device="cpu")
    assert _brightness(data.test) == {1: {100}, 2: {150}}
    with pytest.raises(LayerlabError, match=r"has a class folder 'dog' that .*train has not"):
        load_dataset(str(mine("test/dog", 0)))


@pytest.mark.parametrize("top", ["", "train/"])
def test_without_a_test_half_every_fifth_image_of_each_class_is_held_out(mine, top, recwarn):
    mine(f"{top}cat", 50, count=11)
    folder = mine(f"{top}dog", 200, count=4)
    data = load_dataset(str(folder), device="cpu")
    assert data.train.labels.bincount().tolist() == [8, 3]
    assert data.test.labels.bincount().tolist() == [3, 1]
    assert "held out" in repr(data)
    assert _brightness(data.test) == {0: {50}, 1: {200}}
    # A test half that is missing beside train/ may be a mistake; class folders alone are none.
    assert bool(recwarn) == bool(top)


def test_a_folder_that_is_no_image_folder_is_refused_with_what_was_expected(mine, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LayerlabError, match=r"empty has no folders with images; expected a folder a class"):
        load_dataset(str(tmp_path / "empty"))
    with pytest.raises(LayerlabError, match=r"The class .cat. of .*mine has one image, which cannot be split"):
        load_dataset(str(mine("cat", 50, count=1)))
    mine("cat", 50)
    (tmp_path / "mine" / "dog").mkdir()
    with pytest.raises(LayerlabError, match=r"The class folder .*mine/dog has no image"):
        load_dataset(str(tmp_path / "mine"))
    with pytest.raises(LayerlabError, match=r"has a folder val and none called train"):
        load_dataset(str(mine("val/cat", 50)))
    with pytest.raises(LayerlabError, match=r"Or pass the path of a folder that exists; .*/no-such does not"):
        load_dataset(str(tmp_path / "no-such"))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("memory_budget", [None, 0])
def test_a_corrupt_image_in_a_folder_is_named(mine, suffix, memory_budget):
    mine("train/cat", 50, suffix=suffix, size=(64, 64))
    folder = mine("test/cat", 50, suffix=suffix, size=(64, 64))
    file = folder / "test" / "cat" / f"1.{suffix}"
    file.write_bytes(file.read_bytes()[:-60])

    def read() -> None:
        data = load_dataset(str(folder), memory_budget=memory_budget, device="cpu")
        list(data.test.batches(2))

    with pytest.raises(LayerlabError, match=f"The image {file} does not decode"):
        read()


def test_the_cache_is_used_and_follows_the_content(root, pixels, monkeypatch):
    first = load_dataset("cifar10", root=root, image_size=8, device="cpu")
    monkeypatch.setattr("layerlab.workload.sources.decode_image", None)  # decoding again would fail
    again = load_dataset("cifar10", root=root, image_size=8, device="cpu")
    assert torch.equal(first.train.images, again.train.images)
    monkeypatch.undo()
    _parquet(root / "cifar10", "train", [_png(image) for image in pixels[10:30]], [i % 10 for i in range(20)])
    other = load_dataset("cifar10", root=root, image_size=8, device="cpu")
    assert not torch.equal(first.train.images, other.train.images)
    assert first.fingerprint != other.fingerprint


def test_a_damaged_cache_is_made_again(root, tmp_path):
    first = load_dataset("cifar10", root=root, image_size=8, device="cpu")
    for file in (tmp_path / "cache").glob("*.npy"):
        file.write_bytes(file.read_bytes()[:200])
    with pytest.warns(UserWarning, match="was damaged and is made again"):
        again = load_dataset("cifar10", root=root, image_size=8, device="cpu")
    assert torch.equal(first.train.images, again.train.images)


def test_an_unknown_dataset_lists_those_that_are_known():
    with pytest.raises(LayerlabError, match=r"Unknown dataset 'cifar-10'. Did you mean 'cifar10'\?"):
        load_dataset("cifar-10")


def test_a_missing_dataset_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(LayerlabError, match=f"'cifar10' is neither in {tmp_path}/cifar10 .*LAYERLAB_DATA"):
        load_dataset("cifar10", root=tmp_path)
    with pytest.raises(LayerlabError, match=f"'imagenette' is not in {tmp_path}/imagenette.*LAYERLAB_DATA"):
        load_dataset("imagenette", root=tmp_path)


def test_a_truncated_file_is_named(root):
    file = root / "cifar10" / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LayerlabError, match=f"{file} is corrupt, truncated"):
        load_dataset("cifar10", root=root)


def test_an_image_that_does_not_decode_is_named_and_its_half_is_not_cached(root, pixels, tmp_path):
    images = [_png(image) for image in pixels[:20]]
    images[13] = images[13][:40]
    file = _parquet(root / "cifar10", "train", images, [i % 10 for i in range(20)])
    with pytest.raises(LayerlabError, match=f"The image in row 13 of {file} does not decode"):
        load_dataset("cifar10", root=root, image_size=8)
    # The test half is whole.
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


@pytest.mark.parametrize("wrong", [10, -1])
def test_labels_out_of_range_are_refused(root, pixels, wrong):
    _parquet(root / "cifar10", "train", [_png(image) for image in pixels[:20]], [wrong] + [1] * 19)
    with pytest.raises(LayerlabError, match=r"out of range for its 10 classes \(0 to 9\)"):
        load_dataset("cifar10", root=root, image_size=8)


def test_another_layout_is_refused(root):
    file = root / "cifar10" / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"pixels": [1], "label": [1]}), file)
    with pytest.raises(LayerlabError, match=r"not in the expected layout"):
        load_dataset("cifar10", root=root)


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [
        ("mnist", (1, 28, 28), (60_000, 10_000)),
        ("fashion-mnist", (1, 28, 28), (60_000, 10_000)),
        pytest.param("cifar10", (3, 32, 32), (50_000, 10_000), marks=slow),
        pytest.param("imagenette", (3, 128, 128), (9469, 3925), marks=slow),
    ],
)
def test_real_data(real_data, name, shape, sizes, monkeypatch):
    # Decoding takes seconds, so the user's own cache serves here.
    monkeypatch.delenv("LAYERLAB_CACHE")
    data = load_dataset(name, root=real_data, device="cpu")
    assert (data.shape, (len(data.train), len(data.test))) == (shape, sizes)
    assert torch.equal(data.train.labels.unique(), torch.arange(10))
    assert available(name, real_data) == str(real_data / name)


def test_real_data_truncated(real_data, tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    for file in (real_data / "mnist").iterdir():
        shutil.copyfile(file, folder / file.name)
    test = folder / "test-00000-of-00001.parquet"
    test.write_bytes(test.read_bytes()[: 10**6])
    with pytest.raises(LayerlabError, match=f"{test} is corrupt, truncated"):
        load_dataset("mnist", root=tmp_path)
