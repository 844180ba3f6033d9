"""Parquet files of images as the hubs and people have them: read rightly, or refused in one sentence."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from layerlab import LayerlabError, LayerlabWarning, load_dataset
from layerlab.workload.places import available


def _grey(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _load(folder: Path) -> Any:
    return load_dataset(folder, image_size=8, channels=1, device="cpu")


def _table(labels: Any, image: str = "image", label: str = "label", names: Sequence[str] = (), plain: bool = False,
           shade: int = 0) -> pa.Table:
    images: list[Any] = [_grey(shade + number) for number in range(len(labels))]
    kind = pa.binary()
    if not plain:
        images = [{"bytes": data, "path": None} for data in images]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    numbers = labels if isinstance(labels, pa.Array) else pa.array(labels)
    table = pa.table({image: pa.array(images, kind), label: numbers})
    if names:
        features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": list(names)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return table


def _written(folder: Path, **files: pa.Table) -> Path:
    for name, table in files.items():
        file = folder / f"{name.replace('__', '/').replace('_', '-')}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file)
    return folder


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("Training_0", "testing_0"), ("data__train_00000_of_00001_a09b74b3ef9c3b56", "data__test_0"),
     ("train", "valid_0"), ("default__train__0000", "default__validation__0000")],
)
def test_parquet_files_are_halves_by_their_names_or_folders(tmp_path, train, test):
    data = _load(_written(tmp_path, **{train: _table([0, 1, 1, 0]), test: _table([1, 0], shade=50)}))
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1, 1, 0], [1, 0])
    assert data.test.images[0].unique().tolist() == [50]


@pytest.mark.parametrize(
    ("image", "label"),
    [("img", "fine_label"), ("IMAGE", "Labels"), ("photo", "cls"), ("something", "target"), ("jpg", "category")],
)
@pytest.mark.parametrize("plain", [False, True])
def test_columns_have_the_names_of_the_common_hubs(tmp_path, image, label, plain):
    data = _load(_written(tmp_path, train=_table([0, 1, 0], image, label, plain=plain),
                          test=_table([1], image, label, plain=plain)))
    assert data.train.labels.tolist() == [0, 1, 0]
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_the_files_own_metadata_go_before_the_names_of_columns(tmp_path):
    table = _table([1, 0, 1], label="species", names=("ant", "bee", "cow"))
    table = table.append_column("label", pa.array(["left", "right", "left"]))
    data = _load(_written(tmp_path, train=table, test=table))
    assert (data.classes, data.class_names, data.train.labels.tolist()) == (3, ("ant", "bee", "cow"), [1, 0, 1])
    assert "labels from the column species" in data.note


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        (["dog", "ant", "dog"], [1, 0, 1], ("ant", "dog")),
        (pa.array(["dog", "ant", "dog"]).dictionary_encode(), [1, 0, 1], ("ant", "dog")),
        (pa.array([2, 1, 0]).dictionary_encode(), [2, 1, 0], ()),
        ([True, False, True], [1, 0, 1], ()),
        ([1.0, 0.0, 2.0], [1, 0, 2], ()),
        ([7, 3 * 10**9, 7], [0, 1, 0], ("7", "3000000000")),
        (pa.array([1, 2, 3], pa.uint8()), [0, 1, 2], ("1", "2", "3")),
    ],
)
def test_labels_of_every_kind_are_numbered_and_named(tmp_path, labels, numbers, names):
    data = _load(_written(tmp_path, train=_table(labels), test=_table(labels)))
    assert data.train.labels.tolist() == data.test.labels.tolist() == numbers
    assert data.class_names == names
    assert data.classes == len(set(numbers))
    assert ("are numbered 0 to" in data.note) == (bool(names) and names[0].isdigit())


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, None, 1], [0, 1], r"train.parquet has 1 of 3 labels missing.*\(row 1: null\); correct or remove"),
        ([0, -1, 1], [0, 1], r"train.parquet has 1 of 3 labels missing, negative.*\(row 1: -1\)"),
        ([0, 0.25, 1], [0.0, 1.0], r"train.parquet has the label 0.25 in row 1, which is no class"),
        ([0.0, float("nan"), 1.0], [0.0, 1.0], r"the label nan in row 1"),
        ([[0], [1], [0]], [[0]], r"labels of type list<.*one class for each image"),
        (["a", "b", "a"], ["c"], r"test.parquet has the class 'c' that no image of .*train.parquet has"),
        ([5, 9, 5], [7], r"test.parquet has the class 7 that no image of"),
        ([0, 1, 0], [2], r"test labels from 2 to 2, out of range for its 2 classes"),
        (["a", "b", "a"], [0], r"name their classes differently"),
        (pa.array([], pa.int64()), [0], r"has no train images"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, train, test, message):
    with pytest.raises(LayerlabError, match=message):
        _load(_written(tmp_path, train=_table(train), test=_table(test)))


def test_a_test_half_whose_labels_are_held_back_is_left_unused(tmp_path):
    folder = _written(tmp_path, train=_table([0, 1, 0]), validation=_table([1, 0]), test=_table([-1, -1, -1]))
    with pytest.warns(LayerlabWarning, match="the test half has no labels, so the validation half is reported"):
        assert len(_load(folder).test) == 2


def test_without_a_test_file_every_fifth_row_of_each_class_is_held_out(tmp_path):
    with pytest.warns(LayerlabWarning, match="there is no test half"):
        data = _load(_written(tmp_path, train_0=_table([0, 1] * 5)))
    assert (len(data.train), data.test.labels.tolist()) == (8, [0, 1])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"test": _table([0])}, "has no train-.*add the missing half"),
        ({"a__train": _table([0]), "b__train": _table([0])}, "train files in .*a and in .*b; name one"),
        ({"train": pa.table({"path": ["x"], "label": [0]})}, "its columns are path, label, and none holds images"),
        ({"train": _table([0], label="size")}, "its columns are image, size, and none holds labels"),
        ({"train": _table([0, 1], names=("a", "b")), "test": _table([0], names=("b", "a"))}, "name their classes diff"),
    ],
)
def test_parquet_files_of_another_layout_are_refused(tmp_path, files, message):
    with pytest.raises(LayerlabError, match=message):
        _load(_written(tmp_path, **files))


def test_a_known_dataset_in_the_hubs_layout_is_here(tmp_path):
    assert available("mnist", tmp_path) == ""
    _written(tmp_path / "mnist", data__train_0=_table(list(range(10))), data__test_0=_table([3, 1]))
    assert available("mnist", tmp_path) == str(tmp_path / "mnist")
    assert load_dataset("mnist", root=tmp_path, image_size=8, device="cpu").test.labels.tolist() == [3, 1]
