"""A folder of text files as a fixed list: which files are text, how long they are, and what was left out and why.

What lives here: walking a folder, telling text from other files, reading stretches of a file that must not have changed since.
What does not: cutting the text into training examples (`byte_windows`).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

Part = Literal["train", "valid", "test"]

_HELD_OUT: dict[str, float] = {"valid": 0.02, "test": 0.08}
_CHUNK_BYTES = 1 << 20
_NAMED_PROBLEMS = 5
# Control characters that no text has; of the others, tab, line ends, backspace, form feed and escape do occur.
_CONTROLS = bytes({*range(1, 8), *range(14, 27), *range(28, 32), 127})
_TOLERATED_CONTROLS = 0.05


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file of a `TextFolder`.

    Args:
        name: its path inside the folder, parts joined by "/"; bytes that are not UTF-8 as Python's file names hold them.
        size: bytes.
        sha256: of its content.
        modified: when it was last modified, in nanoseconds: where that is as it was, the content is not read again to compare it.
    """

    name: str
    size: int
    sha256: bytes
    modified: int

    @property
    def label(self) -> str:
        """The name as text that can be printed everywhere."""
        return printable(self.name)


@dataclass(frozen=True)
class TextFolder:
    """The text files of a folder, in the order of their names, as they were when `list_text` read them.

    Args:
        path: the folder.
        files: what was kept.
        left_out: reason -> how many entries were left out for it.
        problems: the first few entries that were left out, with the reason.
        sha256: of the names, sizes and contents of all files, for comparing two folders.
        num_undecodable: how many of the files are not UTF-8; they are kept, bytes being bytes.
    """

    path: Path
    files: tuple[TextFile, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    sha256: str = ""
    num_undecodable: int = 0
    _seen: dict[int, int] = field(default_factory=dict, repr=False, compare=False)  # file -> newer time of the same content

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def read(self, index: int, begin: int, end: int) -> bytes:
        """The bytes from `begin` up to `end` of one file.

        Raises:
            ValueError: the file has changed, or is gone, since the folder was listed. A change that keeps both length and time of
                modification is not seen here.
            OSError: it cannot be read.

        Cost: one opening and one read; the whole file once more where only its time of modification has changed.
        """
        file = self.files[index]
        path = self.path / file.name
        try:
            with path.open("rb", buffering=0) as stream:
                now = os.fstat(stream.fileno())
                if now.st_size != file.size:
                    raise ValueError(self._changed(file, f"it had {file.size:,} bytes and has {now.st_size:,}"))
                if now.st_mtime_ns not in (file.modified, self._seen.get(index)):
                    if _Content.of(stream).sha256 != file.sha256:
                        raise ValueError(self._changed(file, "it has other content"))
                    self._seen[index] = now.st_mtime_ns
                stream.seek(begin)
                found = stream.read(end - begin) or b""
        except FileNotFoundError:
            raise ValueError(self._changed(file, "it is gone")) from None
        if len(found) != end - begin:
            raise ValueError(self._changed(file, f"it ended at byte {begin + len(found):,} of {file.size:,} while it was read"))
        return found

    def parts(self) -> dict[Part, tuple[int, ...]]:
        """The files in three parts by a hash of their names: no file stands in two of them.

        2 % of all names are for validation, 8 % for test; where a part would be empty it takes the file that is nearest. A file
        keeps its part whatever else the folder holds, unless it was taken so. Copies of a file under other names were left out;
        near-copies (another edition of a text, a file with its licence changed) are not known as such and may stand in two parts.

        Returns:
            Part -> places in `files`, rising.

        Raises:
            ValueError: fewer than three files.
        """
        if len(self.files) < 3:
            raise ValueError(
                f"{self.path} has {len(self.files)} text files, and a file stands in one part only (training, validation, test): "
                f"expected at least 3; divide a long file{self._said_left_out()}"
            )
        places = [_place(file.name) for file in self.files]
        order = sorted(range(len(places)), key=places.__getitem__)
        below_valid = sum(place < _HELD_OUT["valid"] for place in places)
        below_test = sum(place < _HELD_OUT["valid"] + _HELD_OUT["test"] for place in places)
        num_valid = min(max(1, below_valid), len(order) - 2)
        num_test = min(max(1, below_test - num_valid), len(order) - 1 - num_valid)
        return {
            "train": tuple(sorted(order[num_valid + num_test :])),
            "valid": tuple(sorted(order[:num_valid])),
            "test": tuple(sorted(order[num_valid : num_valid + num_test])),
        }

    def _changed(self, file: TextFile, how: str) -> str:
        return (
            f"{printable(str(self.path))}: the file {file.label} has changed since the folder was listed: {how}; batches would not "
            "be those of the run any more: put it back to go on, or begin a new run"
        )

    def _said_left_out(self) -> str:
        if not self.left_out:
            return ""
        return f" (left out: {', '.join(f'{count:,} {reason}' for reason, count in self.left_out.items())})"


OnFile = Callable[[int, int], None]
"""Is told how many files were read, and how many there are."""


def list_text(
    folder: str | Path, *, pattern: str = "*", without: Sequence[str] = (), on_progress: OnFile | None = None
) -> TextFolder:
    """Find the text files of a folder and all folders in it, and read each once.

    A file is left out, counted and, among the first few, named if it is

    - hidden (its name, or that of a folder above it, begins with a dot), or in a folder named in `without`;
    - of another name than `pattern`;
    - empty, unreadable, no regular file (a pipe, a socket, a device), or a link to nothing;
    - the same file as another (a hard link, a symbolic link), or a copy of it to the last byte;
    - binary: it has a NUL byte, or over 5 % control characters and is not UTF-8;
    - changed while it was read.

    Symbolic links are followed after all else; a folder that was reached before, as in a loop of links, is left out. Text in any
    encoding without NUL bytes is kept as it is: Latin-1 is, UTF-16 is not.

    Args:
        folder: where to look.
        pattern: what a file's name must match, as in a shell: "*.txt".
        without: names of folders that are not looked into.
        on_progress: called after each file.

    Raises:
        FileNotFoundError: no such folder.
        NotADirectoryError: it is a file.
        ValueError: it holds no text file; says what it holds.

    Cost: every byte is read once, 1 MiB at a time; memory is some 400 bytes a file, whatever their sizes.

    Example:
        >>> import tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.txt").write_bytes(b"text"), (folder / "b.bin").write_bytes(bytes(9))
        >>> found = list_text(folder)
        >>> [file.name for file in found.files], found.left_out
        (['a.txt'], {'binary': 1})
    """
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"expected a folder of text files at {path}, found nothing")
    if not path.is_dir():
        raise NotADirectoryError(f"expected a folder of text files at {path}, found a file; give the folder that it lies in")
    listing = _Listing(path, pattern, frozenset(without))
    names = sorted(listing.walk(), key=os.fsencode)
    files: list[TextFile] = []
    undecodable = 0
    digests: set[bytes] = set()
    for done, name in enumerate(names, start=1):
        found = listing.read(name)
        if found is not None:
            file, is_utf8 = found
            if file.sha256 in digests:
                listing.leave_out(name, "copy of another")
            else:
                digests.add(file.sha256)
                files.append(file)
                undecodable += not is_utf8
        if on_progress is not None:
            on_progress(done, len(names))
    left_out = dict(sorted(listing.left_out.items()))
    if not files:
        held = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "nothing"
        raise ValueError(f"{path} holds no text file whose name matches {pattern!r}: it holds {held}")
    return TextFolder(path, tuple(files), left_out, tuple(listing.problems), _digest_of(files), undecodable)


def printable(name: str) -> str:
    """A file name as text that any terminal and any JSON can hold."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class _Listing:
    """One walk over a folder, and what it left out."""

    def __init__(self, root: Path, pattern: str, without: frozenset[str]) -> None:
        self.root, self.pattern, self.without = root, pattern, without
        self.left_out: Counter[str] = Counter()
        self.problems: list[str] = []
        self.seen: set[tuple[int, int]] = set()  # files and folders by their device and inode
        self.links: list[str] = []

    def walk(self) -> Iterator[str]:
        """Names of the files that may be text, each file once, those that are no links first."""
        self.is_new(os.stat(self.root))
        yield from self.walk_folder("")
        while self.links:
            links, self.links = sorted(self.links, key=os.fsencode), []
            for name in links:
                yield from self.look_at(name, is_link=True)

    def walk_folder(self, name: str) -> Iterator[str]:
        """Walk one folder without recursion of Python's own: folders may be nested deeper than it allows."""
        waiting = [name]
        while waiting:
            here = waiting.pop()
            try:
                entries = sorted(os.scandir(self.root / here), key=lambda entry: os.fsencode(entry.name))
            except OSError as fault:
                self.leave_out(here or ".", f"unreadable ({fault.strerror})")
                continue
            for entry in entries:
                inner = f"{here}/{entry.name}" if here else entry.name
                if entry.name.startswith("."):
                    self.leave_out(inner, "hidden")
                elif entry.is_symlink():
                    self.links.append(inner)
                elif not entry.is_dir(follow_symlinks=False):
                    yield from self.look_at(inner, is_link=False)
                elif entry.name in self.without:
                    self.leave_out(inner, "folder to be left out")
                elif self.is_new(entry.stat(follow_symlinks=False)):
                    waiting.append(inner)

    def look_at(self, name: str, *, is_link: bool) -> Iterator[str]:
        """The name, if it may be a text file; the names in a folder that a link leads to."""
        try:
            facts = os.stat(self.root / name)
        except OSError as fault:
            self.leave_out(name, "link to nothing or in a loop" if is_link else f"unreadable ({fault.strerror})")
            return
        last = name.rpartition("/")[2]
        if stat.S_ISDIR(facts.st_mode):
            if last in self.without:
                self.leave_out(name, "folder to be left out")
            elif self.is_new(facts):
                yield from self.walk_folder(name)
            else:
                self.leave_out(name, "link to a folder that was read already")
        elif not stat.S_ISREG(facts.st_mode):
            self.leave_out(name, "no regular file")
        elif not fnmatchcase(last, self.pattern):
            self.leave_out(name, "of another name")
        elif not self.is_new(facts):
            self.leave_out(name, "the same file as another")
        elif facts.st_size == 0:
            self.leave_out(name, "empty")
        else:
            yield name

    def is_new(self, facts: os.stat_result) -> bool:
        key = (facts.st_dev, facts.st_ino)
        is_new = facts.st_ino == 0 or key not in self.seen  # a file system without inodes gives 0
        self.seen.add(key)
        return is_new

    def read(self, name: str) -> tuple[TextFile, bool] | None:
        """The file, and whether it is UTF-8; None where it is left out."""
        try:
            with (self.root / name).open("rb", buffering=0) as stream:
                before = os.fstat(stream.fileno())
                content = _Content.of(stream)
                after = os.fstat(stream.fileno())
        except OSError as fault:
            self.leave_out(name, f"unreadable ({fault.strerror})")
            return None
        if content.size != after.st_size or before.st_mtime_ns != after.st_mtime_ns:
            self.leave_out(name, "changed while it was read")
        elif content.is_binary:
            self.leave_out(name, "binary")
        else:
            return TextFile(name, content.size, content.sha256, after.st_mtime_ns), content.is_utf8
        return None

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out[reason] += 1
        # Of these there are many in any folder, and nobody wonders why.
        if reason not in ("hidden", "of another name", "folder to be left out") and len(self.problems) < _NAMED_PROBLEMS:
            self.problems.append(f"{printable(name)}: {reason}")


@dataclass
class _Content:
    """What one reading of a file tells of it."""

    size: int
    sha256: bytes
    is_utf8: bool
    is_binary: bool

    @classmethod
    def of(cls, stream: object) -> _Content:
        import codecs

        digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
        size = controls = 0
        has_nul, is_utf8 = False, True
        while chunk := stream.read(_CHUNK_BYTES):  # type: ignore[attr-defined]
            size += len(chunk)
            digest.update(chunk)
            has_nul = has_nul or 0 in chunk
            controls += len(chunk) - len(chunk.translate(None, _CONTROLS))
            if is_utf8:
                try:
                    decoder.decode(chunk)
                except UnicodeDecodeError:
                    is_utf8 = False
        if is_utf8 and decoder.getstate()[0]:  # a character that was begun and not ended
            is_utf8 = False
        is_binary = has_nul or (not is_utf8 and controls > _TOLERATED_CONTROLS * size)
        return cls(size, digest.digest(), is_utf8, is_binary)


def _place(name: str) -> float:
    """Where a name falls between 0 and 1, evenly, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big") / 2**64


def _digest_of(files: Sequence[TextFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(b"%s\0%d\0%s" % (os.fsencode(file.name), file.size, file.sha256))
    return digest.hexdigest()
