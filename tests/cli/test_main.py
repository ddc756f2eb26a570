"""The entry: verbs, exit codes, and the user's faults as one sentence."""

import io
import re
import subprocess
import sys
import types

import pytest

from cli.conftest import type_in
from crossattention.cli.main import VERBS, main


def with_verb(monkeypatch, run):
    """Let a verb `probe` exist that does `run`."""
    module = types.ModuleType("probe")
    module.run = lambda arguments, *, prog: run()
    monkeypatch.setitem(sys.modules, "probe", module)
    monkeypatch.setitem(VERBS, "probe", ("probe", "for this test"))


def failing(fault):
    def run():
        raise fault

    return run


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_names_every_verb(flag):
    code, stdout, stderr = type_in(flag)
    assert (code, stderr) == (0, "")
    assert all(re.search(rf"^  {verb} ", stdout, re.MULTILINE) for verb in ("train", "evaluate", "predict", "plan"))


def test_no_verb_shows_the_help_and_fails():
    assert type_in()[:2] == (2, type_in("--help")[1])


def test_version_is_the_installed_one():
    from crossattention import __version__

    assert type_in("--version") == (0, f"crossattention {__version__}\n", "")


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("predcit", "predict"), ("evalute", "evaluate")])
def test_an_unknown_verb_is_answered_with_the_nearest(typed, meant):
    code, stdout, stderr = type_in(typed)
    assert (code, stdout) == (2, "")
    expected = f"there is no verb '{typed}'; did you mean '{meant}'? See `crossattention --help`."
    assert stderr == f"crossattention: error: {expected}\n"


def test_a_verb_like_none_is_answered_with_all():
    assert f"there are {', '.join(VERBS)}." in type_in("xyzzy")[2]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb):
    code, stdout, stderr = type_in(verb, "--help")
    assert (code, stderr) == (0, "")
    assert f"crossattention {verb}" in stdout


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (ValueError("width 3, expected 4"), "width 3, expected 4"),
        (FileNotFoundError("expected a run at x"), "expected a run at x"),
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (OSError(28, "could not write the checkpoint x: No space left"), "could not write the checkpoint x: No space left"),
        (ModuleNotFoundError("install it with: pip install 'crossattention[data]'"), "crossattention[data]"),
        (FloatingPointError("the loss is nan at step 7"), "the loss is nan at step 7"),
    ],
)
def test_a_fault_of_the_user_is_one_sentence(monkeypatch, fault, sentence):
    with_verb(monkeypatch, failing(fault))
    code, stdout, stderr = type_in("probe")
    assert (code, stdout) == (2, "")
    assert stderr.startswith("crossattention: error: ")
    assert stderr.endswith(f"{sentence}\n") or sentence in stderr
    assert "Traceback" not in stderr


def test_debug_shows_where_it_happened(monkeypatch):
    with_verb(monkeypatch, failing(ValueError("here")))
    for words in (["--debug", "probe"], ["probe", "--debug"]):
        with pytest.raises(ValueError, match="here"):
            main(words)


def test_debug_after_two_dashes_is_a_word_like_any_other(monkeypatch):
    with_verb(monkeypatch, failing(ValueError("here")))
    assert type_in("probe", "--", "--debug")[0] == 2


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    with_verb(monkeypatch, failing(KeyError("ours")))
    with pytest.raises(KeyError, match="ours"):
        main(["probe"])


def test_ctrl_c_is_130_with_what_the_verb_says(monkeypatch):
    with_verb(monkeypatch, failing(KeyboardInterrupt("saved at step 3")))
    assert type_in("probe") == (130, "", "crossattention: saved at step 3\n")
    with_verb(monkeypatch, failing(KeyboardInterrupt()))
    assert type_in("probe") == (130, "", "crossattention: interrupted\n")


def test_a_reader_that_went_away_is_no_fault(monkeypatch):
    with_verb(monkeypatch, failing(BrokenPipeError()))
    assert type_in("probe") == (141, "", "")


def test_the_code_of_a_termination_is_kept(monkeypatch):
    with_verb(monkeypatch, failing(SystemExit(143)))
    assert type_in("probe")[0] == 143


def test_an_output_without_utf8_gets_escapes_not_a_crash(monkeypatch):
    with_verb(monkeypatch, lambda: print("caf\u00e9 \u0259") or 0)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    assert main(["probe"]) == 0
    assert raw.getvalue() == b"caf\xe9 \\u0259\n"


def test_the_installed_command_survives_a_closed_pipe():
    command = f"{sys.executable} -m crossattention.cli.main --help"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | true"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode in (0, 141)  # the pipe may take it all before it is closed
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_help_and_version_import_nothing_heavy_beyond_the_package_itself():
    program = (
        "import crossattention, sys; before = set(sys.modules)\n"
        "from crossattention.cli.main import main\n"
        "main(['--help']); main(['--version'])\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "crossattention"
