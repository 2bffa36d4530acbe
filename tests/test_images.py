import io
import os
import pickle
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from conftest import as_png, raises_with
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from h2t_store.errors import DataError
from h2t_store.images import Source, arrange, open_source
from h2t_store.images.names import as_names

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


def pictures_in(root, names):
    """The same small picture under each name below ``root``, in a folder or, where that ends in .tar, in a tar."""
    if root.suffix == ".tar":
        with tarfile.open(root, "w") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                content = as_png(IMAGES[0])
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return root
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(as_png(IMAGES[0]))
    return root


@pytest.fixture(params=["data", "data.tar"])
def data(request, tmp_path):
    return lambda *names: pictures_in(tmp_path / request.param, names)


@pytest.mark.parametrize(
    ("names", "choices"),
    [
        (["train/cat/1.png", "test/cat/1.png"], "test, train"),
        (["Train/cat/1.png", "TEST/cat/1.png", "misc/1.png"], "TEST, Train"),
        (["train/cat/1.png", "validation/cat/1.png", "docs/logo/x/1.png"], "train, validation"),
        (["training_set/cat/1.png", "test_set/cat/1.png"], "test_set, training_set"),
        (["train2017/1.png", "val2017/1.png"], "train2017, val2017"),
        (["train/1.png", "test/1.png"], "test, train"),
        (["inner/train/cat/1.png", "inner/test/cat/1.png"], "test, train"),
        (["a/b/Training/cat/1.png", "a/b/Testing/cat/1.png", "a/b/x/1.png"], "Testing, Training"),
        (["train/cat/1.png", "misc/1.png"], "train"),
        (["train2014/cat/1.png", "train2017/cat/1.png"], "train2014, train2017"),
        (["seg_train/seg_train/cat/1.png", "seg_test/seg_test/cat/1.png", "misc/1.png"], "seg_test, seg_train"),
    ],
)
def test_folders_named_like_splits_are_never_mixed(data, names, choices):
    path = data(*names)
    with raises_with(f"has folders named like splits, {choices}, which are not read together") as caught:
        open_source(path)
    for name in choices.split(", "):
        assert f"--split {name}" in str(caught.value)
        assert len(open_source(path, name)) == 1


@pytest.mark.parametrize(
    "names",
    [
        ["cat/train/1.png", "cat/test/1.png", "dog/train/1.png"],
        ["a/train/x/1.png", "a/test/x/1.png", "b/c/1.png"],
    ],
)
def test_splits_within_classes_are_not_mixed_either(data, names):
    with raises_with("named like splits, test, train, which are not read together or with others: name a folder"):
        open_source(data(*names))


@pytest.mark.parametrize("split", ["train", "training", "TRAIN"])
def test_a_split_is_found_in_any_case_under_like_names_and_below_a_folder(data, split):
    path = data("set/Train/cat/1.png", "set/Train/dog/2.png", "set/test/cat/3.png", "set/val/cat/4.png")
    source = open_source(path, split)
    assert source.classes == ("cat", "dog")
    assert len(source) == 2
    assert len(open_source(path, "validation")) == 1
    with raises_with("has no such folder (did you mean 'Train'?)"):
        open_source(path, "Trian")


def test_a_split_that_several_folders_go_by_is_named_in_full(data):
    path = data("train2014/cat/1.png", "train2017/dog/1.png", "val2017/cat/1.png")
    with raises_with("split 'train'") as caught:
        open_source(path, "train")
    assert "has train2014, train2017: name one of them" in str(caught.value)
    assert open_source(path, "train2017").sample_ids[0].endswith("dog/1.png")
    assert len(open_source(path, "val")) == 1


@pytest.mark.parametrize("top", ["train", "TEST", "set/validation", "train/train", "seg_test/seg_test"])
def test_the_folder_of_a_split_that_is_alone_is_read_as_one(data, top):
    path = data(f"{top}/cat/1.png", f"{top}/dog/2.png")
    source = open_source(path)
    assert source.classes == ("cat", "dog")
    assert source.notes == [f"the folder {top} is read as a split"]
    split = open_source(path, top.split("/")[-1])
    assert (split.classes, split.description) == (source.classes, source.description)
    with raises_with("has no such folder; it has"):
        open_source(path, "dev" if "validation" not in top else "test")


def test_images_at_the_top_of_a_split_are_unlabelled(data):
    source = open_source(data("test/1.png", "test/2.png"))
    assert source.classes == ()
    assert source.y.tolist() == [-1, -1]


def test_classes_that_are_called_like_one_split_are_classes(data):
    source = open_source(data("bus/1.png", "car/2.png", "train/3.png", "train2/4.png"))
    assert source.classes == ("bus", "car", "train", "train2")
    assert source.notes == ["train, train2 are read as classes: to read one alone, name it as split"]


def test_names_that_only_begin_or_end_like_splits_are_classes(data):
    names = ["train_station/a/1.png", "test_tube/b/1.png", "valley/c/1.png", "trainer/d/1.png", "developer/1.png"]
    source = open_source(data(*names, "bullet_train/1.png", "litmus_test/1.png"))
    assert len(source.classes) == 7
    assert source.notes == []


def test_lists_of_splits_beside_each_other_are_lists(tmp_path):
    root = pictures_in(tmp_path / "data", ["train/1.png", "test/2.png"])
    (root / "train.txt").write_text("train/1.png cat\n")
    (root / "test.txt").write_text("test/2.png cat\n")
    assert open_source(root / "train.txt").sample_ids.tolist() == ["train/1.png"]
    assert open_source(root / "train.txt").notes == []


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


@pytest.fixture(params=[1 << 30, 0], ids=["digested", "beyond the limit"])
def limit(request, monkeypatch):
    monkeypatch.setattr(Source, "max_digested_bytes", request.param)


def changed(content: bytes) -> bytes:
    """Another picture of the same size in bytes."""
    with Image.open(io.BytesIO(content)) as image:
        other = as_png(np.rot90(np.asarray(image), 2))
    return other if len(other) == len(content) else content[:-1] + b"x"


def overwrite(path, content: bytes) -> None:
    """In place, and later as far as the file system can tell."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def opened(kind, root, contents):
    """Two pictures as a source of that kind, and the file that holds the first."""
    path = root / "data/train/a/1.png"
    path.parent.mkdir(parents=True)
    for number, content in enumerate(contents, 1):
        path.with_name(f"{number}.png").write_bytes(content)
    if kind == "folder":
        return open_source(root / "data"), path
    if kind == "list":
        (root / "list.txt").write_text("data/train/a/1.png x\ndata/train/a/2.png x\n")
        return open_source(root / "list.txt"), path
    if kind == "table":
        datasets = pytest.importorskip("datasets")
        table = datasets.Dataset.from_dict({"image": [str(path), str(path.with_name("2.png"))]})
        return open_source(table.cast_column("image", datasets.Image())), path
    if kind == "torchvision":
        return open_source(ImageFolder(path.parents[1])), path
    with tarfile.open(root / "x.tar", "w") as archive:
        archive.add(path.parent, "a")
    return open_source(root / "x.tar") if kind == "tar" else open_source(f"wds/{root}", "x.tar"), root / "x.tar"


KINDS = ["folder", "list", "tar", "wds", "table", "torchvision"]


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_come_the_right_way_up_wherever_they_lie(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(np.rot90(IMAGES[0])).save(file, "PNG", exif=exif)
    source, _ = opened(kind, tmp_path, [file.getvalue(), as_png(IMAGES[1])])
    np.testing.assert_array_equal(np.asarray(source.image(0)), IMAGES[0])
    np.testing.assert_array_equal(np.asarray(source.image(1)), IMAGES[1])


@pytest.mark.parametrize("kind", [*KINDS, "arrays"])
@pytest.mark.parametrize("in_worker", [False, True])
@pytest.mark.usefixtures("limit")
def test_a_picture_that_changes_after_it_was_described_is_not_read(tmp_path, kind, in_worker):
    images = IMAGES[:2].copy()
    if kind == "arrays":
        source = open_source((images, None))
    else:
        source, path = opened(kind, tmp_path, map(as_png, images))
    _ = source.description
    source = source.take(np.array([1, 0]))
    np.testing.assert_array_equal(np.asarray(source.image(1)), IMAGES[0])
    if kind == "arrays":
        images[0] += 1
    else:
        before = as_png(IMAGES[0])
        overwrite(path, path.read_bytes().replace(before, changed(before)))
    if in_worker:
        source = pickle.loads(pickle.dumps(source))
    with raises_with("it has changed since"):
        source.image(1)


def test_beyond_the_limit_the_description_is_of_sizes_and_times(folder, monkeypatch):
    monkeypatch.setattr(Source, "max_digested_bytes", 5000)
    source = open_source(folder)
    assert "paths_sizes_and_times_sha256" in source.description
    assert "contents_sha256" in source.take(np.arange(3)).description
    shutil.copytree(folder, folder.parent / "copy")
    assert open_source(folder.parent / "copy").description == source.description
    path = folder / "a" / "00.png"
    overwrite(path, path.read_bytes()[:-1] + b"x")
    assert open_source(folder).description != source.description


def test_beyond_the_limit_a_table_that_was_written_again_is_another_one(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(Source, "max_digested_bytes", 0)
    path = tmp_path / "p" / "train.parquet"

    def described(pixels, time, cache):
        rows = {"image": [{"bytes": as_png(pixels), "path": None}]}
        datasets.Dataset.from_dict(rows, features=datasets.Features(image=datasets.Image())).to_parquet(path)
        os.utime(path, ns=(0, time))
        return open_source(f"hfds/{path.parent}", data_dir=tmp_path / cache).description

    path.parent.mkdir()
    first = described(IMAGES[0], 1_000_000_000, "a")
    assert described(IMAGES[0], 1_000_000_000, "b") == first
    assert described(np.rot90(IMAGES[0], 2), 2_000_000_000, "a") != first


def test_a_file_that_is_only_touched_is_still_read_where_contents_are_digested(folder):
    source = open_source(folder)
    _ = source.description
    path = folder / "a" / "00.png"
    overwrite(path, path.read_bytes())
    assert source.image(0).size == (8, 8)


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
    reader, real = type(source.reader), type(source.reader).read
    monkeypatch.setattr(reader, "read", lambda self, number, where: read.append(number) or real(self, number, where))
    first = source.take(np.arange(10)).description
    assert len(read) == 10
    _ = source.description
    assert len(read) == 40
    assert source.take(np.arange(10)).description == first
    assert len(read) == 40


def test_a_source_pickles_with_what_it_was_found_to_be(folder):
    source = open_source(folder)
    description = source.description
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(np.asarray(copy.image(3)), np.asarray(source.image(3)))
    shutil.rmtree(folder)
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
        (np.zeros(40), "labels of type float"),
    ):
        with raises_with(message):
            open_source((images, labels))
    for wrong in (images, 3):
        with raises_with("'digits' and a tuple (images, labels)"):
            open_source(wrong)
    with raises_with("data: list[0] is of type ndarray; accepted are (image, label)"):
        open_source([images, None])
    with raises_with("a tuple of 3"):
        open_source((images, None, None))
