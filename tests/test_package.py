"""What is shipped and what is tracked: the wheel, the licences, and no traces of one machine or its package source."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SHIPPED = sorted(
    file.relative_to(ROOT / "src").as_posix()
    for file in (ROOT / "src" / "crossattention").rglob("*")
    if file.is_file() and "__pycache__" not in file.parts
)

HOSTS = r"(pypi|pythonhosted|download\.pytorch|npmjs|anaconda)\.(org|com)"
MACHINE_PATHS = r"(?<![\w.>/-])/(work|root|home/\w+|Users/\w+|tmp/venv)/"
LOCKS = r"(^|/)([\w.-]+\.lock|conda-lock\.ya?ml|package-lock\.json|requirements[\w.-]*\.txt)$"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    listing = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    try:
        done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed, so the tracked files are not known")
    if done.returncode != 0:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def findings(pattern: str, files: list[Path]) -> list[str]:
    """`file:line` of each match of `pattern` in the text files among `files`."""
    found = []
    for file in files:
        content = file.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
            if re.search(pattern, line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    return found


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    assert set(SHIPPED) - set(wheel.namelist()) == set()


def test_the_wheel_holds_the_dictionary_its_licence_and_the_typing_mark(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert [name for name in names if re.fullmatch(r"crossattention/recipes/assets/cmudict\.dict\.\w+", name)]
    assert "crossattention/recipes/assets/LICENSE.cmudict" in names
    assert "crossattention/py.typed" in names


def test_the_wheel_holds_nothing_but_the_package_and_its_metadata(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"crossattention", f"crossattention-{PROJECT['version']}.dist-info"}
    assert sum(entry.file_size for entry in wheel.infolist()) < 32 * 2**20


def test_the_wheel_names_its_licences_and_its_command(wheel: zipfile.ZipFile) -> None:
    metadata = f"crossattention-{PROJECT['version']}.dist-info"
    assert {f"{metadata}/licenses/{file}" for file in PROJECT["license-files"]} <= set(wheel.namelist())
    assert "License-Expression: Apache-2.0" in wheel.read(f"{metadata}/METADATA").decode()
    assert "crossattention = crossattention.cli.main:main" in wheel.read(f"{metadata}/entry_points.txt").decode()


def test_licence_files_hold_the_licences() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    dictionary = (ROOT / "src/crossattention/recipes/assets/LICENSE.cmudict").read_text(encoding="utf-8")
    assert "Carnegie Mellon University" in dictionary
    assert "Redistribution and use in source and binary forms" in dictionary


def test_the_changelog_knows_the_version() -> None:
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_lock_file_is_tracked(tracked: list[Path]) -> None:
    names = [file.relative_to(ROOT).as_posix() for file in tracked]
    assert [name for name in names if re.search(LOCKS, name)] == []


def test_no_tracked_file_names_a_package_host(tracked: list[Path]) -> None:
    assert findings(HOSTS, tracked) == []


def test_no_tracked_file_names_a_path_of_one_machine(tracked: list[Path]) -> None:
    assert findings(MACHINE_PATHS, tracked) == []


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (HOSTS, "index" + "-url = https://" + "pypi" + ".org/simple"),
        (MACHINE_PATHS, "cd /" + "work/main"),
        (MACHINE_PATHS, "open('/" + "home/someone/data.tsv')"),
        (LOCKS, "docs/uv.lock"),
        (LOCKS, "requirements-dev.txt"),
    ],
)
def test_a_finding_would_be_seen(pattern: str, line: str) -> None:
    assert re.search(pattern, line)


@pytest.mark.parametrize("line", ["https://example.org/work/x", "runs/home/a", "frame/work/root", "pypi-like text"])
def test_harmless_text_is_no_finding(line: str) -> None:
    assert re.search(f"{HOSTS}|{MACHINE_PATHS}", line) is None
