"""The CMU Pronouncing Dictionary that lies in the package: its words, its parts, its phones in IPA.

What lives here: reading the file, the split by a hash of the word, stress, IPA, and which test words are easy because
their stem is a training word. What does not: tokenizers, the model, scores (`g2p`, `scores`).

Data: cmudict of Carnegie Mellon University, BSD 2-clause (assets/LICENSE.cmudict): 126,052 words with 135,166
pronunciations, 8,447 of the words with several. A line is `word P H O N E S`, the further pronunciations of a word as
`word(2)`, and what follows `#` is a remark.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Literal

Part = Literal["train", "valid", "test"]

_ASSET = "assets/cmudict.dict.gz"
_VARIANT = re.compile(r"\(\d+\)$")
_STRESS = str.maketrans("", "", "012")

IPA: Mapping[str, str] = {
    "AA": "\u0251",  # odd
    "AE": "\u00e6",  # at
    "AH": "\u0259",  # the schwa of "about"; under stress the vowel of "hut", below
    "AO": "\u0254",  # ought
    "AW": "a\u028a",  # cow
    "AY": "a\u026a",  # hide
    "B": "b",
    "CH": "t\u0283",
    "D": "d",
    "DH": "\u00f0",  # thee
    "EH": "\u025b",  # Ed
    "ER": "\u025a",  # better; under stress the vowel of "hurt", below
    "EY": "e\u026a",  # ate
    "F": "f",
    "G": "\u0261",
    "HH": "h",
    "IH": "\u026a",  # it
    "IY": "i",  # eat
    "JH": "d\u0292",
    "K": "k",
    "L": "l",
    "M": "m",
    "N": "n",
    "NG": "\u014b",
    "OW": "o\u028a",  # oat
    "OY": "\u0254\u026a",  # toy
    "P": "p",
    "R": "\u0279",
    "S": "s",
    "SH": "\u0283",
    "T": "t",
    "TH": "\u03b8",  # theta
    "UH": "\u028a",  # hood
    "UW": "u",  # two
    "V": "v",
    "W": "w",
    "Y": "j",
    "Z": "z",
    "ZH": "\u0292",
}
"""IPA of the 39 phones. The dictionary's one AH is a schwa in seven of eight places: unstressed text shows it so."""

_STRESSED_IPA = {"AH": "\u028c", "ER": "\u025d"}
_STRESS_MARKS = {"1": "\u02c8", "2": "\u02cc", "0": ""}

# Ending -> what stands in its place in the stem. "=" undoes a doubled last consonant (running -> run).
_ENDINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("'s", ("",)),
    ("s'", ("", "s")),
    ("s", ("",)),
    ("es", ("",)),
    ("ies", ("y", "ie")),
    ("ed", ("", "e", "=")),
    ("ied", ("y", "ie")),
    ("ing", ("", "e", "=")),
    ("er", ("", "e", "=")),
    ("ier", ("y",)),
    ("est", ("", "e", "=")),
    ("iest", ("y",)),
    ("ly", ("", "le")),
    ("ily", ("y",)),
    ("ness", ("",)),
    ("iness", ("y",)),
)
_SHORTEST_STEM = 3


def read_dictionary() -> dict[str, tuple[str, ...]]:
    """Read the dictionary of the package.

    Returns:
        Every word with its pronunciations in the file's order, each a line of phones with stress digits.

    Cost: 0.3 s, 40 MB.

    Example:
        >>> read_dictionary()["tomato"]
        ('T AH0 M EY1 T OW2', 'T AH0 M AA1 T OW2')
    """
    return parse_dictionary(gzip.decompress(_asset_bytes()).decode("ascii"))


def dictionary_sha256() -> str:
    """The sha256 of the packed dictionary, by which a run knows the data that it was trained on."""
    return hashlib.sha256(_asset_bytes()).hexdigest()


def parse_dictionary(text: str) -> dict[str, tuple[str, ...]]:
    r"""Parse the dictionary's own format.

    Args:
        text: lines `word P H O N E S # remark`; `word(2)` is a further pronunciation of `word`.

    Returns:
        Every word with its pronunciations, in the order of the text.

    Raises:
        ValueError: a line has a word without phones; the line is named.

    Example:
        >>> parse_dictionary("a AH0\na(2) EY1 # the letter\n")
        {'a': ('AH0', 'EY1')}
    """
    words: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        word, _, phones = line.partition("#")[0].strip().partition(" ")
        if word and not phones:
            raise ValueError(f"expected phones after the word in line {number} of the dictionary, got {line!r}")
        if word:
            words.setdefault(_VARIANT.sub("", word) if word.endswith(")") else word, []).append(phones)
    return {word: tuple(pronunciations) for word, pronunciations in words.items()}


def part_of(word: str) -> Part:
    """The part that a word belongs to: 90 % train, 2 % valid, 8 % test, by a hash of the word alone.

    A word with several pronunciations stands on one side; another edition of the dictionary moves no word.

    Example:
        >>> part_of("tomato")
        'train'
    """
    digest = hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return "train" if place < 0.90 else "valid" if place < 0.92 else "test"


def without_stress(phones: str) -> str:
    """The phones without their stress digits: 69 symbols become 39.

    Example:
        >>> without_stress("T AH0 M EY1 T OW2")
        'T AH M EY T OW'
    """
    return phones.translate(_STRESS)


def pronunciations_of(dictionary: Mapping[str, tuple[str, ...]], *, stressed: bool) -> dict[str, tuple[str, ...]]:
    """The dictionary with its pronunciations as they are learned and scored.

    Args:
        dictionary: what `read_dictionary` gives.
        stressed: keep the stress digits; without them pronunciations that differed in stress only become one.

    Returns:
        Every word with its distinct pronunciations, in their order.
    """
    if stressed:
        return {word: tuple(dict.fromkeys(found)) for word, found in dictionary.items()}
    return {word: tuple(dict.fromkeys(map(without_stress, found))) for word, found in dictionary.items()}


def to_ipa(phones: str) -> str:
    r"""Write ARPABET phones in the International Phonetic Alphabet, with a stress mark before a stressed vowel.

    Args:
        phones: between spaces, with stress digits or without.

    Returns:
        The IPA without spaces. Without a digit AH and ER are written as the unstressed vowels.

    Raises:
        ValueError: a symbol is none of the 39 phones.

    Example:
        >>> to_ipa("K AE1 T") == "k\u02c8\u00e6t"
        True
    """
    return "".join(map(_phone_to_ipa, phones.split()))


@cache
def _phone_to_ipa(symbol: str) -> str:
    digit = symbol[-1] if symbol[-1] in _STRESS_MARKS else ""
    phone = symbol.removesuffix(digit) if digit else symbol
    if phone not in IPA:
        raise ValueError(f"expected phones among {' '.join(IPA)}, got {symbol!r}")
    if digit in ("1", "2"):
        return _STRESS_MARKS[digit] + _STRESSED_IPA.get(phone, IPA[phone])
    return IPA[phone]


def stems(word: str) -> set[str]:
    """The words of at least three letters that `word` may be a regular form of.

    The endings -s -es -'s -s' -ed -ing -er -est -ly -ness are taken off, with a dropped e put back (making, make), a
    doubled consonant undone (running, run) and i made y again (happily, happy); and the same once more of what that
    gave (walkers, walker, walk). No dictionary is asked, so most of what comes out is no word: a stem counts where
    it is a training word.

    Example:
        >>> "run" in stems("runners"), "happy" in stems("happiness"), stems("is")
        (True, True, set())
    """
    found: set[str] = set()
    open_forms = [word]
    while open_forms:
        for stem in _shorter_forms(open_forms.pop()):
            if stem not in found:
                found.add(stem)
                open_forms.append(stem)
    return found - {word}


def _shorter_forms(word: str) -> Iterator[str]:
    for ending, replacements in _ENDINGS:
        if not word.endswith(ending):
            continue
        rest = word.removesuffix(ending)
        for replacement in replacements:
            if replacement != "=":
                stem = rest + replacement
            elif len(rest) > 1 and rest[-1] == rest[-2] and rest[-1] not in "aeiou":
                stem = rest[:-1]
            else:
                continue
            if len(stem) >= _SHORTEST_STEM:
                yield stem


def has_stem_in(word: str, training_words: set[str] | Mapping[str, object]) -> bool:
    """Whether a stem of the word is a training word, so that much of its pronunciation was learned by heart."""
    return any(stem in training_words for stem in stems(word))


def _asset_bytes() -> bytes:
    return resources.files("crossattention.recipes").joinpath(_ASSET).read_bytes()
