"""Pictures in folders, one folder a class: found, split, read into one array of squares.

What lives here: files and arrays. What does not: batches, models (recipes).

    FOLDER/cat/1.jpg   FOLDER/cat/2.png   FOLDER/dog/1.jpg   ...

Every folder directly in FOLDER is a class, and every file with a known ending in it a picture; names that begin with a dot are left
alone. Which part a picture is in is decided by a hash of its class and file name, so it stays where it is when others come or go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ENDINGS = (".png", ".jpg", ".jpeg")

LARGEST_PIXELS = 100_000_000
"""Pixels of a file beyond which it is refused unread: 300 MB in memory."""

PARTS = ("train", "valid", "test")
_SHOWN = 20


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of one part with their classes.

    Args:
        images: (number, S, S, 3) uint8.
        labels: (number,) int64, places in the list of classes.
        paths: the files.
    """

    images: np.ndarray
    labels: np.ndarray
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False)
class PictureData:
    """All parts.

    Args:
        folder: where they were read.
        classes: names of the classes.
        train: what is learnt from.
        valid: what decides which model is the best.
        test: what is scored at the end.
        sha256: of pictures and labels, by which a run knows the data that it was trained on.
        notes: what is to be said of it, a sentence each.
    """

    folder: Path
    classes: tuple[str, ...]
    train: Pictures
    valid: Pictures
    test: Pictures
    sha256: str
    notes: tuple[str, ...] = ()


def load_picture_folder(
    folder: str | Path, size: int, *, valid_share: float = 0.1, test_share: float = 0.1, skip_broken: bool = False
) -> PictureData:
    """Read a folder of class folders.

    Args:
        folder: the folder.
        size: side of the squares that the pictures become, in pixels (`read_square`).
        valid_share: share of the pictures for validation.
        test_share: share for the final score.
        skip_broken: leave out files that cannot be read, and name them in `notes`; else they are an error.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: fewer than two classes, a class without pictures, files that cannot be read (the first twenty are named), a part
            without pictures or a class with none to learn from.
        ModuleNotFoundError: Pillow is missing.

    Cost: reads every file once and holds size x size x 3 bytes of each.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected a folder of class folders at {folder}, found {'a file' if folder.exists() else 'nothing'}"
        )
    if not 0.0 < valid_share < 1.0 or not 0.0 < test_share < 1.0 or valid_share + test_share >= 1.0:
        raise ValueError(f"expected shares above 0 that leave something to learn from, got {valid_share} and {test_share}")
    files = _files_by_class(folder)
    _import_pillow()
    images: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    labels: dict[str, list[int]] = {part: [] for part in PARTS}
    paths: dict[str, list[Path]] = {part: [] for part in PARTS}
    broken: list[str] = []
    for label, (name, found) in enumerate(files.items()):
        for path in found:
            try:
                image = read_square(path, size)
            except ValueError as error:
                broken.append(str(error))
                continue
            part = part_of(f"{name}/{path.name}", valid_share, test_share)
            images[part].append(image)
            labels[part].append(label)
            paths[part].append(path)
    if broken and not skip_broken:
        raise ValueError(
            f"{len(broken)} files in {folder} cannot be read:\n  {_listed(broken)}\n"
            "mend or remove them; --skip-broken leaves them out"
        )
    for part in PARTS:
        if not images[part]:
            raise ValueError(
                f"none of the {sum(map(len, files.values()))} pictures in {folder} fell into the part {part}; add some, or make "
                "its share larger"
            )
    classes = tuple(files)
    if missing := [name for label, name in enumerate(classes) if label not in labels["train"]]:
        raise ValueError(f"no picture to learn from is of {', '.join(missing)}; these classes need more pictures")
    made = {part: Pictures(np.stack(images[part]), np.array(labels[part], np.int64), tuple(paths[part])) for part in PARTS}
    notes = (f"{len(broken)} files that cannot be read are left out: {_listed(broken)}",) if broken else ()
    return PictureData(folder, classes, **made, sha256=digest_of(classes, *made.values()), notes=notes)


def part_of(name: str, valid_share: float, test_share: float) -> str:
    """The part of a picture, by a hash of "CLASS/FILE".

    Example:
        >>> part_of("cat/1.jpg", 0.1, 0.1), part_of("cat/7.jpg", 0.1, 0.1)
        ('valid', 'train')
    """
    place = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
    return "test" if place < test_share else "valid" if place < test_share + valid_share else "train"


def read_square(path: str | Path, size: int) -> np.ndarray:
    """Read a picture as a square: scaled until its shorter side is `size` pixels, then the middle of it.

    Args:
        path: a PNG or JPEG file.
        size: side in pixels.

    Returns:
        (size, size, 3) uint8, red, green and blue; upright where the camera noted how it was held. Transparency is laid on white.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such picture, is damaged, or has more than `LARGEST_PIXELS` pixels.
        ModuleNotFoundError: Pillow is missing.
    """
    image_module, operations = _import_pillow()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a picture at {path}, found {'a folder' if path.is_dir() else 'nothing'}")
    try:
        with image_module.open(path, formats=("PNG", "JPEG")) as picture:
            if picture.width * picture.height > LARGEST_PIXELS:
                raise ValueError(
                    f"{path} has {picture.width} x {picture.height} pixels, more than {LARGEST_PIXELS:,}; make it smaller"
                )
            upright = in_eight_bits(operations.exif_transpose(picture), path)
            if upright.mode != "RGB" or "transparency" in upright.info:
                layer = upright.convert("RGBA")
                upright = image_module.alpha_composite(image_module.new("RGBA", layer.size, "white"), layer).convert("RGB")
            if upright.size != (size, size):
                upright = operations.fit(upright, (size, size), image_module.Resampling.BICUBIC)
            return np.array(upright, dtype=np.uint8)
    except (OSError, SyntaxError, image_module.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no readable picture ({reason}); expected a PNG or JPEG file") from None


def in_eight_bits(picture: Any, path: Path) -> Any:
    """A grey picture of 16 bits a pixel with 8 of them, which Pillow's own conversion would show white; others as they are.

    Args:
        picture: opened by Pillow.
        path: its file, for the message.

    Raises:
        ValueError: pixels of 32 bits or with fractions: nothing says what is black and white.
    """
    is_grey = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", None))
    if is_grey:
        image_module, _ = _import_pillow()
        wide = np.asarray(picture).astype(np.int64).clip(0, 65_535)
        return image_module.fromarray(((wide * 255 + 32_767) // 65_535).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"{path} has pixels of 32 bits; expected 8 or 16 bits a colour")
    return picture


def digest_of(classes: Sequence[str], *parts: Pictures) -> str:
    """The sha256 of pictures and labels."""
    digest = hashlib.sha256(repr(tuple(classes)).encode())
    for part in parts:
        digest.update(repr(part.images.shape).encode())
        digest.update(np.ascontiguousarray(part.images))
        digest.update(np.ascontiguousarray(part.labels))
    return digest.hexdigest()


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise ValueError(f"expected at least two class folders in {folder}, got {', '.join(names) or 'none'}")
    files = {}
    for name in names:
        inside = sorted(path for path in (folder / name).iterdir() if not path.name.startswith("."))
        files[name] = [path for path in inside if path.is_file() and path.suffix.lower() in ENDINGS]
        if not files[name]:
            held = "folders" if any(path.is_dir() for path in inside) else "other files" if inside else "nothing"
            raise ValueError(
                f"expected pictures ({', '.join(ENDINGS)}) in the class folder {folder / name}, found {held}; every folder in "
                f"{folder} is a class: name the folder whose folders hold the pictures"
            )
    return files


def _listed(broken: Sequence[str]) -> str:
    more = len(broken) - _SHOWN
    return "\n  ".join([*broken[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _import_pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures are read by Pillow, which is missing; install it with: pip install 'crossattention[images]'"
        ) from error
    return Image, ImageOps
