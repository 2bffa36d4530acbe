import io
import multiprocessing
import os
import pickle
import tarfile

import numpy as np
import pytest
from conftest import as_png, raises_with
from hypothesis import given, settings
from hypothesis import strategies as st

from h2t_store.errors import DataError
from h2t_store.images import open_source


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def write_tar(path, files: dict[str, bytes], **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files.items():
            add(archive, name, content)
    return path


@pytest.fixture
def files(images) -> dict[str, bytes]:
    """12 images in three classes, in no order."""
    order = np.random.default_rng(3).permutation(12)
    return {f"{'cab'[i % 3]}/{i:02d}.png": as_png(images[i]) for i in order}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_read_as_the_folder_it_was_made_from(tmp_path, files, images, form):
    path = write_tar(tmp_path / "x.tar", files, format=form)
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    source, unpacked = open_source(path), open_source(tmp_path / "unpacked")
    assert list(source.sample_ids) == list(unpacked.sample_ids) == sorted(files)
    assert source.classes == unpacked.classes == ("a", "b", "c")
    np.testing.assert_array_equal(source.y, unpacked.y)
    for row, name in enumerate(source.sample_ids):
        assert source.read(row) == files[name]
        np.testing.assert_array_equal(np.asarray(source.image(row)), images[int(name[2:4])])
    assert source.notes == []
    assert source.description["contents_sha256"] == unpacked.description["contents_sha256"]


def test_the_order_of_members_does_not_matter(tmp_path, files):
    one = write_tar(tmp_path / "one.tar", files)
    other = write_tar(tmp_path / "other.tar", dict(reversed(files.items())))
    assert open_source(one).description == open_source(other).description


def test_what_a_tar_holds_beside_images_is_counted_and_named(tmp_path, files):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in ("a", "empty", "full", "full/of nothing"):
            add(archive, name, type=tarfile.DIRTYPE)
        for name, content in files.items():
            add(archive, name, content)
        add(archive, "a/notes.txt", b"hello")
        add(archive, "a/._00.png", b"x")
        add(archive, "a/link.png", type=tarfile.SYMTYPE, linkname="00.png")
        add(archive, "a/hard.png", type=tarfile.LNKTYPE, linkname="c/00.png")
        add(archive, "a/pipe.png", type=tarfile.FIFOTYPE)
        add(archive, "a/device.png", type=tarfile.CHRTYPE)
        first = next(iter(files))
        add(archive, first, b"replaced")
    source = open_source(path)
    assert list(source.sample_ids) == sorted(files)
    assert source.read(list(source.sample_ids).index(first)) == b"replaced"
    assert source.notes == [
        "1 files are not images and were left out: a/notes.txt",
        "2 folders hold no images: empty, full/of nothing",
        "1 hidden files were left out: a/._00.png",
        "4 links, devices and sparse files were left out: a/device.png, a/hard.png, a/link.png, …",
        f"1 files were left out, as the tar holds later ones of the same name: {first}",
    ]


def test_sparse_members_are_left_out(tmp_path, files):
    path = write_tar(tmp_path / "x.tar", files, format=tarfile.PAX_FORMAT)
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as archive:
        sparse = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,4", "GNU.sparse.size": "9"}
        add(archive, "a/sparse.png", b"abcd", pax_headers=sparse)
    source = open_source(path)
    assert len(source) == 12
    assert source.notes == ["1 links, devices and sparse files were left out: a/sparse.png"]


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["x/left/1.png", "y/left/1.png"], ("x/left", "y/left")),
        (["train/cat/1.png", "train/dog/1.png"], ("cat", "dog")),
        (["./train/cat/1.png", "./train/cat/2.png"], ("cat",)),
        (["train/cat/1.png", "train/cat/small/2.png"], ("cat", "cat/small")),
        (["/data/cat/1.png", "/data/dog/2.png"], ("cat", "dog")),
        (["../../cat/1.png", "../../dog/2.png"], ("cat", "dog")),
        (["cat/../dog/1.png", "ä b/日/2.png"], ("cat/../dog", "ä b/日")),
        (["images/1.png", "images/2.png"], ("images",)),
        (["1.png", "2.png"], ()),
    ],
)
def test_classes_are_folders_below_what_all_share(tmp_path, images, names, classes):
    source = open_source(write_tar(tmp_path / "x.tar", {name: as_png(images[i]) for i, name in enumerate(names)}))
    assert source.classes == classes
    assert list(source.sample_ids) == sorted(name.removeprefix("./") for name in names)
    assert source.image(1).size == (8, 8)
    assert sorted(os.listdir(tmp_path)) == ["x.tar"]


def test_names_that_are_not_utf8_are_one_clear_error(tmp_path, files):
    path = write_tar(tmp_path / "x.tar", {**files, "a/gr\xf6.png": b""}, format=tarfile.GNU_FORMAT, encoding="latin-1")
    with raises_with("is not UTF-8: rename it"):
        open_source(path)
    path = write_tar(tmp_path / "y.tar", {**files, "a/gr\xf6.txt": b""}, format=tarfile.GNU_FORMAT, encoding="latin-1")
    (note,) = open_source(path).notes
    assert note == "1 files are not images and were left out: 'a/gr\\udcf6.txt'"
    note.encode()


def test_a_tar_that_is_cut_off_anywhere_is_an_error(tmp_path, files):
    content = write_tar(tmp_path / "x.tar", files).read_bytes()
    end = len(content.rstrip(b"\0"))
    for size in [*range(1, end, 97), *range(512, end, 512), end]:
        (tmp_path / "cut.tar").write_bytes(content[:size])
        with pytest.raises(DataError, match="cut") as caught:
            open_source(tmp_path / "cut.tar")
        assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10_000), change=st.integers(1, 255))
def test_a_damaged_tar_is_an_error_or_all_there(place, change, tmp_path_factory):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    path = write_tar(tmp_path_factory.mktemp("x") / "x.tar", {f"a/{i}.png": as_png(images[i]) for i in range(3)})
    content = bytearray(path.read_bytes())
    content[place % len(content.rstrip(b"\0"))] ^= change
    path.write_bytes(content)
    try:
        source = open_source(path)
    except DataError as caught:
        message = str(caught)
    else:
        message = ""
        assert len(source) + sum(int(note.split()[0]) for note in source.notes if "class folders" not in note) == 3
    assert "\n" not in message


def test_tars_written_one_after_the_other_are_not_read_in_part(tmp_path, files):
    path = write_tar(tmp_path / "x.tar", files)
    path.write_bytes(path.read_bytes() * 2)
    with raises_with("but more follows"):
        open_source(path)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_one_clear_error(tmp_path, files, kind):
    for name in (f"x.tar.{kind}", "x.tar"):
        with tarfile.open(tmp_path / name, f"w:{kind}") as archive:
            for member, content in files.items():
                add(archive, member, content)
        with raises_with("is compressed ("):
            open_source(tmp_path / name)


def test_a_tar_is_known_by_its_content_too(tmp_path, files):
    assert len(open_source(write_tar(tmp_path / "images", files))) == 12
    (tmp_path / "x.tar").write_text("no tar")
    with raises_with(f"data '{tmp_path / 'x.tar'}'"):
        open_source(tmp_path / "x.tar")
    with raises_with("holds no images"):
        open_source(write_tar(tmp_path / "y.tar", {"a.txt": b""}))
    with raises_with("holds class folders and 1 images beside them"):
        open_source(write_tar(tmp_path / "z.tar", {**files, "loose.png": b""}))


def test_a_tar_that_changes_after_it_was_opened_is_not_read(tmp_path, files):
    path = write_tar(tmp_path / "x.tar", files)
    source = open_source(path)
    write_tar(path, {**files, "a/new.png": b""})
    with raises_with("it has changed since it was opened"):
        source.image(0)
    path.unlink()
    with raises_with("No such file"):
        source.image(0)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_a_tar_at_once(tmp_path, files, method):
    source = open_source(write_tar(tmp_path / "x.tar", files))
    source.image(0)  # a handle is open
    with multiprocessing.get_context(method).Pool(2) as pool:
        got = pool.map(source.read, range(6), chunksize=1)
    assert got == [files[source.sample_ids[row]] for row in range(6)]


def test_a_tar_pickles_as_its_address_and_index(tmp_path, images):
    files = {f"a/{i}.png": as_png(images[i % 40]) * 20 for i in range(200)}
    source = open_source(write_tar(tmp_path / "x.tar", files))
    pickled = pickle.dumps(source)
    assert len(pickled) < 100 * len(files)
    assert pickle.loads(pickled).take(np.array([7, 3])).read(0) == source.read(7)
