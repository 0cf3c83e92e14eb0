"""Images in one folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import UserError

if TYPE_CHECKING:
    from PIL import Image as PILImage

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
PARTS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
"""Names of folders that hold parts of a data set rather than a class."""
SMALLEST_SIDE = 4


def read_images(path: Path, size: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images resized to `size` pixels a side; grey if all of them are.

    Returns:
        float32 images (rows, channels, size, size) in [0, 1], int64 classes (rows,), and the names of the classes:
        the folders, sorted.

    Raises:
        UserError: if there are none, or one cannot be read.
    """
    if size < SMALLEST_SIDE:
        raise UserError(f"--image-size must be at least {SMALLEST_SIDE}, got {size}")
    found = _by_class(path)
    pictures, targets = [], []
    for label, files in enumerate(found.values()):
        for file in files:
            pictures.append(_read(file, size))
            targets.append(label)
    if all(picture.ndim == 2 for picture in pictures):
        inputs = np.stack(pictures)[:, None]
    else:
        coloured = [np.repeat(p[..., None], 3, -1) if p.ndim == 2 else p for p in pictures]
        inputs = np.stack(coloured).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(inputs, np.float32) / 255, np.array(targets, np.int64), tuple(found)


def _by_class(path: Path) -> dict[str, list[Path]]:
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {}
    for folder in folders:
        # Some systems lay a hidden "._name.png" beside each image, which is none.
        images = (f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        files = sorted(f for f in images if f.is_file())
        if files:
            found[folder.name] = files
    if not found:
        raise UserError(f"{path}: no images in folders by class (expected {path}/CLASS/image.png)")
    if {name.lower() for name in found} <= PARTS:
        raise UserError(
            f"{path} holds the parts {', '.join(found)}, not classes: give one of them, such as {path / next(iter(found))}; "
            "wellposed sets its own test set aside"
        )
    return found


def _read(file: Path, size: int) -> np.ndarray:
    """Unsigned bytes, (size, size) for grey and (size, size, 3) for coloured images."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            grey = upright.mode in ("1", "L", "LA", "I", "F") or upright.mode.startswith("I;16")
            picture = _opaque(upright, grey).resize((size, size), Image.Resampling.BILINEAR)
    # Each damaged format fails in its own way, some with errors that are not OSError.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"cannot read the image {file}: {reason[0] if reason else type(error).__name__}") from error
    return np.asarray(picture)


def _opaque(image: PILImage.Image, grey: bool) -> PILImage.Image:
    """8 bits a channel, on white where the image is transparent."""
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Converting would cut 16 bits at 255, that is, make nearly everything white.
        values = np.asarray(image, np.float64)
        top = 65535.0 if values.max() > 255 else 255.0 if values.max() > 1 else 1.0
        return Image.fromarray(np.clip(values / top * 255, 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("L" if grey else "RGB")
