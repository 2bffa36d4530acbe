import io
import warnings
import zlib

import numpy as np
import pytest
from conftest import raises_with
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from h2t_store.datasets import open_source
from h2t_store.datasets.pictures import decode
from h2t_store.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand, as PIL cannot write 16 bits of colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, colour, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("mode", "value", "form", "expected"),
    [
        ("L", 200, "PNG", (200, 200, 200)),
        ("CMYK", (0, 0, 0, 0), "TIFF", (255, 255, 255)),
        ("RGBA", (1, 2, 3, 0), "PNG", (1, 2, 3)),
        ("LA", (9, 0), "PNG", (9, 9, 9)),
        ("P", 0, "PNG", (0, 0, 0)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("YCbCr", (255, 128, 128), "JPEG", (255, 255, 255)),
        ("RGB", (4, 5, 6), "BMP", (4, 5, 6)),
        ("RGB", (4, 5, 6), "PPM", (4, 5, 6)),
        ("RGB", (4, 5, 6), "TGA", (4, 5, 6)),
        ("RGB", (4, 5, 6), "ICO", (4, 5, 6)),
    ],
)
def test_every_mode_becomes_rgb(mode, value, form, expected):
    image = decode(encoded(Image.new(mode, (1, 1), value), form), "x")
    assert image.mode == "RGB"
    assert image.size == (1, 1)
    assert image.getpixel((0, 0)) == expected


def test_sixteen_bits_are_cut_to_their_upper_eight():
    grey = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    for form in ("PNG", "TIFF", "PPM"):
        got = np.asarray(decode(encoded(Image.fromarray(grey), form), "x"))
        np.testing.assert_array_equal(got[0, :, 0], [0, 0, 1, 255])
    row = b"\0" + np.array([[0, 256, 65535], [511, 512, 513]], dtype=">u2").tobytes()
    np.testing.assert_array_equal(np.asarray(decode(png(2, 1, 16, 2, row), "x")), [[[0, 1, 255], [1, 2, 2]]])
    row = b"\0" + np.array([40_000, 0], dtype=">u2").tobytes()
    np.testing.assert_array_equal(np.asarray(decode(png(1, 1, 16, 4, row), "x")), [[[156] * 3]])


@pytest.mark.parametrize(
    "values", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32), np.full((4, 4), 200, np.int32)]
)
def test_pixels_of_more_than_16_bits_are_refused(values):
    with raises_with("accepted are 8 and 16 bits per channel"):
        decode(encoded(Image.fromarray(values), "TIFF"), "x")


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_is_read_as_pil_converts_it(form):
    cmyk = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 4), dtype=np.uint8), "CMYK")
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    got = np.asarray(decode(encoded(cmyk, form, **options), "x")).astype(int)
    assert np.abs(got - np.asarray(cmyk.convert("RGB")).astype(int)).max() <= (6 if form == "JPEG" else 0)


def test_colours_under_transparency_are_kept():
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), "P")
    image.putpalette([i // 3 for i in range(768)])
    got = np.asarray(decode(encoded(image, "PNG", transparency=3), "x"))
    np.testing.assert_array_equal(got[..., 0], np.arange(16).reshape(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(encoded(image, "PNG", transparency=bytes(range(16))), "x")


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG", "MPO"])
def test_of_several_frames_the_first_is_read(form):
    frames = [Image.new("RGB", (8, 8), (value,) * 3) for value in (250, 10)]
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert abs(np.asarray(decode(content, "x")).astype(int) - 250).max() <= 2


def test_orientation_is_ignored_as_in_timm():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(Image.fromarray(PIXELS), "JPEG", exif=exif), "x").size == (31, 24)


@pytest.mark.parametrize("content", [b"just text", b"", b"\xff\xd8\xff\xe0 and no more", b"GIF89a", b"\0" * 1000])
def test_what_is_no_image_is_named(content):
    with raises_with("some/name.png: "):
        decode(content, "some/name.png")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "progressive"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_an_image_that_is_cut_off_is_right_or_an_error(form, data):
    options = {"progressive": True} if form == "progressive" else {}
    content = encoded(Image.fromarray(PIXELS), "JPEG" if options else form, **options)
    whole = np.asarray(decode(content, "x"))
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    try:
        got = np.asarray(decode(cut, "name"))
    except DataError as caught:
        message = str(caught)
    else:
        message = "name: "
        np.testing.assert_array_equal(got, whole)
    assert message.startswith("name: ")
    assert "\n" not in message


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]), st.integers(0, 10_000), st.integers(1, 255))
def test_a_damaged_image_is_never_another_kind_of_error(form, place, change):
    content = bytearray(encoded(Image.fromarray(PIXELS), form))
    content[place % len(content)] ^= change
    try:
        assert decode(bytes(content), "x").mode == "RGB"
    except DataError as caught:
        message = str(caught)
    else:
        message = ""
    assert "\n" not in message


@pytest.mark.parametrize("options", [{}, {"no_jp2": True}, {"tile_size": (16, 16)}])
def test_a_jpeg2000_that_is_cut_off_anywhere_is_an_error(options):
    content = encoded(Image.fromarray(PIXELS), "JPEG2000", **options)
    assert decode(content + b"\0" * 7, "x").size == (31, 24)
    for size in [*range(0, len(content), 53), *range(100, 300, 7), len(content) - 1]:
        with raises_with("x: "):
            decode(content[:size], "x")


def test_cut_off_images_stay_errors_when_another_library_lets_them_pass(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with raises_with("LOAD_TRUNCATED_IMAGES is on"):
        decode(encoded(Image.fromarray(PIXELS), "PNG"), "x")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pixels", [744, 743, 100])
def test_images_beyond_pils_limit_are_one_line(monkeypatch, pixels):
    content = encoded(Image.fromarray(PIXELS), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    if pixels == 744:
        assert decode(content, "x").size == (31, 24)
    else:
        with pytest.raises(DataError, match=r"^x: .*bomb"):
            decode(content, "x")


def test_a_large_bomb_is_refused_before_it_is_unpacked():
    with raises_with("exceeds limit"):
        decode(png(60_000, 60_000, 8, 0, b""), "x")


def test_the_content_and_not_the_extension_decides(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded(Image.fromarray(PIXELS), "PNG"))
    np.testing.assert_array_equal(np.asarray(open_source(tmp_path).image(0)), PIXELS)


def test_postscript_under_another_name_is_never_run(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **options: ran.append(given))
    (tmp_path / "x.jpg").write_bytes(encoded(Image.fromarray(PIXELS), "EPS"))
    with raises_with("not an image"):
        open_source(tmp_path).image(0)
    assert not ran


@pytest.mark.parametrize("content", [b"", b"text"])
def test_a_file_that_is_no_image_is_named_with_its_folder(folder, content):
    (folder / "b" / "05.png").write_bytes(content)
    source = open_source(folder)
    with raises_with(str(folder / "b" / "05.png")):
        source.image(list(source.sample_ids).index("b/05.png"))


def test_an_image_that_would_fill_the_memory_when_scaled_is_refused():
    with raises_with("2002 x 2 pixels is too long"):
        decode(encoded(Image.new("RGB", (2002, 2)), "PNG"), "x.png")
    assert decode(encoded(Image.new("RGB", (2, 2000)), "PNG"), "x.png").size == (2, 2000)
