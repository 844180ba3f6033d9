"""Folders of images as people have them: read rightly, or refused in one sentence that names the remedy."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from layerlab import LayerlabError, LayerlabWarning, load_dataset
from layerlab.base import usage
from layerlab.cli.main import main
from layerlab.runs.batch.machine import Machine
from layerlab.workload.decoding import open_image
from layerlab.workload.places import half_of


def _encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, form, **options)
    return stream.getvalue()


def _grey(value: int, side: int = 8) -> bytes:
    return _encoded(np.full((side, side), value, np.uint8))


@pytest.fixture
def tree(tmp_path) -> Callable[..., Path]:
    """Writes so many images into each place below `mine`, each of another grey."""
    made = iter(range(256))

    def write(places: dict[str, int]) -> Path:
        for place, count in places.items():
            folder = tmp_path / "mine" / place
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                (folder / f"{number}.png").write_bytes(_grey(next(made)))
        return tmp_path / "mine"

    return write


def _load(folder: Path, **options: Any) -> Any:
    return load_dataset(folder, image_size=8, channels=1, device="cpu", **options)


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "half"),
    [("TRAINING", "train"), ("train_set", "train"), ("TrainSet", "train"), ("images-train", "train"),
     ("train2017", "train"), ("Valid", "validation"), ("dev", "validation"), ("EVAL", "validation"),
     ("validation_data", "validation"), ("Testing", "test"), ("test split", "test"), ("cat", None), ("trainers", None),
     ("test_tube", None), ("set", None), ("123", None), ("devil", None), ("contest", None)],
)
def test_a_half_is_known_by_its_name_in_any_case_and_common_spelling(name, half):
    assert half_of(name) == half


@pytest.mark.parametrize(
    ("places", "sizes"),
    [
        ({"Training/{}": 4, "Testing/{}": 2}, (8, None, 4)),
        ({"train_imgs/{}": 4, "EVAL/{}": 2}, (8, None, 4)),
        ({"trn/{}": 3, "devel/{}": 1, "tst/{}": 2}, (6, 2, 4)),
        ({"archive/v2/train/{}": 3, "archive/v2/valid/{}": 1}, (6, None, 2)),
        ({"train/train/{}": 3, "test/test/{}": 1}, (6, None, 2)),
        ({"pictures of pets/{}": 5}, (8, None, 2)),
        ({"{}": 5, "__MACOSX/{}": 2}, (8, None, 2)),
    ],
)
def test_layouts_as_people_have_them(tree, places, sizes):
    folder = tree({place.format(name): count for place, count in places.items() for name in ("ant", "bee")})
    data = _load(folder)
    assert data.class_names == ("ant", "bee")
    assert tuple(None if half is None else len(half) for half in (data.train, data.validation, data.test)) == sizes
    assert all(set(half.labels.tolist()) == {0, 1} for half in (data.train, data.test))
    without_test = any("EVAL" in place or "valid" in place for place in places)
    assert ("the test half is its validation half" in data.note) == without_test


def test_of_three_halves_the_test_images_are_those_of_test_and_validation_is_apart(tree):
    folder = tree({f"{half}/{name}": count for half, count in (("train", 4), ("Val", 2), ("test", 3))
                   for name in ("ant", "bee")})
    data = _load(folder)
    shades = [set(half.images.flatten().tolist()) for half in (data.train, data.validation, data.test)]
    assert [len(each) for each in shades] == [8, 4, 6]
    assert not shades[0] & shades[1] | shades[0] & shades[2] | shades[1] & shades[2]
    assert data.validation.mean == data.train.mean
    assert "for choosing" in data.note
    assert "8 + 4 + 6 images" in repr(data)
    assert len(_load(folder, limit=2, test_limit=2).validation) == 2


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"train": 3, "test": 3}, "look like halves and like classes"),
        ({"cat": 3, "dog": 3, "test": 3}, "look like halves and like classes"),
        ({"train/s1": 3, "train/s2": 2, "bus": 3}, "look like halves and like classes"),
        ({"train/a": 3, "Training/a": 3, "test/a": 1}, "two train halves by their names, .*; rename or remove one"),
        ({"train": 3, "test/a": 3, "test/b": 3}, "nothing says their classes; sort them into class folders"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(tree, places, message):
    with pytest.raises(LayerlabError, match=message):
        _load(tree(places))


def test_a_class_called_train_among_vehicles_is_a_class(tree):
    assert _load(tree({"bus": 5, "car": 5, "train": 5})).class_names == ("bus", "car", "train")


def test_a_test_half_without_class_folders_is_told_and_left_unused(tree):
    folder = tree({"train/a": 5, "train/b": 5, "test": 4})
    with pytest.warns(LayerlabWarning, match=r"test/ has images and no class folders, so every fifth training image"):
        data = _load(folder)
    assert (len(data.train), len(data.test)) == (8, 2)


def test_every_real_folder_is_visited_once_whatever_links_lead_to_it(tree):
    folder = tree({"train/a/deep": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    (folder / "train/a/up").symlink_to("..")
    (folder / "train/b/other").symlink_to(folder / "test")
    (folder / "train/b/self").symlink_to(".")
    assert _load(folder).train.labels.tolist() == [0, 0, 1, 1]
    # A class of links to folders elsewhere is one like any other.
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere/1.png").write_bytes(_grey(1))
    (folder / "train/c").symlink_to(folder.parent / "elsewhere")
    assert _load(folder).train.labels.tolist() == [0, 0, 1, 1, 2]
    (folder / "train/d").symlink_to(folder / "train/a")
    with pytest.raises(LayerlabError, match=r"train/d and .*train/a are one and the same folder by a link; remove one"):
        _load(folder)


def test_all_files_that_cannot_be_used_are_in_one_report_and_can_be_skipped(tree, tmp_path):
    folder = tree({"train/a": 9, "train/b": 9, "test/a": 2, "test/b": 2})
    for number in range(5):
        (folder / f"train/a/{number}.png").write_bytes(b"<html>not found</html>")
        (folder / f"train/b/{number}.png").write_bytes(_grey(0)[:40])
    (folder / "test/a/1.png").write_bytes(b"")
    (folder / "test/b/link.jpg").symlink_to("/nowhere.jpg")
    os.mkfifo(folder / "test/b/pipe.png")
    with pytest.raises(LayerlabError) as caught:
        _load(folder)
    text = str(caught.value)
    assert text.startswith("13 of 24 images cannot be used: ")
    assert "train/a/0.png (a web page)" in text
    assert "; and 3 more. Replace or remove them, or pass on_bad='skip'" in text
    for budget in (None, 0):  # resident, streamed
        data = _load(folder, on_bad="skip", memory_budget=budget)
        assert (len(data.train), len(data.test)) == (8, 3)
        assert "13 images that cannot be used left out" in data.note
        assert sum(len(y) for _, y in data.train.batches(3)) == 8
        assert data.train.labels.bincount().tolist() == [4, 4]
    # Once they are kept, too.
    with pytest.raises(LayerlabError, match="13 of 24"):
        _load(folder)


def test_a_class_of_which_no_image_can_be_used_is_refused(tree):
    folder = tree({"train/a": 2, "train/b": 2, "test/a": 1})
    for file in (folder / "train/b").iterdir():
        file.write_bytes(b"")
    with pytest.raises(LayerlabError, match="the class 'b' has no training image that can be used"):
        _load(folder, on_bad="skip")


def test_names_that_are_no_utf_8_are_read_and_shown(tree):
    folder = tree({"b": 5})
    os.mkdir(os.fsencode(folder) + b"/\xffa")
    for number in range(5):
        Path(os.fsdecode(os.fsencode(folder) + b"/\xffa/%d.png" % number)).write_bytes(_grey(number))
    data = _load(folder)
    assert data.class_names == ("b", "\\xffa")
    assert repr(data).encode()


# Pixels --------------------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_by_the_range_of_their_kind_not_of_the_image(form):
    for top in (65_535, 20_000):
        image, treated = open_image(_encoded((RAMP * top).astype(np.uint16), form), "here", 1)
        assert np.abs(np.asarray(image) - RAMP * top / 257).max() <= 0.51
        assert treated == ("scaled",)


def test_floats_are_scaled_from_0_to_1_and_of_another_range_refused():
    image, treated = open_image(_encoded(RAMP, "TIFF"), "here", 3)
    assert np.asarray(image)[..., 1].tolist() == (RAMP * 255).round().tolist()
    assert treated == ("scaled",)
    # One pixel of 1,024, as resampling leaves them, is cut.
    slightly = np.tile(RAMP, (4, 4))
    slightly[0, 0] = -0.001
    assert open_image(_encoded(slightly, "TIFF"), "here", 3)[1] == ("scaled", "cut")
    for wrong, why in ((RAMP * 255, "floats from 0 to 255.*divide"), (RAMP * np.nan, "not finite"),
                       ((RAMP * 9).astype(np.int32), "whose range nothing says")):
        with pytest.raises(LayerlabError, match=why):
            open_image(_encoded(wrong, "TIFF"), "here", 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_mid_grey_and_hidden_colours_are_not_shown(mode):
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:4, :, :3] = np.random.default_rng(0).integers(0, 2, (4, 8, 1)) * 255
    pixels[:4, :, 3] = 0
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.quantize(4)
    data = _encoded(image if mode == "P" else image.convert(mode))
    shown, treated = open_image(data, "here", 3)
    assert np.unique(np.asarray(shown)[:4]).tolist() == [128]
    assert np.unique(np.asarray(shown)[4:]).tolist() == [255]
    assert treated == ("blended",)
    # An alpha channel that hides nothing is nothing to be told of.
    assert open_image(_encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 255))), "here", 3)[1] == ()


@pytest.mark.parametrize("form", ["JPEG", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_an_image_is_turned_as_its_exif_orientation_says(form, orientation):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8] = 255  # white above
    stored = np.rot90(upright, {3: 2, 6: 1, 8: -1}[orientation])
    tag = Image.Exif()
    tag[0x0112] = orientation
    image, treated = open_image(_encoded(np.ascontiguousarray(stored), form, exif=tag), "here", 1)
    assert image.size == (24, 16)
    assert (np.asarray(image)[2:6].mean(), np.asarray(image)[10:14].mean()) == pytest.approx((255, 0), abs=3)
    assert treated == ("turned",)


@pytest.mark.parametrize(("suffix", "form"), [("gif", "GIF"), ("jfif", "JPEG"), ("JPE", "JPEG"), ("tif", "TIFF")])
def test_images_of_common_endings_are_read_and_the_note_says_what_was_done(tmp_path, suffix, form):
    for name in ("a", "b"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number in range(5):
            frames = [Image.new("L", (8, 8), 50 * each + number) for each in range(3)]
            several = {"save_all": True, "append_images": frames[1:]} if form in ("GIF", "TIFF") else {}
            (tmp_path / "mine" / name / f"{number}.{suffix}").write_bytes(_encoded(frames[0], form, **several))
    for budget, total in ((None, 10), (0, 8)):
        data = _load(tmp_path / "mine", memory_budget=budget)
        assert len(data.train) == 8
        told = f"{total} images of several frames, of which the first is taken"
        assert (told in data.note) == (form in ("GIF", "TIFF"))


def test_a_small_file_that_unpacks_to_gigabytes_is_refused(monkeypatch):
    data = _encoded(Image.new("1", (300, 300)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    with pytest.raises(LayerlabError, match=r"unpacks to 300 × 300 pixels, more than PIL.Image.MAX_IMAGE_PIXELS"):
        with pytest.warns(Image.DecompressionBombWarning):
            open_image(data, "here", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(LayerlabError, match=r"far more pixels than PIL.Image.MAX_IMAGE_PIXELS"):
        open_image(data, "here", 1)


def test_a_program_in_postscript_is_not_run_as_an_image():
    with pytest.raises(LayerlabError, match="none of the formats"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "x.png", 3)


def test_the_note_says_that_sizes_vary(tree):
    folder = tree({"a": 5, "b": 5})
    (folder / "b/3.png").write_bytes(_grey(3, side=20))
    assert "1 image scaled to 8 pixels, the shorter side of the first one" in load_dataset(folder, device="cpu").note
    assert "scaled" not in _load(folder).note


# Cache ---------------------------------------------------------------------------------------------------------------


def test_two_projects_folders_of_equal_names_sizes_and_times_do_not_share_pixels(tmp_path, monkeypatch):
    prints = []
    for project, shade in (("one", 40), ("two", 90), ("three", 40)):
        for name in ("a", "b"):
            folder = tmp_path / project / "my-images" / name
            folder.mkdir(parents=True)
            for number in range(5):
                file = folder / f"{number}.pgm"
                file.write_bytes(_encoded(np.full((8, 8), shade, np.uint8), "PPM"))
                os.utime(file, (1e9, 1e9))
        monkeypatch.chdir(tmp_path / project)
        data = load_dataset("my-images", device="cpu", channels=1)
        assert data.train.images.unique().tolist() == [shade]
        prints.append(data.fingerprint)
    # The content decides, not the place.
    assert prints[0] == prints[2] != prints[1]


def test_a_file_that_changes_and_keeps_its_size_and_time_is_read_again(tree, monkeypatch):
    monkeypatch.setattr("layerlab.workload.cache.SETTLED", -3600)  # as if all files were old
    folder = tree({"a": 5, "b": 5})
    first = _load(folder)
    file = folder / "a" / "3.png"
    before = file.stat()
    file.write_bytes(_grey(255))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    second = _load(folder)
    assert 255 in second.train.images
    assert first.fingerprint != second.fingerprint
    assert second.fingerprint == _load(folder).fingerprint


def test_other_pixels_in_the_cache_are_noticed(tree, tmp_path):
    folder = tree({"a": 5, "b": 5})
    first = _load(folder)
    for file in (tmp_path / "cache").glob("*.npy"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.warns(LayerlabWarning, match="was damaged and is made again"):
        assert torch.equal(_load(folder).train.images, first.train.images)


def test_what_a_killed_process_left_in_the_cache_goes_and_what_is_being_written_stays(tree, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    here = socket.gethostname()
    parts = {"dead": f"x.npy.{here}+{2**22 + 7}+1234abcd.partial", "alive": f"x.npy.{here}+{os.getpid()}+1.partial",
             "far": "x.npy.elsewhere+1+1.partial", "old": "x.npy.elsewhere+2+1.partial"}
    for name in parts.values():
        (cache / name).write_bytes(b"half")
    os.utime(cache / parts["old"], (1e9, 1e9))
    _load(tree({"a": 5, "b": 5}))
    assert {file.name for file in cache.glob("*.partial")} == {parts["alive"], parts["far"]}


def test_what_is_kept_is_nothing_that_a_run_has_used(tree, tmp_path):
    folder = tree({"a": 5, "b": 5})
    for _ in range(2):  # made, taken
        recorder = usage.start()
        _load(folder)
        used = recorder.content()
        assert list(used["data"]) == [str(folder)]
        assert not [file for file in used["files"] if file.startswith(str(tmp_path))]


def test_a_cache_that_cannot_be_written_is_told_and_leaves_nothing(tree, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(LayerlabWarning, match="Decoded images are not kept.*No space left"):
        _load(tree({"a": 5, "b": 5}))
    assert list((tmp_path / "cache").iterdir()) == []


def test_data_load_and_the_machine_is_known_without_what_linux_alone_has(tree, monkeypatch):
    real = os.sysconf

    def sysconf(name: Any) -> int:
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return real(name)

    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert isinstance(_load(tree({"a": 5, "b": 5})).train.images, torch.Tensor)
    assert Machine().threads >= 1


# Command -------------------------------------------------------------------------------------------------------------


def _check(folder: Path, status: int) -> str:
    # Wide, so that no line is wrapped wherever the folder lies.
    result = CliRunner().invoke(main, ["data", "check", str(folder)], env={"COLUMNS": "400"})
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def test_data_check_lists_what_a_training_would_better_not_meet(tree):
    folder = tree({"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1})
    checks = np.indices((8, 8)).sum(0) % 2
    for place, data in {
        "train/a/empty.png": b"", "train/a/twin.png": _encoded((checks * 255).astype(np.uint8)),
        # The same pixels in another file format, half and class.
        "test/b/twin.bmp": _encoded((checks * 255).astype(np.uint8), "BMP"),
        "train/b/deep.png": _encoded((checks * 999).astype(np.uint16)), "train/b/notes.heic": b"phone",
    }.items():
        (folder / place).write_bytes(data)
    text = _check(folder, status=1)
    for part in ("train 9 2", "test 3 2", "a 5 1", "that cannot be used 1 train/a/empty.png (the file is empty)",
                 "in two halves 1 test/b/twin.bmp = train/a/twin.png", "with two labels 1",
                 "of 16 bits or floats scaled to 8 bits 1 train/b/deep.png", "of a single colour 8", "1 .heic",
                 "Before you train, mend"):
        assert part in text, part


def test_data_check_of_sound_data_says_so_and_of_none_is_one_sentence(tree, tmp_path):
    folder = tree({"a": 0, "b": 0})
    for number in range(10):
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (folder / "ab"[number % 2] / f"{number}.png").write_bytes(_encoded(noise))
    assert "nothing 0 The data are sound." in _check(folder, status=0)
    assert "no-such is no folder; name a folder of images" in _check(tmp_path / "no-such", status=2)
