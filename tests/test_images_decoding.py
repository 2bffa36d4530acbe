import io
import struct
import warnings
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import raises_with
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, features

from h2t_store.errors import DataError
from h2t_store.images import open_source
from h2t_store.images.pictures import decode


def image_of(content: bytes, name: str = "x") -> Image.Image:
    return decode(content, name).image


PIXELS = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG written by hand, as PIL cannot write 16 bits of colour; ``chunks`` stand before the pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, colour, 0, 0, 0])
    before = b"".join(chunk(kind.encode(), content) for kind, content in chunks.items())
    pixels = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels


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
    image = image_of(encoded(Image.new(mode, (1, 1), value), form))
    assert image.mode == "RGB"
    assert image.size == (1, 1)
    assert image.getpixel((0, 0)) == expected


def test_sixteen_bits_are_cut_to_their_upper_eight():
    grey = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    for form in ("PNG", "TIFF", "PPM"):
        got = np.asarray(image_of(encoded(Image.fromarray(grey), form)))
        np.testing.assert_array_equal(got[0, :, 0], [0, 0, 1, 255])
    row = b"\0" + np.array([[0, 256, 65535], [511, 512, 513]], dtype=">u2").tobytes()
    np.testing.assert_array_equal(np.asarray(image_of(png(2, 1, 16, 2, row))), [[[0, 1, 255], [1, 2, 2]]])
    row = b"\0" + np.array([40_000, 0], dtype=">u2").tobytes()
    np.testing.assert_array_equal(np.asarray(image_of(png(1, 1, 16, 4, row))), [[[156] * 3]])


@pytest.mark.parametrize(
    "values", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32), np.full((4, 4), 200, np.int32)]
)
def test_pixels_of_more_than_16_bits_are_refused(values):
    with raises_with("accepted are unsigned 8 and 16 bits per channel"):
        image_of(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_is_read_as_pil_converts_it(form):
    cmyk = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 4), dtype=np.uint8), "CMYK")
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    got = np.asarray(image_of(encoded(cmyk, form, **options))).astype(int)
    assert np.abs(got - np.asarray(cmyk.convert("RGB")).astype(int)).max() <= (6 if form == "JPEG" else 0)


def test_colours_under_transparency_are_kept():
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), "P")
    image.putpalette([i // 3 for i in range(768)])
    got = np.asarray(image_of(encoded(image, "PNG", transparency=3)))
    np.testing.assert_array_equal(got[..., 0], np.arange(16).reshape(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_of(encoded(image, "PNG", transparency=bytes(range(16))))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG", "MPO"])
def test_of_several_frames_the_first_is_read(form):
    frames = [Image.new("RGB", (8, 8), (value,) * 3) for value in (250, 10)]
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert abs(np.asarray(image_of(content)).astype(int) - 250).max() <= 2
    remark = "have several frames or pages: the first is read"
    assert remarks_on(content) == ([] if form == "MPO" else [remark])  # the second of phones is a preview or a gain map
    assert remarks_on(encoded(frames[0], form)) == []


def remarks_on(content: bytes) -> list[str]:
    return decode(content, "x").remarks


def exif_of(orientation: int, kind: int = 3, order: str = "<") -> bytes:
    """EXIF with one tag, the orientation, as a number of the TIFF type ``kind``."""
    value = struct.pack(order + {1: "Bxxx", 3: "Hxx", 4: "I"}[kind], orientation)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return b"Exif\0\0" + head + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + value + b"\0\0\0\0"


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(form, orientation):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {"quality": 100} if form in ("JPEG", "AVIF") else {}
    smooth = Image.fromarray(PIXELS).resize((40, 24), Image.Resampling.BICUBIC)
    content = encoded(smooth, form, exif=exif, **options)
    with Image.open(io.BytesIO(content)) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    picture = decode(content, "x")
    assert picture.image.size == ((24, 40) if orientation >= 5 else (40, 24))
    assert picture.remarks == []
    np.testing.assert_array_equal(np.asarray(picture.image), np.asarray(expected))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize("prefixed", [True, False])
def test_orientation_is_read_in_both_byte_orders_and_every_type_of_whole_number(order, kind, prefixed):
    exif = exif_of(6, kind, order)
    content = encoded(Image.fromarray(PIXELS), "PNG", exif=exif if prefixed else exif[6:])
    np.testing.assert_array_equal(np.asarray(image_of(content)), np.rot90(PIXELS, -1))
    assert remarks_on(content) == []


def test_orientation_is_read_behind_a_damaged_tag():
    """PIL gives up on all tags at the first that is damaged."""
    tags = struct.pack("<HHII", 0x010F, 2, 100, 9999) + struct.pack("<HHIHxx", 0x0112, 3, 1, 6)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + b"\0\0\0\0"
    assert image_of(encoded(Image.fromarray(PIXELS), "JPEG", exif=exif)).size == (24, 31)


def test_orientation_in_xmp_is_read():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    content = encoded(Image.fromarray(PIXELS), "JPEG", xmp=xmp)
    with Image.open(io.BytesIO(content)) as stored:
        assert image_of(content).size == ImageOps.exif_transpose(stored).size == (24, 31)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0no TIFF at all",
        b"Exif\0\0II*\0",
        exif_of(6)[:-10],
        exif_of(6).replace(b"\x08\0\0\0", b"\xff\xff\0\0"),
        exif_of(9),
        exif_of(6).replace(struct.pack("<HHI", 0x0112, 3, 1), struct.pack("<HHI", 0x0112, 2, 1)),
    ],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_that_cannot_be_read_is_said_and_the_picture_taken_as_stored(exif, form):
    content = encoded(Image.fromarray(PIXELS), form, exif=exif)
    assert image_of(content).size == (31, 24)
    assert remarks_on(content) == [
        "have an EXIF orientation that cannot be read: taken as stored, which may be sideways"
    ]


def tiff(pixels: bytes, width: int, bits: Sequence[int], photometric: int, order: str = "<", **others) -> bytes:
    """A TIFF of one row written by hand; ``others`` are more tags, as ``t339=(2,)``."""
    tags = {256: (width,), 257: (1,), 258: tuple(bits), 259: (1,), 262: (photometric,), 277: (len(bits),), 278: (1,)}
    tags |= {int(tag[1:]): value for tag, value in others.items()}
    stored = zlib.compress(pixels) if tags[259] == (8,) else pixels
    tags |= {273: (0,), 279: (len(stored),)}
    after = 8 + 2 + 12 * len(tags) + 4
    values = {}
    for tag, value in tags.items():
        text = isinstance(value, bytes)
        values[tag] = (2 if text else 4, len(value), value if text else struct.pack(f"{order}{len(value)}I", *value))
    size = sum(len(value) for _, _, value in values.values() if len(value) > 4)
    values[273] = (4, 1, struct.pack(order + "I", after + size))
    entries, rest = b"", b""
    for tag, (kind, n, value) in sorted(values.items()):
        place = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(order + "I", after + len(rest))
        rest += value if len(value) > 4 else b""
        entries += struct.pack(order + "HHI", tag, kind, n) + place
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags))
    return head + entries + b"\0\0\0\0" + rest + stored


def packed(values: Sequence[int], bits: int, order: str = "<") -> bytes:
    """Values of so many bits one after the other; those of 16 in the byte order."""
    if bits == 16:
        return np.array(values, dtype=order + "u2").tobytes()
    text = "".join(f"{value:0{bits}b}" for value in values)
    return bytes(int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8))


@pytest.mark.parametrize("orientation", [9, 0x10001])
def test_so_is_that_of_a_tiff(orientation):
    content = tiff(b"\1\2", 2, [8], 1, t274=(orientation,))
    assert np.asarray(image_of(content))[0, :, 0].tolist() == [1, 2]
    assert remarks_on(content)[0].startswith("have an EXIF orientation that cannot be read")
    assert image_of(tiff(b"\1\2", 2, [8], 1, t274=(6,))).size == (1, 2)


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [1, 4, 8, 12, 16])
def test_white_is_zero_in_every_depth(bits, photometric, order, compression):
    most = (1 << bits) - 1
    values = [0, most, most // 3, most]
    content = tiff(packed(values, bits, order), 4, [bits], photometric, order, t259=(compression,))
    grey = [0, 255, 85 if bits > 1 else 0, 255]
    expected = [255 - value for value in grey] if photometric == 0 else grey
    if (bits == 12 and (photometric == 0 or order == ">")) or (bits == 16 and photometric == 0 and order == ">"):
        with raises_with("x: a kind of TIFF that is not read, or damaged: convert it to PNG"):  # nor by PIL
            image_of(content)
    else:
        assert np.asarray(image_of(content))[0, :, 1].tolist() == expected
        assert remarks_on(content) == []


def grey_png(values: Sequence[int], **chunks: bytes) -> bytes:
    return png(len(values), 1, 16, 0, b"\0" + packed(values, 16, ">"), **chunks)


OME = b'<OME><Pixels SignificantBits="10"/></OME>\0'
GUESSED_12 = "are 16-bit grey without a value above 4095: taken for 12-bit (if that is wrong, convert to 8 bits)"
FAINT = "are 16-bit grey without a value above 16383, so dark (if they have fewer bits, convert to 8 bits)"
GUESSED_8 = "are 16-bit grey without a value above 255: taken for 8-bit (if that is wrong, convert to 8 bits)"


@pytest.mark.parametrize(
    ("content", "expected", "remarks"),
    [
        (tiff(packed([0, 4095, 2048], 16), 3, [16], 1, t281=(4095,)), [0, 255, 128], []),
        (tiff(packed([0, 1023, 512], 16), 3, [16], 1, t281=(1023,)), [0, 255, 128], []),
        (tiff(packed([0, 4095, 2048], 16), 3, [16], 0, t281=(4095,)), [255, 0, 127], []),
        (tiff(packed([0, 1023, 512], 16), 3, [16], 1, t270=OME), [0, 255, 128], []),
        (tiff(packed([0, 256, 4095], 16), 3, [16], 1, t281=(65535,)), [0, 1, 15], []),
        (tiff(packed([0, 4096, 300], 16), 3, [16], 1, t281=(4095,)), [0, 16, 1], []),
        (grey_png([0, 4095, 2048], sBIT=b"\x0c"), [0, 255, 128], []),
        (grey_png([0, 4080, 2048], sBIT=b"\x0c"), [0, 15, 8], []),
        (grey_png([0, 65520, 2048], sBIT=b"\x0c"), [0, 255, 8], []),
        (grey_png([0, 4095, 2048]), [0, 255, 128], [GUESSED_12]),
        (tiff(packed([0, 4095, 2048], 16, ">"), 3, [16], 1, ">"), [0, 255, 128], [GUESSED_12]),
        (tiff(packed([0, 4095, 2048], 16), 3, [16], 0), [255, 0, 127], [GUESSED_12]),
        (grey_png([0, 255, 128]), [0, 255, 128], [GUESSED_8]),
        (grey_png([0, 16383, 8192]), [0, 63, 32], [FAINT]),
        (grey_png([0, 4096, 255]), [0, 16, 0], [FAINT]),
        (grey_png([0, 0, 0]), [0, 0, 0], []),
        (b"P5 3 1 4095 " + packed([0, 4095, 2048], 16, ">"), [0, 255, 128], []),
        (b"P5 3 1 4095 " + packed([0, 100, 50], 16, ">"), [0, 6, 3], []),
        (b"P5 3 1 1023 " + packed([0, 1023, 512], 16, ">"), [0, 255, 128], []),
        (b"P2 3 1 4095 0 4095 2048 ", [0, 255, 128], []),
        (b"P5 3 1 65535 " + packed([0, 4095, 2048], 16, ">"), [0, 255, 128], [GUESSED_12]),
        (b"P2 3 1 65535 0 4095 2048 ", [0, 255, 128], [GUESSED_12]),
    ],
)
def test_grey_of_more_than_eight_bits_is_scaled_by_its_range_or_the_guess_is_said(content, expected, remarks):
    picture = decode(content, "x")
    assert np.asarray(picture.image)[0, :, 0].tolist() == expected
    assert picture.remarks == remarks


def test_the_range_of_16_bits_of_jpeg2000_is_guessed_too():
    content = encoded(Image.fromarray(np.array([[0, 256, 4000]], dtype=np.uint16)), "JPEG2000")
    assert np.asarray(image_of(content))[0, :, 0].tolist() == [0, 16, 250]
    assert remarks_on(content) == [GUESSED_12]


def test_colour_of_12_bits_in_16_is_refused_where_it_is_declared_and_named_where_not():
    rgb = packed([4095, 100, 0], 16)
    with raises_with("x: 12-bit colour in 16 bits; accepted are unsigned 8 and 16 bits per channel"):
        image_of(tiff(rgb, 1, [16] * 3, 2, t281=(4095, 4095, 4095)))
    for content in (tiff(rgb, 1, [16] * 3, 2), png(1, 1, 16, 2, b"\0" + packed([4095, 100, 0], 16, ">"))):
        assert remarks_on(content) == [
            "are 16-bit colour without a value above 4095, so nearly black: convert to 8 bits"
        ]
    assert remarks_on(tiff(packed([4096, 100, 0], 16), 1, [16] * 3, 2)) == []
    assert remarks_on(encoded(Image.new("RGB", (1, 1)), "PNG")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiff(b"\x80\xff\0\x7f", 4, [8], 1, t339=(2,)), "signed pixels"),
        (tiff(packed([1, 2, 3, 4], 16), 4, [16], 1, t339=(2,)), "signed pixels or more than 16 bits"),
        (tiff(packed([256, 512, 768], 16), 1, [16] * 3, 2, t284=(2,)), "16 bits of colour in planes"),
        (tiff(b"\1\2\3", 1, [8] * 3, 2, t254=(1,)), "a preview comes first, as in camera raw"),
        (tiff(b"\1\2\3", 1, [8] * 3, 2, t50706=(1,)), "a preview comes first, as in camera raw"),
    ],
)
def test_tiffs_of_which_pil_makes_other_pixels_are_refused(content, message):
    with raises_with(f"x: {message}"):
        image_of(content)


TRANSPARENT = "are transparent in part: transparency is dropped and the colours under it are used, as in timm"


@pytest.mark.parametrize(
    ("mode", "colour", "form"),
    [
        ("RGBA", (10, 20, 30, 0), "PNG"),
        ("RGBA", (10, 20, 30, 254), "PNG"),
        ("RGBA", (10, 20, 30, 128), "TIFF"),
        ("LA", (10, 100), "PNG"),
        ("RGBA", (10, 20, 30, 1), "WEBP"),
    ],
)
def test_transparency_is_dropped_with_a_remark(mode, colour, form):
    options = {"exact": True, "lossless": True} if form == "WEBP" else {}
    content = encoded(Image.new(mode, (2, 2), colour), form, **options)
    assert image_of(content).getpixel((0, 0)) == (colour[:3] if mode == "RGBA" else colour[:1] * 3)
    assert remarks_on(content) == [TRANSPARENT]
    assert remarks_on(encoded(Image.new(mode, (2, 2), (*colour[:-1], 255)), form)) == []


def test_one_transparent_colour_is_a_remark_where_it_occurs():
    for form, image in (("PNG", Image.new("RGB", (2, 2), (1, 2, 3))), ("PNG", Image.new("L", (2, 2), 7))):
        key = image.getpixel((0, 0))
        other = (9, 9, 9) if image.mode == "RGB" else 9
        assert remarks_on(encoded(image, form, transparency=key)) == [TRANSPARENT]
        assert remarks_on(encoded(image, form, transparency=other)) == []
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    for form in ("PNG", "GIF"):
        content = encoded(palette, form, transparency=1)
        assert image_of(content).getpixel((0, 0)) == (200, 100, 50)
        assert remarks_on(content) == [TRANSPARENT]
    assert remarks_on(grey_png([5000, 40_000], tRNS=b"\x9c\x40")) == [TRANSPARENT]
    assert remarks_on(grey_png([5000, 40_001], tRNS=b"\x9c\x40")) == []
    assert remarks_on(png(4, 1, 2, 0, b"\0\x80", tRNS=b"\0\2")) == [TRANSPARENT]
    assert remarks_on(png(1, 1, 16, 2, b"\0" + b"\x10\0" * 3, tRNS=b"\x10\0" * 3)) == [TRANSPARENT]


def boxes(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand + b"\0" * 100


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (boxes(b"heic"), "IMG_1.jpg", "HEIC is not read: convert to JPEG"),
        (boxes(b"mif1"), "IMG_1.heif", "HEIC is not read"),
        (b"\0" * 128 + b"DICM" + b"\0" * 50, "scan.png", "DICOM is not read: convert to PNG"),
        (b"\0" * 300, "scan.dcm", "DICOM is not read"),
        (boxes(b"crx "), "x.jpg", "camera raw is not read: develop to JPEG or TIFF"),
        (b"FUJIFILMCCD-RAW 0201", "x.jpg", "camera raw is not read"),
        (b"\xff\x0a" + b"\0" * 20, "x.png", "JPEG XL is not read"),
        (tiff(b"\1\2\3", 1, [8] * 3, 2), "DSC_1.NEF", "camera raw is not read"),
        (tiff(b"\1\2\3", 1, [8] * 3, 2), "photo.tar: a/b.dng", "camera raw is not read"),
    ],
)
def test_formats_that_are_not_read_come_with_advice(content, name, message):
    with raises_with(f"{name}: {message}"):
        image_of(content, name)


def test_files_in_such_formats_are_named_in_notes(folder):
    for name in ("a/x.heic", "a/y.HEIC", "b/z.dcm", "b/w.CR2", "b/notes.txt"):
        (folder / name).write_bytes(b"x")
    notes = open_source(folder).notes
    assert len(notes) == 4
    assert "1 files were left out: DICOM is not read: convert to PNG (dcmj2pnm, or pydicom in Python): b/z.dcm" in notes
    assert any(note.startswith("2 files were left out: HEIC is not read") for note in notes)
    assert any(note.startswith("1 files were left out: camera raw is not read") for note in notes)
    assert "1 files are not images and were left out: b/notes.txt" in notes


def test_a_folder_of_nothing_else_says_what_to_do(tmp_path):
    (tmp_path / "x.heic").write_bytes(b"x")
    with raises_with("holds no images; it holds 1 other files, such as 'x.heic': HEIC is not read: convert to JPEG"):
        open_source(tmp_path)
    (tmp_path / "list.txt").write_text("x.heic\n")
    with raises_with("x.heic: HEIC is not read"):
        open_source(tmp_path / "list.txt").image(0)


def test_images_of_pil_are_taken_as_if_read_from_files():
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = Image.open(io.BytesIO(encoded(Image.fromarray(PIXELS), "PNG", exif=exif)))
    clear = Image.fromarray(np.rot90(PIXELS, -1)).convert("RGBA")
    clear.putalpha(0)
    source = open_source(([sideways, clear], ["a", "b"]))
    for row in range(2):
        np.testing.assert_array_equal(np.asarray(source.image(row)), np.rot90(PIXELS, -1))
    assert [source.picture(row).remarks for row in range(2)] == [[], [TRANSPARENT]]
    sizes = open_source(([sideways, Image.new("RGB", (3, 3))], None))
    assert [sizes.image(row).size for row in range(2)] == [(24, 31), (3, 3)]


@pytest.mark.parametrize("content", [b"just text", b"", b"\xff\xd8\xff\xe0 and no more", b"GIF89a", b"\0" * 1000])
def test_what_is_no_image_is_named(content):
    with raises_with("some/name.png: "):
        image_of(content, "some/name.png")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "progressive"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_an_image_that_is_cut_off_is_right_or_an_error(form, data):
    options = {"progressive": True} if form == "progressive" else {}
    content = encoded(Image.fromarray(PIXELS), "JPEG" if options else form, **options)
    whole = np.asarray(image_of(content))
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    try:
        got = np.asarray(image_of(cut, "name"))
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
        assert image_of(bytes(content)).mode == "RGB"
    except DataError as caught:
        message = str(caught)
    else:
        message = ""
    assert "\n" not in message


@pytest.mark.parametrize("options", [{}, {"no_jp2": True}, {"tile_size": (16, 16)}])
def test_a_jpeg2000_that_is_cut_off_anywhere_is_an_error(options):
    content = encoded(Image.fromarray(PIXELS), "JPEG2000", **options)
    assert image_of(content + b"\0" * 7).size == (31, 24)
    for size in [*range(0, len(content), 53), *range(100, 300, 7), len(content) - 1]:
        with raises_with("x: "):
            image_of(content[:size])


def test_cut_off_images_stay_errors_when_another_library_lets_them_pass(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with raises_with("LOAD_TRUNCATED_IMAGES is on"):
        image_of(encoded(Image.fromarray(PIXELS), "PNG"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pixels", [744, 743, 100])
def test_images_beyond_pils_limit_are_one_line(monkeypatch, pixels):
    content = encoded(Image.fromarray(PIXELS), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    if pixels == 744:
        assert image_of(content).size == (31, 24)
    else:
        with pytest.raises(DataError, match=r"^x: .*bomb"):
            image_of(content)


def test_a_large_bomb_is_refused_before_it_is_unpacked():
    with raises_with("exceeds limit"):
        image_of(png(60_000, 60_000, 8, 0, b""))


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
        image_of(encoded(Image.new("RGB", (2002, 2)), "PNG"), "x.png")
    assert image_of(encoded(Image.new("RGB", (2, 2000)), "PNG"), "x.png").size == (2, 2000)
