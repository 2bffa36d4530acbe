import io
import json

import numpy as np
import pytest
from conftest import raises_with
from PIL import Image
from test_images_tar import as_png, write_tar

from h2t_store.images import arrange, open_source


@pytest.fixture
def shards(tmp_path, images):
    """Two shards of five samples, with labels as classes and, shifted by ten, in JSON."""
    root = tmp_path / "shards"
    root.mkdir()
    for shard in range(2):
        files = {}
        for i in range(5 * shard, 5 * shard + 5):
            files[f"{i:04d}.png"] = as_png(images[i])
            files[f"{i:04d}.cls"] = b"%d\n" % (i % 4)
            files[f"{i:04d}.json"] = json.dumps({"fine": i % 4 + 10 if i else -1}).encode()
        write_tar(root / f"x-{shard:04d}.tar", files)
    return root


SPLIT = "x-{0000..0001}.tar|10"


def test_samples_of_shards_are_rows(shards, images):
    source = open_source(f"wds/{shards}", SPLIT)
    assert list(source.sample_ids) == [f"x-{i // 5:04d}.tar/{i:04d}.png" for i in range(10)]
    assert source.y.tolist() == [i % 4 for i in range(10)]
    assert source.classes == (0, 1, 2, 3)
    for row in (9, 0, 5, 4):
        np.testing.assert_array_equal(np.asarray(source.image(row)), images[row])
    assert len(source.notes) == 1
    assert "10 files are neither image nor label and were left out: x-0000.tar/0000.json" in source.notes[0]
    relative = open_source(f"wds/{shards.name}", SPLIT, data_dir=shards.parent)
    assert relative.description == source.description
    first = open_source(f"wds/{shards}", "x-0000.tar")
    assert arrange(source, first.sample_ids, first.classes).take(np.arange(5)).description == first.description


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("x-{0000..0001}.tar|11", "11 samples are expected, but the shards hold 10"),
        ("x-{0000..0002}.tar|11", "1 of 3 shards are not in"),
        ("x-{0001..0000}.tar", "{0001..0000} names no shards"),
        ("x-{0000..9999999}.tar", "names no shards, or more than"),
        ("x-0000.tar|many", "'many' is not a number of samples"),
        (None, "split 'train'"),
        ("pipe:touch /tmp/never.tar", "1 of 1 shards are not in"),
    ],
)
def test_shards_that_are_not_as_said_are_one_line(shards, split, message):
    with raises_with(message):
        open_source(f"wds/{shards}", split)


def test_braces_are_expanded_as_in_a_shell(shards):
    assert len(open_source(f"wds/{shards}", "x-000{0,1}.tar")) == 10
    assert len(open_source(f"wds/{shards}", "{x,x}-000{0..1}.tar|20")) == 20
    assert len(open_source(f"wds/{shards}", "x-0001.tar")) == 5


def test_splits_are_found_by_name_with_their_field_of_labels(shards):
    train = {"name": "train", "filenames": ["x-0000.tar"], "shard_lengths": [5], "num_samples": 5}
    fine = {**train, "name": "fine", "alt_label": "fine"}
    (shards / "_info.json").write_text(json.dumps({"splits": {"train": train, "fine": fine}}))
    assert open_source(f"wds/{shards}").y.tolist() == [0, 1, 2, 3, 0]
    source = open_source(f"wds/{shards}", "fine")
    assert source.y.tolist() == [11, 12, 13, 10]
    assert "1 samples with negative labels were left out: x-0000.tar/0000.png" in source.notes
    with raises_with("(did you mean 'train'?); _info.json has train, fine"):
        open_source(f"wds/{shards}", "trian")
    (shards / "_info.json").write_text(json.dumps({"splits": {"train": {**train, "num_samples": 6}}}))
    with raises_with("6 samples are expected, but the shards hold 5"):
        open_source(f"wds/{shards}")
    (shards / "_info.json").write_text("{}")
    with raises_with("_info.json: not a description of splits"):
        open_source(f"wds/{shards}")


def one_shard(tmp_path, files: dict[str, bytes]):
    write_tar(tmp_path / "s.tar", files)
    return open_source(f"wds/{tmp_path}", "s.tar")


def test_files_of_a_sample_need_not_follow_each_other(tmp_path, images):
    image = as_png(images[0])
    source = one_shard(tmp_path, {"b.cls": b"dog", "a.x.jpg": b"mask", "a.PNG": image, "b.png": image, "a.cls": b"cat"})
    assert list(source.sample_ids) == ["s.tar/a.png", "s.tar/b.png"]
    assert [source.classes[i] for i in source.y] == ["cat", "dog"]
    assert source.notes == ["1 files are neither image nor label and were left out: s.tar/a.x.jpg"]


def test_of_several_images_the_one_that_timm_takes_is_read(tmp_path, images):
    file = io.BytesIO()
    Image.fromarray(images[1]).save(file, "BMP")
    source = one_shard(tmp_path, {"a.bmp": file.getvalue(), "a.webp": b"", "a.png": as_png(images[0])})
    np.testing.assert_array_equal(np.asarray(source.image(0)), images[0])
    assert source.classes == ()
    assert source.notes == [
        "2 files are neither image nor label and were left out: s.tar/a.bmp, s.tar/a.webp",
        "1 images without labels",
    ]


def test_labels_that_are_missing_or_no_text_are_named(tmp_path, images):
    image = as_png(images[0])
    with raises_with("1 of 2 samples have no label: s.tar/b.png"):
        one_shard(tmp_path, {"a.png": image, "a.cls": b"1", "b.png": image})
    with raises_with("s.tar/a.png: its label cannot be read; accepted is a .cls in UTF-8"):
        one_shard(tmp_path, {"a.png": image, "a.cls": b"\xff"})
    with raises_with("s.tar/a.png: its .cls is empty"):
        one_shard(tmp_path, {"a.png": image, "a.cls": b" "})
    with raises_with("1 shards hold no images"):
        one_shard(tmp_path, {"a.cls": b"1"})
    with raises_with("there is no such folder"):
        open_source("wds/nowhere", "s.tar")


def test_shards_whose_labels_are_all_negative_hold_nothing_to_read(tmp_path, images):
    write_tar(tmp_path / "x.tar", {"a.png": as_png(images[0]), "a.json": b'{"fine": -1}'})
    split = {"filenames": ["x.tar"], "num_samples": 1, "alt_label": "fine"}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    with raises_with("1 shards hold no images; 1 with negative labels are left out"):
        open_source(f"wds/{tmp_path}")


@pytest.mark.parametrize("filenames", ["x.tar", [3], None])
def test_a_description_whose_filenames_are_no_list_of_names_is_one_line(shards, filenames):
    train = {"filenames": filenames, "num_samples": 5}
    (shards / "_info.json").write_text(json.dumps({"splits": {"train": train}}))
    with raises_with("filenames of 'train': accepted is a list of names"):
        open_source(f"wds/{shards}")
