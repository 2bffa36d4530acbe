import os

import numpy as np
import pytest
from conftest import raises_with
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from h2t_store.errors import DataError
from h2t_store.images import open_source


@pytest.fixture
def vtab(tmp_path, images):
    """A task of VTAB-1k: images in folders of splits, and lists beside them."""
    for i in range(12):
        path = tmp_path / "caltech" / "images" / ("test" if i >= 9 else "val" if i >= 6 else "train") / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path, quality=95)
    root = tmp_path / "caltech"
    lines = [f"images/{'val' if i >= 6 else 'train'}/{i:04d}.jpg {(5 * i) % 12}\n" for i in range(9)]
    (root / "train800val200.txt").write_text("".join(reversed(lines)))
    (root / "test.txt").write_text("".join(f"images/test/{i:04d}.jpg {i}\n" for i in range(9, 12)))
    return root


def test_vtab_is_read_as_it_comes(vtab, images):
    source = open_source(vtab / "train800val200.txt")
    assert list(source.sample_ids) == [f"images/{'val' if i >= 6 else 'train'}/{i:04d}.jpg" for i in range(8, -1, -1)]
    assert source.y.tolist() == [(5 * i) % 12 for i in range(8, -1, -1)]
    assert source.classes == tuple(range(12))
    assert source.notes == []
    with Image.open(vtab / "images" / "val" / "0008.jpg") as image:
        np.testing.assert_array_equal(np.asarray(source.image(0)), np.asarray(image))
    assert open_source(vtab / "test.txt").classes == source.classes


def test_paths_are_relative_to_the_list_or_to_what_is_said(vtab, tmp_path):
    moved = tmp_path / "elsewhere.lst"
    moved.write_text((vtab / "test.txt").read_text())
    with raises_with(f"{moved}, line 1: no file '{tmp_path}/images/test/0009.jpg' (nor do 2 more)"):
        open_source(moved)
    assert open_source(moved, data_dir=vtab).description == open_source(vtab / "test.txt").description
    absolute = tmp_path / "absolute"
    absolute.write_text(f"{vtab}/images/test/0009.jpg 3\ncaltech/../caltech/images/test/0010.jpg 0\n")
    source = open_source(absolute)
    assert list(source.sample_ids) == [f"{vtab}/images/test/0009.jpg", "caltech/../caltech/images/test/0010.jpg"]
    assert source.image(0).size == source.image(1).size == (8, 8)


def write(vtab, text: str, encoding: str = "utf-8"):
    path = vtab / "some.txt"
    path.write_bytes(text.encode(encoding))
    return path


def test_spaces_tabs_windows_lines_and_marks_are_read(vtab):
    for name in ("a b.jpg", "日本 語\u3000x.jpg"):
        os.link(vtab / "images" / "test" / "0009.jpg", vtab / name)
    lines = ["a b.jpg  cat", "日本 語\u3000x.jpg\tdog", "images/test/0010.jpg \t cat  "]
    source = open_source(write(vtab, "\r\n".join(["# made by hand", *lines, "", ""]), "utf-8-sig"))
    assert list(source.sample_ids) == ["a b.jpg", "日本 語\u3000x.jpg", "images/test/0010.jpg"]
    assert [source.classes[i] for i in source.y] == ["cat", "dog", "cat"]
    assert source.notes == [
        "1 blank lines were left out: line 5",
        "1 comments were left out: # made by hand",
    ]


def test_only_paths_are_unlabelled(vtab):
    os.link(vtab / "images" / "test" / "0009.jpg", vtab / "a b.JPG")
    source = open_source(write(vtab, "a b.JPG\nimages/test/0010.jpg"))
    assert source.y.tolist() == [-1, -1]
    assert source.classes == ()
    assert source.notes == ["2 images without labels"]


@pytest.mark.parametrize(
    ("labels", "y", "classes"),
    [
        (["2", "0", "-1"], [2, 0, -1], (0, 1, 2)),
        (["02", "0", "1"], [1, 0, 2], ("0", "02", "1")),
        (["n02", "n01", "n02"], [1, 0, 1], ("n01", "n02")),
        (["1", "x", "10"], [0, 2, 1], ("1", "10", "x")),
        (["1.0", "2.0", "1.0"], [0, 1, 0], ("1.0", "2.0")),
    ],
)
def test_labels_are_numbers_where_all_are(vtab, labels, y, classes):
    source = open_source(write(vtab, "".join(f"images/test/0009.jpg {label}\n" for label in labels)))
    assert source.y.tolist() == y
    assert source.classes == classes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images"),
        ("\n# nothing\n", "lists no images"),
        ("images/test/0009.jpg 3\n\nimages/test/0010.jpg\n", "some.txt, line 3: 'images/test/0010.jpg' has no label"),
        ("path,label\nimages/test/0009.jpg,3\n", "some.txt, line 1: 'path,label' has no label"),
        ("images/test/0009.jpg 3\nimages/test/nowhere.jpg 3\n", "some.txt, line 2: no file"),
        ("images/test 3\n", "some.txt, line 1: no file"),
        ("images/test/0009.jpg 3\n\0\n", "some.txt, line 2: not a text"),
        ("images/test/0009.jpg 1000000\n", "labels from 1000000 to 1000000"),
        ("images/test/0009.jpg 99999999999999999999\nimages/test/0009.jpg -3\n", None),
    ],
)
def test_lines_that_say_nothing_clear_are_named(vtab, text, message):
    if message is None:  # too long for a number: words
        assert open_source(write(vtab, text)).classes == ("-3", "99999999999999999999")
        return
    with raises_with(message):
        open_source(write(vtab, text))


def test_a_list_that_is_not_utf8_names_the_line(vtab):
    path = vtab / "some.txt"
    path.write_bytes("images/test/0009.jpg 3\ngr\xf6.jpg 3\n".encode("latin-1"))
    with raises_with("some.txt, line 2: not UTF-8"):
        open_source(path)
    path.write_text("images/test/0009.jpg 3\n", encoding="utf-16")
    with raises_with("some.txt, line 1: not UTF-8"):
        open_source(path)
    with raises_with("split 'train': a list file has no splits"):
        open_source(vtab / "test.txt", "train")
    with raises_with("download: a list file takes no such option"):
        open_source(vtab / "test.txt", download=True)


@settings(max_examples=60, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
def test_any_file_is_a_list_or_one_line(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("x") / "some"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
    assert "some" in str(caught.value)
