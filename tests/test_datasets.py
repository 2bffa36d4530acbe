import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
from conftest import raises_with
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from h2t_store.datasets import arrange, open_source
from h2t_store.datasets import source as source_module
from h2t_store.datasets.names import as_names
from h2t_store.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)


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
    assert source.notes == [
        "2 hidden files and folders were left out: .ipynb_checkpoints, a/._00.png",
        "1 links to a folder above were left out: b/up",
    ]


def test_a_link_to_a_class_is_a_class_and_a_pipe_is_no_image(folder):
    (folder / "AA").symlink_to(folder / "b")
    os.mkfifo(folder / "a" / "p.png")
    source = open_source(folder)
    assert source.classes == ("AA", "a", "b", "c", "d")
    assert len(source.y) == 50
    assert source.notes == ["1 files are not images and were left out: a/p.png"]


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


def test_a_folder_is_read_by_split_under_any_name_that_timm_takes_for_it(folder):
    folder.rename(folder.parent / "val")
    (folder.parent / "train").mkdir()
    parent = folder.parent
    for split in ("val", "validation", "eval"):
        source = open_source(parent, split)
        assert source.classes == ("a", "b", "c", "d")
        assert source.description == open_source(parent / "val").description
    with raises_with(f"split 'tran': '{parent}' has no such folder (did you mean 'train'?)"):
        open_source(parent, "tran")
    with raises_with("holds no images"):
        open_source(parent, "train")


def test_folders_of_splits_that_are_read_as_classes_are_noted(folder):
    (folder.parent / "all" / "test").mkdir(parents=True)
    folder.rename(folder.parent / "all" / "train")
    (folder.parent / "all" / "train" / "a").rename(folder.parent / "all" / "test" / "a")
    source = open_source(folder.parent / "all")
    assert source.classes == ("test/a", "train/b", "train/c", "train/d")
    assert "the folders test, train look like splits" in source.notes[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(data_dir="x"), "data_dir 'x': a folder takes none"),
        (dict(download=True), "download: a folder takes no such option"),
    ],
)
def test_arguments_that_would_change_nothing_are_refused(folder, images, arguments, message):
    with raises_with(message):
        open_source(folder, **arguments)
    for data, what in (("digits", "digits"), ((images, None), "arrays")):
        with raises_with(message.replace("a folder", what)):
            open_source(data, **arguments)
    with raises_with("split 'train': arrays has no splits"):
        open_source((images, None), "train")


def test_what_is_nowhere_is_one_line_with_what_is_close(folder):
    with raises_with("does not exist (did you mean 'torch/cifar10'?); accepted are a folder"):
        open_source("troch/cifar10")
    with raises_with(f"does not exist (did you mean '{folder}'?)"):
        open_source(str(folder) + "s")
    with raises_with("(did you mean 'digits'?)"):
        open_source("digit")
    with raises_with("data: an empty name"):
        open_source("")
    with raises_with("does not exist"):
        open_source("a\0b")
    with raises_with("is one image: name its folder"):
        open_source(folder / "a" / "00.png")
    os.mkfifo(folder / "pipe")
    with raises_with("neither a folder nor a file"):
        open_source(folder / "pipe")


def test_a_link_to_an_image_that_is_gone_is_an_error(folder):
    (folder / "a" / "gone.png").symlink_to("nowhere.png")
    (folder / "a" / "gone.txt").symlink_to("nowhere.txt")
    with raises_with(f"1 links in {folder} lead nowhere: a/gone.png"):
        open_source(folder)


def test_an_image_that_disappears_is_named(folder):
    source = open_source(folder)
    (folder / "a" / "00.png").unlink()
    with raises_with(f"{folder / 'a' / '00.png'}: No such file or directory"):
        source.image(0)
    with raises_with(f"{folder / 'a' / '00.png'}: No such file or directory"):
        _ = source.description


def test_folders_and_images_without_permission_are_named(folder, monkeypatch):
    source = open_source(folder)

    def refuse(path, *options, **more):
        raise PermissionError(13, "Permission denied", os.fspath(path))

    monkeypatch.setattr("builtins.open", refuse)
    with raises_with(f"{folder / 'a' / '00.png'}: Permission denied"):
        source.image(0)
    monkeypatch.setattr(os, "scandir", refuse)
    with raises_with(f"data: {folder}/: Permission denied"):
        open_source(folder)


def test_any_name_that_is_unicode_is_read(tmp_path, images):
    names = ["a b/ü ñ.png", "c/日本.PNG", "new\nline/x.png", "e.png/f.png", "-/--.png", "g/'\".png"]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(images[i]).save(tmp_path / name)
    source = open_source(tmp_path)
    assert sorted(source.sample_ids) == sorted(names)
    for row, name in enumerate(source.sample_ids):
        np.testing.assert_array_equal(np.asarray(source.image(row)), images[names.index(name)])
    (tmp_path / "new\nline" / "x.png").write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        source.image(list(source.sample_ids).index("new\nline/x.png"))
    assert "\n" not in str(caught.value)


def test_the_description_is_of_the_content_and_not_of_the_place(folder, images):
    before = open_source(folder).description
    assert before["kind"] == "folder"
    assert before["n"] == 40
    folder.rename(folder.parent / "moved")
    assert open_source(folder.parent / "moved").description == before
    path = folder.parent / "moved" / "a" / "00.png"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert open_source(folder.parent / "moved").description != before


def test_beyond_the_limit_the_description_is_of_sizes(folder, monkeypatch):
    monkeypatch.setattr(source_module, "_MAX_DIGESTED_BYTES", 5000)
    source = open_source(folder)
    assert "paths_and_sizes_sha256" in source.description
    assert "contents_sha256" in source.take(np.arange(3)).description
    (folder / "a" / "00.png").write_bytes(b"x")
    assert open_source(folder).description != source.description


rows_of_40 = st.lists(st.integers(0, 39), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(rows_of_40, rows_of_40)
def test_equal_descriptions_mean_equal_rows(first, second):
    source = open_source((IMAGES, np.arange(40) % 4))
    one, other = source.take(np.array(first)), source.take(np.array(second))
    assert (one.description == other.description) == (first == second)
    for row, number in enumerate(first):
        assert one.sample_ids[row] == f"array/{number}"
        assert one.y[row] == number % 4
        np.testing.assert_array_equal(np.asarray(one.image(row)), IMAGES[number])
    again = one.take(np.arange(len(first))[::-1])
    assert again.description == source.take(np.array(first[::-1])).description


def test_equal_pixels_in_another_shape_are_described_otherwise():
    images = np.zeros((2, 4, 8, 3), np.uint8)
    assert open_source((images, None)).description != open_source((images.reshape(2, 8, 4, 3), None)).description


def test_labels_are_described_by_their_names(images):
    numbers = open_source((images, np.arange(40) % 4)).description
    assert open_source((images, [str(i % 4) for i in range(40)])).description == numbers
    assert open_source((images, [str((i + 1) % 4) for i in range(40)])).description != numbers
    assert open_source((images, None)).description != open_source((images, np.zeros(40, int))).description


def test_each_image_is_digested_once(folder, monkeypatch):
    source, read = open_source(folder), []
    content = type(source).content
    monkeypatch.setattr(type(source), "content", lambda self, row: read.append(row) or content(self, row))
    first = source.take(np.arange(10)).description
    assert len(read) == 10
    _ = source.description
    assert len(read) == 40
    assert source.take(np.arange(10)).description == first
    assert len(read) == 40


def test_a_source_pickles_without_its_digests(folder):
    source = open_source(folder)
    description = source.description
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(np.asarray(copy.image(3)), np.asarray(source.image(3)))
    assert copy.take(np.arange(40)).description == description


def test_arranging_keeps_earlier_rows_and_classes_in_front(folder, images):
    before = open_source(folder)
    (folder / "aa").mkdir()
    for name in ("a/-1.png", "aa/0.png", "d/99.png"):
        Image.fromarray(images[0]).save(folder / name)
    after = arrange(open_source(folder), before.sample_ids, before.classes)
    assert list(after.sample_ids) == [*before.sample_ids, "a/-1.png", "aa/0.png", "d/99.png"]
    assert after.classes == ("a", "b", "c", "d", "aa")
    np.testing.assert_array_equal(after.y, [*before.y, 0, 4, 3])
    assert after.take(np.arange(40)).description == before.description
    assert after.description != before.description


def test_arranging_as_it_is_changes_nothing(folder):
    source = open_source(folder)
    assert arrange(source, source.sample_ids, source.classes).description == source.description
    assert arrange(source, list(source.sample_ids), list(source.classes)).description == source.description


def test_arranging_names_what_is_gone(folder):
    before = open_source(folder)
    for name in ("a/00.png", "a/04.png", "b/01.png", "c/02.png"):
        (folder / name).unlink()
    with raises_with("4 of 40 images are no longer there: a/00.png, a/04.png, b/01.png, …"):
        arrange(open_source(folder), before.sample_ids, before.classes)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.data())
def test_equal_identifiers_are_matched_in_order(names, data):
    whole = open_source((IMAGES[: len(names)], None))
    source = replace(whole, sample_ids=as_names(names))
    wanted = data.draw(st.permutations(names))[: data.draw(st.integers(0, len(names)))]
    arranged = arrange(source, wanted, ())
    assert list(arranged.sample_ids[: len(wanted)]) == list(wanted)
    assert sorted(arranged.numbers) == list(range(len(names)))
    for name in set(names):
        front = arranged.numbers[: len(wanted)][[n == name for n in wanted]]
        rest = arranged.numbers[len(wanted) :]
        assert list(front) == [i for i, n in enumerate(names) if n == name][: len(front)]
        assert list(rest) == sorted(rest)


def test_relabelling_needs_all_classes_that_occur(images):
    source = open_source((images, np.arange(40) % 2 * 2))
    assert source.classes == (0, 1, 2)
    np.testing.assert_array_equal(source.relabelled((2, 0)).y, 1 - np.arange(40) % 2)
    with raises_with("classes: 2 is not among 2 classes"):
        source.relabelled((0, 1))
    assert open_source((images, None)).relabelled(("x",)).y.tolist() == [-1] * 40


def test_integers_stay_names_where_they_were_names_before(images):
    source = open_source((images, np.arange(40) % 3))
    again = arrange(source, source.sample_ids.tolist(), ("0", "1"))
    assert again.classes == ("0", "1", "2")
    assert again.y.tolist() == source.y.tolist()
    assert again.description == source.description


def test_labels_of_arrays(images):
    assert open_source((images, None)).y.tolist() == [-1] * 40
    numbers = open_source((images, np.arange(40) % 3 + 4))
    assert numbers.y.tolist() == (np.arange(40) % 3 + 4).tolist()
    assert numbers.classes == tuple(range(7))
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
        with raises_with("'digits' and a tuple (images, labels)"):
            open_source(wrong)
    with raises_with("a tuple of 3"):
        open_source((images, None, None))
