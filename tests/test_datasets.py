import os
import re

import numpy as np
import pytest
from PIL import Image

from h2t_store.datasets import open_source
from h2t_store.errors import DataError


def raises_with(message: str):
    return pytest.raises(DataError, match=re.escape(message))


def test_a_folder_is_read_in_one_order_with_its_folders_as_classes(folder, images):
    source = open_source(folder)
    assert source.classes == ("a", "b", "c", "d")
    assert list(source.sample_ids) == sorted(f"{'abcd'[i % 4]}/{i:02d}.png" for i in range(40))
    for row, name in enumerate(source.sample_ids):
        assert source.classes[source.y[row]] == name[0]
        np.testing.assert_array_equal(np.asarray(source.image(row)), images[int(name[2:4])])
    assert source.notes == []


def test_nested_classes_with_equal_leaf_names_stay_apart(tmp_path, images):
    for name in ("x/left/1.png", "y/left/1.PNG"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(images[0]).save(tmp_path / name)
    source = open_source(tmp_path)
    assert source.classes == ("x/left", "y/left")
    assert source.y.tolist() == [0, 1]


def test_what_is_left_out_is_counted_and_named(folder):
    (folder / "a" / "notes.txt").write_text("hello")
    (folder / "z empty").mkdir()
    assert open_source(folder).notes == [
        "1 files are not images and were left out: a/notes.txt",
        "1 folders hold no images: z empty",
    ]


def test_hidden_files_and_loops_of_links_are_not_read(folder):
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "x.png").write_text("x")
    (folder / "a" / "._00.png").write_text("x")
    (folder / "b" / "up").symlink_to(folder)
    source = open_source(folder)
    assert len(source.y) == 40
    assert source.classes == ("a", "b", "c", "d")
    assert source.notes == ["2 hidden files and folders were left out: .ipynb_checkpoints, a/._00.png"]


def test_a_link_to_a_class_is_a_class_and_a_pipe_is_no_image(folder):
    (folder / "AA").symlink_to(folder / "b")
    os.mkfifo(folder / "a" / "p.png")
    source = open_source(folder)
    assert source.classes == ("AA", "a", "b", "c", "d")
    assert len(source.y) == 50
    assert source.notes == ["1 files are not images and were left out: a/p.png"]


@pytest.mark.parametrize("values", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32)])
def test_pixels_that_do_not_fit_16_bits_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "x.tiff")
    with raises_with("accepted are 8 and 16 bits per channel"):
        open_source(tmp_path).image(0)


def test_a_name_that_is_not_utf8_is_one_clear_error(folder):
    os.rename(folder / "a" / "00.png", os.fsencode(folder / "a") + b"/gr\xf6.png")
    with raises_with("is not UTF-8: rename it"):
        open_source(folder)


def test_images_without_class_folders_are_unlabelled(tmp_path, images):
    Image.fromarray(images[0]).save(tmp_path / "one.png")
    source = open_source(tmp_path)
    assert source.y.tolist() == [-1]
    assert source.classes == ()
    assert source.notes == ["1 images without class folders: unlabelled"]


def test_images_beside_class_folders_are_an_error(folder, images):
    Image.fromarray(images[0]).save(folder / "loose.png")
    with raises_with("class folders and 1 images beside them, such as 'loose.png'"):
        open_source(folder)


def test_folders_that_hold_nothing(tmp_path):
    with raises_with("does not exist"):
        open_source(tmp_path / "nowhere")
    with raises_with("holds no images"):
        open_source(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with raises_with("holds no images; it holds 1 other files, such as 'a.txt'"):
        open_source(tmp_path)
    with raises_with("is not a folder"):
        open_source(tmp_path / "a.txt")


@pytest.mark.parametrize("content", [b"just text", b"", b"\xff\xd8\xff\xe0 and no more"])
def test_a_file_that_is_no_image_is_named(folder, content):
    (folder / "b" / "05.png").write_bytes(content)
    source = open_source(folder)
    with raises_with(str(folder / "b" / "05.png")):
        source.image(list(source.sample_ids).index("b/05.png"))


def test_a_truncated_jpeg_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with raises_with(str(path)):
        open_source(tmp_path).image(0)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 200, (200, 200, 200)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
        ("P", 0, (0, 0, 0)),
        ("I;16", 200 << 8, (200, 200, 200)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, value, expected):
    path = tmp_path / f"x.{'tiff' if mode == 'CMYK' else 'png'}"
    if mode == "I;16":
        Image.fromarray(np.full((1, 1), value, dtype=np.uint16)).save(path)
    else:
        Image.new(mode, (1, 1), value).save(path)
    assert open_source(tmp_path).image(0).getpixel((0, 0)) == expected


def test_the_description_changes_with_the_files(folder, images):
    before = open_source(folder).description
    assert open_source(folder).description == before
    Image.fromarray(images[0]).save(folder / "a" / "new.png")
    assert open_source(folder).description != before


def test_digits_are_split_once_and_for_all():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train.y), len(test.y)) == (1000, 797)
    chosen = [{name.split("/")[1] for name in part.sample_ids} for part in (train, test)]
    assert len(chosen[0] | chosen[1]) == 1797
    assert np.asarray(train.image(0)).max() == 255
    with raises_with("split 'validation': digits has 'train' and 'test'"):
        open_source("digits", "validation")


def test_a_split_of_what_has_none_is_refused(folder):
    with raises_with("split 'test': only 'digits' has splits"):
        open_source(folder, "test")


def test_labels_of_arrays(images):
    assert open_source((images, None)).y.tolist() == [-1] * 40
    numbers = open_source((images, np.arange(40) % 3 + 4))
    assert numbers.y.tolist() == (np.arange(40) % 3 + 4).tolist()
    assert numbers.classes == tuple("0123456")
    words = open_source((images, ["cat", "ant"] * 20))
    assert words.classes == ("ant", "cat")
    assert words.y.tolist() == [1, 0] * 20


def test_arrays_that_are_not_images_are_refused(images):
    for wrong in (images.astype(float), images[..., 0], images[:0], images[..., :2]):
        with raises_with("accepted is uint8 (n, h, w, 3)"):
            open_source((wrong, None))
    for labels, message in (
        (np.zeros(3, int), "labels of shape (3,) for 40 images"),
        (np.full(40, -2), "labels from -2"),
        (np.zeros(40), "labels of dtype float64"),
    ):
        with raises_with(message):
            open_source((images, labels))
    for wrong in (images, [images, None], 3):
        with raises_with("accepted are a folder, 'digits' and a tuple (images, labels)"):
            open_source(wrong)
    with raises_with("a tuple of 3"):
        open_source((images, None, None))
