"""What PIL does not say of a JPEG 2000: whether it is whole, and its bits per channel (ISO/IEC 15444-1)."""

__all__ = ["precision", "require_end"]

_PRECISION_AT = 42  # of the first component, in the segment SIZ that follows the start of the codestream


def require_end(content: bytes) -> None:
    """Raise `ValueError` where it is cut off: PIL decodes what is there and leaves the rest black."""
    if not _codestream(content).rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError("image file is truncated")


def precision(content: bytes) -> int:
    """Bits per channel, which PIL scales to 8 or 16."""
    return (_codestream(content)[_PRECISION_AT] & 0x7F) + 1


def _codestream(content: bytes) -> bytes:
    """What is in the box ``jp2c``, or everything where there are no boxes (annex I)."""
    if not content.startswith(b"\0\0\0\x0cjP"):
        return content
    start = 0
    while start < len(content):
        size, kind, header = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8], 8
        if size == 1:
            size, header = int.from_bytes(content[start + 8 : start + 16], "big"), 16
        end = start + max(size, header) if size else len(content)
        if kind == b"jp2c":
            return content[start + header : end]
        start = end
    return b""
