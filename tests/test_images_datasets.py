"""Any map-style dataset as data: of torchvision, of Hugging Face, of torch, and of own classes."""

import pickle

import numpy as np
import pytest
import torch
import xxhash
from conftest import MODELS, as_png, raises_with
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import FakeData, ImageFolder

from h2t_store import extract
from h2t_store.images import Source, arrange, open_source


class Own(Dataset):
    """Images and labels as they are given; counts how often an item is read."""

    def __init__(self, images, labels, **attributes):
        self.images, self.labels, self.n_read = images, labels, 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.n_read += 1
        return self.images[i], self.labels[i]


def assert_pictures_are(source, images):
    assert len(source) == len(images)
    for row, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(source.image(row)), image)


@pytest.mark.parametrize(
    ("labels", "attributes", "y", "classes"),
    [
        ([2, 0, -1, 2], {}, [2, 0, -1, 2], (0, 1, 2)),
        ([1, 0, 1, 0], {"classes": np.array(["b", "a"]), "samples": np.zeros((4, 2))}, [1, 0, 1, 0], ("b", "a")),
        ([1, 0, None, 1], {"classes": ["cat", "dog", "eel"]}, [1, 0, -1, 1], ("cat", "dog", "eel")),
        (["dog", "cat", None, "dog"], {}, [1, 0, -1, 1], ("cat", "dog")),
        ([None] * 4, {"classes": ["cat"]}, [-1] * 4, ()),
        (torch.tensor([1, 0, 1, 1]), {"classes": ["same", "same"]}, [1, 0, 1, 1], (0, 1)),
        (np.array([1, 0, 1, 1]), {"targets": np.array([1, 0, 1, 1])}, [1, 0, 1, 1], (0, 1)),
        ([1, 0, 1, 1], {"targets": [0, 0, 0, 0]}, [1, 0, 1, 1], (0, 1)),
        (np.array(["b", "a", "b", "b"]), {}, [1, 0, 1, 1], ("a", "b")),
    ],
)
@pytest.mark.parametrize("kind", ["arrays", "PIL", "dictionaries"])
def test_labels_of_own_datasets_are_integers_names_or_none(images, labels, attributes, y, classes, kind):
    pixels = list(images[:4]) if kind == "arrays" else [Image.fromarray(image) for image in images[:4]]
    dataset = Own(pixels, labels, **attributes)
    if kind == "dictionaries":

        class OfDictionaries(Own):
            def __getitem__(self, i):
                return {"label": self.labels[i], "image": self.images[i], "other": "x"}

        dataset = OfDictionaries(pixels, labels, **attributes)
    source = open_source(dataset)
    assert source.y.tolist() == y
    assert source.classes == classes
    assert source.notes == ([] if classes else ["4 images without labels"])
    assert source.sample_ids.tolist() == ["0", "1", "2", "3"]
    assert_pictures_are(source, images[:4])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            FakeData(4, (3, 8, 8), transform=transforms.ToTensor()),
            "is of type Tensor, torch.float32 (3, 8, 8)",
        ),
        (Own([torch.zeros(3, 8, 8, dtype=torch.uint8)], [0]), "a dataset is passed without transform to tensors"),
        (Own([np.zeros((8, 8, 3))], [0]), "Own[0] is of type ndarray, float64 (8, 8, 3); accepted are an image of PIL"),
        (Own([np.zeros((3, 8, 8), np.uint8)], [0]), "uint8 (3, 8, 8); accepted are an image of PIL and a uint8 array"),
        (Own([np.zeros((8, 8), np.uint8)], [0.5]), "labels of type float; accepted are integers and strings"),
        (Own([np.zeros((8, 8), np.uint8)], [[0, 1]]), "labels of shape (1, 2) for 1 images"),
        (Own([np.zeros((8, 8), np.uint8)], np.eye(1, 2), targets=np.eye(1, 2)), "labels of shape (1, 2) for 1 images"),
        (Own([np.zeros((8, 8), np.uint8)], [3], classes=["a"]), "label 3 of 1 classes"),
        (Own(["x.png"], [0]), "Own[0] is of type str; accepted are"),
        (Own([np.zeros((8, 8), np.uint8)], []), "data: Own[0]: IndexError: list index out of range"),
        (Own([], []), "Own holds no images"),
        ([1, 2], "list[0] is of type int; accepted are (image, label)"),
        ({"train": 1, "test": 2}, "a dictionary of datasets, 'train', 'test': pass one of them"),
        (iter(()), "accepted are a folder"),
    ],
)
def test_what_gives_no_pictures_is_one_clear_error(dataset, message):
    with raises_with(message):
        open_source(dataset)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(split="train"), "split 'train': a dataset has no splits"),
        (dict(data_dir="x"), "data_dir 'x': a dataset takes none"),
        (dict(download=True), "download: a dataset takes no such option"),
    ],
)
def test_a_dataset_takes_no_other_arguments(images, arguments, message):
    with raises_with(message):
        open_source(Own(images, np.zeros(40, int)), **arguments)


def test_an_image_folder_of_torchvision_is_read_as_the_folder(folder, tmp_path):
    dataset, source = ImageFolder(folder), open_source(folder)
    mapped = open_source(dataset)
    assert mapped.sample_ids.tolist() == source.sample_ids.tolist()
    assert mapped.classes == source.classes
    assert mapped.y.tolist() == source.y.tolist()
    key = "contents_sha256"
    assert mapped.description[key] == source.description[key]
    assert mapped.picture(3).digest == xxhash.xxh3_128_digest((folder / source.sample_ids[3]).read_bytes())
    common = dict(model=f"{MODELS}:small_input", store=tmp_path / "s", workers=0)
    first, other = extract(folder, name="folder", **common), extract(dataset, name="dataset", **common)
    np.testing.assert_array_equal(np.asarray(first), np.asarray(other))
    assert first.y.tolist() == other.y.tolist()


@pytest.mark.parametrize("kind", ["transform", "loader", "own"])
def test_files_that_a_dataset_changes_are_read_by_the_dataset(folder, kind):
    class OwnFolder(ImageFolder):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return image.resize((4, 4)), label

    half = transforms.Resize(4)
    dataset = {
        "transform": lambda: ImageFolder(folder, transform=half),
        "loader": lambda: ImageFolder(folder, loader=lambda path: half(Image.open(path))),
        "own": lambda: OwnFolder(folder),
    }[kind]()
    source = open_source(dataset)
    assert source.sample_ids.tolist() == open_source(folder).sample_ids.tolist()
    assert source.image(0).size == (4, 4)
    with raises_with("1 of 41 images are no longer there: z"):
        arrange(source, [*source.sample_ids, "z"], source.classes)


def test_labels_that_a_dataset_changes_are_those_that_it_gives(folder):
    dataset = ImageFolder(folder, target_transform=lambda label: "even" if label % 2 == 0 else "odd")
    source = open_source(dataset)
    assert source.classes == ("even", "odd")
    assert source.y.tolist() == [label % 2 for _, label in dataset.samples]


def test_parts_keep_the_identifiers_of_the_whole(folder, images):
    whole, rows = ImageFolder(folder), [7, 3, 30]
    source = open_source(Subset(Subset(whole, range(1, 40)), [row - 1 for row in rows]))
    expected = open_source(whole).take(np.array(rows))
    assert source.sample_ids.tolist() == expected.sample_ids.tolist()
    assert source.y.tolist() == expected.y.tolist()
    assert source.description == expected.description
    own = open_source(Subset(Own(images, np.arange(40) % 3), rows))
    assert own.sample_ids.tolist() == ["7", "3", "30"]
    assert own.y.tolist() == [1, 0, 0]
    assert_pictures_are(own, images[rows])


def test_labels_are_read_of_no_other_items_than_those_of_the_part(images):
    own = Own(images, np.arange(40))
    open_source(Subset(own, [5, 6]))
    assert own.n_read <= 3
    own = Own(images, np.arange(40), targets=np.arange(40))
    assert open_source(own).y.tolist() == list(range(40))
    assert own.n_read <= 5


def test_datasets_one_after_the_other_share_their_classes(folder, images):
    first = Own(images[:3], [0, 1, 0], classes=["cat", "dog"])
    second = Own(images[3:5], ["eel", "cat"])
    source = open_source(ConcatDataset([first, second]))
    assert source.classes == ("cat", "dog", "eel")
    assert source.y.tolist() == [0, 1, 0, 2, 0]
    assert source.sample_ids.tolist() == ["0", "1", "2", "3", "4"]
    assert_pictures_are(source, images[:5])
    mixed = open_source(Subset(ConcatDataset([ImageFolder(folder), second]), [40, 2, 41]))
    assert [mixed.classes[code] for code in mixed.y] == ["eel", "a", "cat"]
    assert mixed.sample_ids.tolist() == ["0", "a/08.png", "1"]
    assert_pictures_are(mixed, [images[3], images[8], images[4]])
    assert mixed.take(np.array([1])).picture(0).digest == open_source(folder).picture(2).digest


@pytest.mark.parametrize("sampled", [False, True])
def test_a_dataset_is_described_by_its_pictures(images, monkeypatch, sampled):
    many = np.concatenate([images] * 26)
    y = np.zeros(len(many), int)
    if sampled:
        monkeypatch.setattr(Source, "max_digested_bytes", 0)
    before = open_source(Own(many, y, targets=y))
    assert ("some_contents_sha256" if sampled else "contents_sha256") in before.description
    assert open_source(Own(many.copy(), y)).description == before.description
    assert open_source(Own(many[:-1], y)).description != before.description
    assert open_source(Own(many, y + 1)).description != before.description
    changed = many.copy()
    changed[-1] += 1
    assert open_source(Own(changed, y)).description != before.description
    copy = pickle.loads(pickle.dumps(before))
    assert copy.take(np.arange(len(many))).description == before.description
    own = Own(many, y, targets=y)
    assert open_source(own).description == before.description
    assert own.n_read < (1010 if sampled else 1050)


def test_a_dataset_that_gives_other_pictures_each_time_is_refused(images):
    source = open_source(ImageLike(images))
    _ = source.description
    with raises_with("ImageLike[0]: it has changed since the extraction began: extract again, from"):
        source.image(0)


class ImageLike(Own):
    def __init__(self, images):
        super().__init__(images.copy(), [0] * len(images))

    def __getitem__(self, i):
        self.images[i] += 1
        return super().__getitem__(i)


def test_an_item_that_cannot_be_read_can_be_skipped(images, tmp_path):
    pixels = [*images[:5], np.zeros((8, 8)), *images[6:12]]
    source = open_source(Own(pixels, [0] * 12))
    assert source.description
    with raises_with("Own[5] is of type ndarray, float64 (8, 8)"):
        source.image(5)
    X = extract(
        Own(pixels, [0, 1] * 6),
        model=f"{MODELS}:small_input",
        store=tmp_path / "s",
        name="x",
        workers=0,
        on_error="skip",
    )
    assert len(X) == 11


def test_pictures_of_a_dataset_come_the_right_way_up_with_remarks(images, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(images[0])).convert("RGBA").save(tmp_path / "x.png", exif=exif)
    deep = Image.fromarray(np.full((8, 8), 4000, np.uint16))
    clear = Image.fromarray(images[1]).convert("RGBA")
    clear.putalpha(0)
    source = open_source(Own([Image.open(tmp_path / "x.png"), deep, clear], ["a", "b", "c"]))
    np.testing.assert_array_equal(np.asarray(source.image(0)), images[0])
    assert "taken for 12-bit" in source.picture(1).remarks[0]
    assert "transparency is dropped" in source.picture(2).remarks[0]


@pytest.mark.parametrize("in_files", [True, False])
def test_a_dataset_of_hugging_face_is_read_with_its_names(images, tmp_path, in_files):
    datasets = pytest.importorskip("datasets")
    files = []
    for i, image in enumerate(images[:6]):
        path = tmp_path / "pictures" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(as_png(image))
        files.append(str(path) if in_files else {"bytes": path.read_bytes(), "path": path.name})
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    table = datasets.Dataset.from_dict({"image": files, "label": [0, 1, 0, 1, -1, 1]}, features=features)
    source = open_source(table)
    assert source.sample_ids.tolist() == [f"{i}.png" for i in range(6)]
    assert source.classes == ("cat", "dog")
    assert source.y.tolist() == [0, 1, 0, 1, -1, 1]
    assert_pictures_are(source, images[:6])
    assert source.picture(2).digest == xxhash.xxh3_128_digest(as_png(images[2]))
    chosen = open_source(table.select([5, 1, 2]))
    assert chosen.sample_ids.tolist() == ["5.png", "1.png", "2.png"]
    assert chosen.y.tolist() == [1, 1, 0]
    assert_pictures_are(chosen, images[[5, 1, 2]])
    subset = open_source(Subset(table, [5, 1, 2]))
    assert subset.description == chosen.description
    with raises_with("Dataset has the format 'torch': pass it .with_format(None)"):
        open_source(table.with_format("torch"))
    with raises_with("a dictionary of datasets, 'train': pass one of them"):
        open_source(datasets.DatasetDict(train=table))


def test_other_columns_of_pictures_are_not_decoded(images):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [{"bytes": as_png(images[0]), "path": None}], "mask": [{"bytes": b"no image", "path": None}]}
    features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
    assert_pictures_are(open_source(datasets.Dataset.from_dict(columns, features=features)), images[:1])


def test_pictures_that_torchvision_makes_up_are_read_by_index():
    dataset = FakeData(6, (3, 8, 8), num_classes=3)
    source = open_source(dataset)
    assert source.y.tolist() == [dataset[i][1] for i in range(6)]
    assert_pictures_are(source, [np.asarray(dataset[i][0]) for i in range(6)])
    digests = {source.picture(row).digest for row in range(6)}
    assert len(digests) == 6
    assert all(len(digest) == 16 for digest in digests)
