"""The `crossattention` command: finds the verb, runs it, and turns the user's faults into one sentence.

One verb a file; each offers `run(arguments, prog) -> int`. Nothing heavy is imported before a verb is known, so that
`crossattention --help` answers at once.
"""

import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence

# Verb -> (module, what it does). The whole command line in one table.
VERBS = {
    "train": ("crossattention.cli.train", "train a model: `train g2p`, `train seq2seq --data pairs.tsv`"),
    "evaluate": ("crossattention.cli.evaluate", "score a run on the examples it has never seen"),
    "predict": ("crossattention.cli.predict", "ask a run: words as arguments, or one a line on standard input"),
    "view": ("crossattention.cli.view", "show what a run reads of an input: one HTML page, or a PNG or SVG figure"),
    "convert": ("crossattention.cli.convert", "turn a model folder of another library into one of ours, or the way back"),
    "index": ("crossattention.cli.index", "make a chunk database of text: `index FOLDER... --out DB`"),
    "neighbours": ("crossattention.cli.neighbours", "show the chunks of a database that are nearest to a text"),
    "plan": ("crossattention.cli.plan", "show every evaluation order of a cross-attention, its cost, and the choice"),
}

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

# What a user can mend: a wrong value, a missing or unreadable file, a missing extra, a loss that is not finite.
# All else is our fault, and its traceback is worth seeing.
USER_FAULTS = (ValueError, OSError, ImportError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: the words after `crossattention`; None takes them from `sys.argv`.

    Returns:
        The exit code: 0 done, 2 the user's fault (one sentence on stderr), 1 ours (a traceback), 130 Ctrl-C,
        141 the reader of our output went away.

    Cost: `--help` and `--version` import nothing outside the standard library.
    """
    arguments, is_debug = _without_debug(sys.argv[1:] if argv is None else list(argv))
    _survive_narrow_encodings()
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # tyro's way of saying --help and wrong flags
        return _exit_code(stop)
    except KeyboardInterrupt as stop:
        _say(str(stop) or "interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return EXIT_BROKEN_PIPE
    except USER_FAULTS as fault:
        if is_debug:
            raise
        _say(f"error: {_sentence(fault)}")
        return EXIT_USER


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(_help())
        return EXIT_OK if arguments else EXIT_USER
    verb, rest = arguments[0], arguments[1:]
    if verb in {"-V", "--version", "version"}:
        print(f"crossattention {_version()}")
        return EXIT_OK
    if verb not in VERBS:
        raise ValueError(unknown("verb", verb, list(VERBS), "crossattention --help"))
    return importlib.import_module(VERBS[verb][0]).run(rest, prog=f"crossattention {verb}")


def unknown(kind: str, word: str, known: list[str], help_command: str) -> str:
    """The sentence for a word that is none of the known ones, with the nearest of them."""
    near = [] if word.startswith("-") else difflib.get_close_matches(word, known, n=1, cutoff=0.5)  # a flag is no misspelt name
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
    return f"there is no {kind} {word!r}; {hint} See `{help_command}`."


def _help() -> str:
    lines = [
        "usage: crossattention VERB ...",
        "",
        "Cross-attention between two sequences: train, ask, look inside.",
        "",
    ]
    lines += [f"  {verb:<12}{what}" for verb, (_, what) in VERBS.items()]
    lines += [
        "",
        "  VERB --help   the flags of a verb",
        "  --version     the version",
        "  --debug       show the traceback of an error (with any verb)",
        "",
        "Start here: crossattention train g2p",
    ]
    return "\n".join(lines)


def _version() -> str:
    from importlib.metadata import version

    return version("crossattention")


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` out, wherever it stands before a `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = [argument for argument in arguments[:end] if argument != "--debug"]
    return flags + arguments[end:], len(flags) < end


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return EXIT_OK
    return stop.code if isinstance(stop.code, int) else EXIT_USER


def _sentence(fault: Exception) -> str:
    if isinstance(fault, OSError) and fault.strerror:
        named = f"{fault.filename}: " if fault.filename is not None else ""
        return f"{named}{fault.strerror}"
    return str(fault) or type(fault).__name__


def _say(sentence: str) -> None:
    print(f"crossattention: {sentence}", file=sys.stderr)


def _survive_narrow_encodings() -> None:
    """Write what a terminal without UTF-8 cannot show as escapes, instead of dying on it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """Point stdout nowhere, so that the interpreter's last flush does not fail again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stdout without a file behind it, as under a test
        pass


if __name__ == "__main__":
    sys.exit(main())
