"""Packages that only the database needs: named, with the command that installs them, where one is missing."""

from importlib.util import find_spec

INSTALL = "pip install 'crossattention[retro]'"
_PACKAGE = {"faiss": "faiss-cpu"}


def need(module: str, what: str) -> None:
    """Say which package is missing, before it is imported.

    Raises:
        ImportError: it is not installed; the message names it, what needs it, and the command that installs it.
    """
    if find_spec(module) is None:
        raise ImportError(f"{what} need the package {_PACKAGE.get(module, module)}, which is not installed: {INSTALL}")
