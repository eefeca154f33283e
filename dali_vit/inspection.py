"""What is wrong with one encoded image, by Pillow."""

from __future__ import annotations

import io
import os

from PIL import Image, UnidentifiedImageError

from pipelines.eval import MAX_ASPECT_RATIO

__all__ = ["inspect", "one_line"]

_FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pnm"), "PPM"),
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".jp2": "JPEG2000",
}


def inspect(data: bytes, name: str, max_pixels: float) -> list[tuple[str, str]]:
    """Kind and detail of everything wrong with an encoded image; it is decoded only if it is not too large."""
    if not data:
        return [("empty", "0 bytes")]
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
            return [("truncated", f"{len(data)} bytes hold no whole header")]
        return [("not an image", f"begins with {data[:8]!r}")]
    except Image.DecompressionBombError as error:
        return [("too large", one_line(error))]
    except Exception as error:  # each format's parser has its own
        return [("damaged", one_line(error))]
    with image:
        kind = "JPEG" if image.format == "MPO" else image.format
        if kind not in _FORMATS.values():
            return [("not an image", f"{kind}, which DALI does not decode")]
        if image.width * image.height > max_pixels:
            return [("too large", f"{image.width} x {image.height} pixels")]
        try:
            image.load()
        except Exception as error:
            early = "truncated" in str(error) or "unexpected end" in str(error).lower()
            return [("truncated" if early else "damaged", one_line(error))]
        problems = [("CMYK", f"{kind} of {image.mode}")] if image.mode == "CMYK" else []
        if round(256 * MAX_ASPECT_RATIO * min(image.size) / max(image.size)) < 224:
            problems.append(("too long", f"{image.width} x {image.height} pixels"))
    suffix = os.path.splitext(name)[1].lower()
    if _FORMATS.get(suffix, kind) != kind:
        problems.append(("other format", f"{kind} named {suffix}"))
    return problems


def one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
