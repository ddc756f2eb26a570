"""Where what can be made or fetched again is kept between runs."""

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """The user's folder for one kind of data: `crossattention/NAME` in `XDG_CACHE_HOME`, or in `.cache` of the home folder.

    It need not exist. A relative `XDG_CACHE_HOME` is not used, as its specification says.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if given and Path(given).is_absolute() else Path.home() / ".cache"
    return root / "crossattention" / name
