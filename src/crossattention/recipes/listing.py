"""All recipes, by name: where each lives, and what it needs. A recipe is imported when it is asked for, not before.

Light: nothing outside the standard library is imported here, so that the help answers at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from crossattention.recipes.recipe import RecipeModule

SHARES = ("per", "wer", "cer", "exact", "accuracy", "attention")
"""Scores that are shares of 1, by how their names begin: shown as percentages."""

COUNTS = ("words", "pairs", "questions", "pictures", "unreadable", "sounds", "masked")
"""Scores that are numbers of examples: shown whole, and left out where a line is short."""


class Listed(NamedTuple):
    """Where a recipe lives.

    Args:
        what: one line, for the help.
        module: its module, with the members of `recipe.RecipeModule`.
        extra: the extra of this package whose libraries the module cannot be imported without; None for none.
    """

    what: str
    module: str
    extra: str | None = None

    def load(self) -> RecipeModule:
        """Import the recipe.

        Raises:
            ModuleNotFoundError: a library of its extra is missing; with the command that installs it.
        """
        try:
            return cast("RecipeModule", importlib.import_module(self.module))
        except ModuleNotFoundError as error:
            if self.extra is None or (error.name or "").split(".")[0] == "crossattention":
                raise
            raise missing_extra(f"the recipe {self.module.rpartition('.')[2]}", str(error.name), self.extra) from error


RECIPES: Mapping[str, Listed] = MappingProxyType(
    {
        "g2p": Listed(
            "letters to phonemes: how English words are pronounced, from the dictionary in the package",
            "crossattention.recipes.g2p",
        ),
        "seq2seq": Listed(
            "any two-column file: --data pairs.tsv (or .csv, .jsonl, .parquet)",
            "crossattention.recipes.seq2seq",
        ),
        "bytes": Listed(
            "masked bytes of any folder of text: --data FOLDER; without it the Python standard library's own source",
            "crossattention.recipes.byte_text",
        ),
        "listen": Listed(
            "spoken words, spelled out: words of the dictionary in several voices, or --data FOLDER of WAV files",
            "crossattention.recipes.listen",
        ),
        "retro": Listed(
            "language models that read the nearest chunks of their text: --data FOLDER; without it the standard library's source",
            "crossattention.recipes.retro",
            extra="retro",
        ),
        "vqa": Listed(
            "questions about pictures: the words of a question read the picture's patches (easy-vqa, or --data FOLDER)",
            "crossattention.recipes.vqa",
            extra="images",
        ),
        "images": Listed(
            "pictures by class: two branches of patches read each other (easy-vqa's shapes, or --data FOLDER of class folders)",
            "crossattention.recipes.images",
            extra="images",
        ),
    }
)
"""Every recipe, in the order of the help."""


def missing_extra(what: str, library: str, extra: str) -> ModuleNotFoundError:
    """The error for a library that is not installed.

    Args:
        what: what needs it.
        library: its name.
        extra: the extra of this package that brings it.

    Example:
        >>> print(missing_extra("the speech of listen", "espeakng_loader", "speech"))
        the speech of listen needs espeakng_loader; install it with: pip install 'crossattention[speech]'
    """
    return ModuleNotFoundError(f"{what} needs {library}; install it with: pip install 'crossattention[{extra}]'", name=library)
