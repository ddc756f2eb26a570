"""Flags out of dataclasses: the same names, types, defaults and help; checks are the dataclass's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import tyro

from crossattention.cli.flags import config_of, flags_of


@dataclass(frozen=True)
class SoupConfig:
    """A soup.

    Args:
        pot: where it is cooked.
        minutes: how long.
        taste: what of.
        lid: what covers it.
    """

    pot: Path
    minutes: float | None = None
    taste: Literal["leek", "pea"] = "leek"
    lid: Path | None = None

    def __post_init__(self):
        if self.minutes == 0:
            raise ValueError("minutes must be above 0, got 0")


def given(*words, defaults=None, unset=None):
    flags = tyro.cli(flags_of(SoupConfig, defaults, unset=unset), args=words)
    return config_of(SoupConfig, flags)


def test_flags_give_the_config_back():
    found = given("--pot", "p", "--minutes", "3", "--taste", "pea")
    assert found == SoupConfig(Path("p"), 3.0, "pea")


def test_defaults_come_from_an_instance_and_make_required_fields_optional():
    stored = SoupConfig(Path("old"), 7.0, "pea", Path("l"))
    assert given(defaults=stored) == stored
    assert given("--minutes", "8", defaults=stored).minutes == 8


def test_a_field_can_be_unset_whatever_its_default():
    assert given(defaults=SoupConfig(Path("p"), 7.0), unset={"minutes": "(default: 7)"}).minutes is None


def test_checks_are_those_of_the_config():
    with pytest.raises(ValueError, match="minutes must be above 0, got 0"):
        given("--pot", "p", "--minutes", "0")


def test_the_config_can_be_changed_on_the_way():
    flags = tyro.cli(flags_of(SoupConfig, None), args=["--pot", "p"])
    assert config_of(SoupConfig, flags, minutes=4.0).minutes == 4.0


def test_the_help_is_the_docstring_and_hides_none(capsys):
    with pytest.raises(SystemExit):
        given("--help", unset={"minutes": "(default: until it is done)"})
    text = " ".join(capsys.readouterr().out.split())
    assert "--minutes FLOAT" in text
    assert "how long. (default: until it is done)" in text
    assert "--lid PATH" in text
    assert "--taste {leek,pea}" in text
    assert "where it is cooked. (required)" in text
