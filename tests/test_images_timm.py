import os
import pickle
import shutil
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
import xxhash
from conftest import as_png, raises_with
from PIL import Image
from timm.data import create_dataset

from h2t_store.errors import DataError
from h2t_store.images import arrange, open_source

datasets = pytest.importorskip("datasets")


def idx(array) -> bytes:
    """The format of MNIST's files: a type, the shape, the values, each big-endian."""
    array = np.asarray(array)
    kind = {1: 8, 4: 12}[array.dtype.itemsize]
    shape = np.array(array.shape, dtype=">i4").tobytes()
    return bytes([0, 0, kind, array.ndim]) + shape + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def mnist(tmp_path, images):
    """Files of MNIST and its kin: 30 grey images to train, 10 to test."""
    for name in ("MNIST", "KMNIST", "FashionMNIST"):
        raw = tmp_path / name / "raw"
        raw.mkdir(parents=True)
        for part, rows in (("train", slice(30)), ("t10k", slice(30, 40))):
            (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images[rows, ..., 0]))
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(40, dtype=np.uint8)[rows] % 10))
    return tmp_path


@pytest.mark.parametrize("name", ["mnist", "kmnist", "fashion_mnist", "MNIST"])
def test_torchvision_in_memory_is_what_timm_gives(mnist, images, name):
    source = open_source(f"torch/{name}", data_dir=mnist)
    reference = create_dataset(f"torch/{name}", root=str(mnist), split="train")
    assert len(source) == len(reference) == 30
    for row in range(30):
        image, label = reference[row]
        np.testing.assert_array_equal(np.asarray(source.image(row)), np.asarray(image.convert("RGB")))
        assert source.y[row] == label
    assert source.classes == tuple(reference.classes)
    assert list(source.sample_ids) == [f"train/{i}" for i in range(30)]
    assert source.image_size == (8, 8)
    for split in ("test", "validation"):
        test = open_source(f"torch/{name}", split, data_dir=mnist)
        assert list(test.sample_ids) == [f"test/{i}" for i in range(10)]
        np.testing.assert_array_equal(np.asarray(test.image(2))[..., 1], images[32, ..., 0])


def test_qmnist_has_its_digits_as_labels(tmp_path, images):
    raw = tmp_path / "QMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "qmnist-test-images-idx3-ubyte").write_bytes(idx(images[..., 0]))
    (raw / "qmnist-test-labels-idx2-int").write_bytes(idx(np.arange(320, dtype=np.int32).reshape(40, 8) // 32))
    source = open_source("torch/qmnist", "test", data_dir=tmp_path)
    assert source.y.tolist() == [i // 4 for i in range(40)]


def test_splits_that_timm_would_take_for_test_are_refused(mnist):
    with raises_with("split 'trian': torch/mnist has 'train' and 'test' (did you mean 'train' or 'training'?)"):
        open_source("torch/mnist", "trian", data_dir=mnist)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch/mnist", "data 'torch/mnist', split 'train': it is not in '"),
        ("torch/cifar10", "or damaged: name its folder (--data-dir), or have it fetched (--dataset-"),
        ("torch/imagenet", "data 'torch/imagenet', split 'train': The archive"),
        ("torch/cifar", "(did you mean 'cifar10' or 'cifar100'?); accepted are cifar10, cifar100, mnist"),
        ("torch/folder", "name the folder itself"),
    ],
)
def test_torchvision_sets_that_are_not_there_are_one_line(tmp_path, name, message):
    with raises_with(message):
        open_source(name, data_dir=tmp_path)


class Exploit:
    def __reduce__(self):
        return os.mkdir, (os.environ["H2T_EXPLOIT"],)


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_pickles_in_the_place_of_cifar_are_never_run(tmp_path, monkeypatch, name, folder):
    monkeypatch.setenv("H2T_EXPLOIT", str(tmp_path / "ran"))
    (tmp_path / folder).mkdir()
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    for file in [*batches, "test_batch", "batches.meta", "train", "test", "meta"]:
        (tmp_path / folder / file).write_bytes(pickle.dumps(Exploit()))
    with raises_with("or damaged: name its folder"):
        open_source(f"torch/{name}", data_dir=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_imagenet_is_read_by_its_wordnet_numbers(tmp_path, images):
    torch.save(({"n02": ("crane",), "n01": ("crane",)}, []), tmp_path / "meta.bin")
    for i in range(4):
        path = tmp_path / "val" / f"n0{i % 2 + 1}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)
    (tmp_path / "val" / "n01" / "x.txt").write_text("")
    source = open_source("torch/imagenet", "validation", data_dir=tmp_path)
    reference = create_dataset("torch/imagenet", root=str(tmp_path), split="validation")
    assert source.classes == ("n01", "n02") == tuple(reference.wnids)
    assert source.y.tolist() == reference.targets
    assert list(source.sample_ids) == ["n01/0.png", "n01/2.png", "n02/1.png", "n02/3.png"]
    assert source.notes == ["1 files are not images and were left out: n01/x.txt"]
    assert source.description["kind"] == "torch/imagenet"
    assert source.description["split"] == "val"


def test_inaturalist_is_read_by_its_categories(tmp_path, images):
    names = ["00000_a_b_c_d_e_f_g", "00001_a_b_c_d_e_f_h"]
    for i, name in enumerate(names):
        (tmp_path / "2021_valid" / name).mkdir(parents=True)
        Image.fromarray(images[i]).save(tmp_path / "2021_valid" / name / "x.png")
    source = open_source("torch/inaturalist", "validation", data_dir=tmp_path)
    assert source.classes == tuple(names)
    np.testing.assert_array_equal(np.asarray(source.image(1)), images[1])
    with raises_with("accepted is a split alone"):
        open_source("torch/inaturalist", "kingdom/2021_valid", data_dir=tmp_path)


def test_places365_is_read_by_its_lists(tmp_path, images, monkeypatch):
    from torchvision.datasets import Places365

    monkeypatch.setattr(Places365, "_check_integrity", lambda *given: True)
    (tmp_path / "categories_places365.txt").write_text("/a/airfield 0\n/b/bar 1\n")
    (tmp_path / "places365_val.txt").write_text("1.png 1\n0.png 0\n")
    (tmp_path / "places365_test.txt").write_text("1.png\n0.png\n")
    for part in ("val_large", "test_large"):
        (tmp_path / part).mkdir()
        for i in range(2):
            Image.fromarray(images[i]).save(tmp_path / part / f"{i}.png")
    source = open_source("torch/places365", "validation", data_dir=tmp_path)
    assert source.classes == ("/a/airfield", "/b/bar")
    assert source.y.tolist() == [1, 0]
    assert list(source.sample_ids) == ["val_large/1.png", "val_large/0.png"]
    np.testing.assert_array_equal(np.asarray(source.image(0)), images[1])
    test = open_source("torch/places365", "test", data_dir=tmp_path)
    file = tmp_path / "test_large" / "1.png"
    assert test.picture(0).digest == xxhash.xxh3_128_digest(file.read_bytes())
    assert test.y.tolist() == [-1, -1]
    assert test.classes == ()


@pytest.fixture
def image_folder(tmp_path, images):
    """What `datasets` calls an image folder: 20 images to train and 4 to test, in two classes."""
    for i in range(24):
        path = tmp_path / "set" / ("test" if i >= 20 else "train") / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)
    return tmp_path / "set"


def test_a_local_image_folder_is_read_by_split(image_folder, images, tmp_path):
    source = open_source(f"hfds/{image_folder}", "train", data_dir=tmp_path / "cache")
    assert list(source.sample_ids) == sorted(f"{'ab'[i % 2]}/{i:02d}.png" for i in range(20))
    assert source.classes == ("a", "b")
    for row, name in enumerate(source.sample_ids):
        assert source.classes[source.y[row]] == name[0]
        np.testing.assert_array_equal(np.asarray(source.image(row)), images[int(name[2:4])])
    assert source.notes == []
    assert source.description == open_source(image_folder, "train").description
    test = open_source(f"hfds/{image_folder}", "test", data_dir=tmp_path / "cache")
    assert len(test) == 4
    first = test.sample_ids[::-1]
    assert list(arrange(test, first, ("b", "a")).sample_ids) == list(first)
    with raises_with("split 'nowhere'"):
        open_source(f"hfds/{image_folder}", "nowhere", data_dir=tmp_path / "cache")
    with raises_with("named like splits, test, train, which are not read together"):
        open_source(f"hfds/{image_folder}", data_dir=tmp_path / "cache")
    (image_folder / "train" / "metadata.csv").write_text("file_name,label\na/00.png,3\n")
    with raises_with("its metadata is not read: write a list file"):
        open_source(f"hfds/{image_folder}", "train", data_dir=tmp_path / "cache")


def test_what_datasets_would_leave_out_merge_or_replace_is_told_apart_or_named(image_folder, images, tmp_path):
    shutil.rmtree(image_folder / "test")
    (image_folder / "train" / "b" / "x.svg").write_text("")
    (image_folder / "train" / "y" / "b").mkdir(parents=True)
    Image.fromarray(images[30]).save(image_folder / "train" / "y" / "b" / "30.png")
    (image_folder / "train" / "a" / "00.png").write_bytes(b"broken")
    source = open_source(f"hfds/{image_folder}", "train", data_dir=tmp_path / "cache")
    assert source.classes == ("a", "b", "y/b")
    assert source.notes == ["1 files were left out: SVG is not read: draw it as PNG (rsvg-convert): b/x.svg"]
    with raises_with("train/a/00.png: not an image"):
        source.image(0)


def parquet(path, columns, features):
    path.mkdir(parents=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path / "train-0.parquet")
    return f"hfds/{path}"


def test_parquet_is_read_with_its_names(tmp_path, images):
    files = [{"bytes": as_png(images[i]), "path": f"{i}.png"} for i in range(4)]
    labels = datasets.ClassLabel(names=["cat", "dog", "eel"])
    name = parquet(
        tmp_path / "p", {"image": files, "label": [1, 0, 1, -1]}, {"image": datasets.Image(), "label": labels}
    )
    source = open_source(name, data_dir=tmp_path / "cache")
    assert list(source.sample_ids) == [f"{i}.png" for i in range(4)]
    assert source.classes == ("cat", "dog", "eel")
    assert source.y.tolist() == [1, 0, 1, -1]
    assert [source.read(row) for row in range(4)] == [file["bytes"] for file in files]
    for row in range(4):
        np.testing.assert_array_equal(np.asarray(source.image(row)), images[row])
    with raises_with("Unknown split"):
        open_source(name, "nowhere", data_dir=tmp_path / "cache")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.take(np.array([2])).description == source.take(np.array([2])).description


def test_other_columns_and_equal_names_in_parquet(tmp_path, images):
    files = [{"bytes": as_png(images[i]), "path": "same.png"} for i in range(3)]
    files.append(None)
    columns = {"img": files, "coarse": [0, 0, 1, 1], "fine": [2, 1, 0, 1]}
    features = {
        "img": datasets.Image(),
        "coarse": datasets.ClassLabel(names=["x", "y"]),
        "fine": datasets.ClassLabel(names=["a", "b", "c"]),
    }
    source = open_source(parquet(tmp_path / "p", columns, features), data_dir=tmp_path / "cache")
    assert list(source.sample_ids) == ["train/0", "train/1", "train/2", "train/3"]
    assert source.classes == ("a", "b", "c")
    assert source.y.tolist() == [2, 1, 0, 1]
    assert any("columns like 'fine' were left out" in note and "coarse" in note for note in source.notes)
    with raises_with("train/3: there is no image"):
        source.image(3)


@pytest.mark.parametrize(
    ("labels", "kind", "y", "classes"),
    [
        ([3, 0], "int32", [3, 0], (0, 1, 2, 3)),
        (["dog", "cat"], "string", [1, 0], ("cat", "dog")),
        (None, "", [-1, -1], ()),
    ],
)
def test_labels_in_parquet_may_be_numbers_words_or_none(tmp_path, images, labels, kind, y, classes):
    columns = {"image": [{"bytes": as_png(images[i]), "path": None} for i in range(2)]}
    features = {"image": datasets.Image()}
    if labels:
        columns["label"], features["label"] = labels, datasets.Value(kind)
    source = open_source(parquet(tmp_path / "p", columns, features), data_dir=tmp_path / "cache")
    assert source.y.tolist() == y
    assert source.classes == classes
    assert source.notes == ([] if labels else ["2 images without labels"])


def test_what_is_no_set_of_images_is_one_line(tmp_path, monkeypatch):
    text = parquet(
        tmp_path / "p",
        {"text": ["a"], "label": [0]},
        {"text": datasets.Value("string"), "label": datasets.Value("int8")},
    )
    with pytest.raises(DataError, match="image") as caught:
        open_source(text, data_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    with raises_with("there is no such folder"):
        open_source(f"hfds/{tmp_path}/nowhere")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("image,label\na,0\n")
    with raises_with("is csv; accepted are imagefolder, parquet, arrow"):
        open_source(f"hfds/{tmp_path}/csv", data_dir=tmp_path / "cache")
    with raises_with("download: hfds/ takes no such option"):
        open_source(text, download=True)


def test_without_a_connection_a_dataset_of_the_hub_fails_at_once(tmp_path, monkeypatch, offline):
    retried = []
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", retried.append)
    with raises_with("it is not on this machine, and the Hub cannot be reached (network is unreachable)"):
        open_source("hfds/beans", data_dir=tmp_path / "cache")
    assert not retried
    assert not datasets.config.HF_HUB_OFFLINE


def test_scripts_and_pickles_in_a_dataset_are_never_run(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("H2T_EXPLOIT", str(tmp_path / "ran"))
    script = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"
    (image_folder / "train.pkl").write_bytes(pickle.dumps(Exploit()))
    (image_folder / "train.py").write_text(script)
    source = open_source(f"hfds/{image_folder}", "train", data_dir=tmp_path / "cache")
    assert len(source) == 20
    (image_folder / f"{image_folder.name}.py").write_text(script)
    with raises_with("scripts are no longer supported"):
        open_source(f"hfds/{image_folder}", data_dir=tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_a_missing_or_old_package_is_said_with_what_to_install(image_folder, monkeypatch):
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with raises_with("pip install 'datasets>=4'"):
        open_source(f"hfds/{image_folder}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with raises_with("pip install head2toe[hf]"):
        open_source(f"hfds/{image_folder}")
