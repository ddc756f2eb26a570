"""Where does a g2p model err: by length, by kind of word, by sound, by stress?

    python benchmarks/g2p_errors.py RUN [--beams 4] [--words /usr/share/dict/american-english] [--json FILE]

Scores a run (a folder, or weights inside the package) on the test words, unstressed, any pronunciation right. A prediction is set
beside its closest reference, phoneme by phoneme, along the cheapest edits; the dictionary's stress marks tell stressed vowels from
others. With a list of English words, one a line (Debian's package wamerican has one), words are told apart by it: those it has in
small letters, those it has with a capital only, which are names, and those that it does not have.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from machine import machine, print_machine

from crossattention.recipes.cmudict import without_stress
from crossattention.recipes.g2p import words_by_part
from crossattention.recipes.run import Run, load_run
from crossattention.recipes.scores import edit_distance

LENGTHS = ((1, 4), (5, 6), (7, 8), (9, 10), (11, 13), (14, 99))
ABSENT = "-"
"""Stands for no phoneme, where one was left out or put in."""


@dataclass(frozen=True)
class Answer:
    """One test word: what was predicted, and the reference that is closest to it, with its stress marks."""

    word: str
    predicted: tuple[str, ...]
    reference: tuple[str, ...]

    @property
    def edits(self) -> int:
        """Phonemes that differ."""
        return edit_distance(self.predicted, [plain(phone) for phone in self.reference])


def plain(phone: str) -> str:
    """A phoneme without its stress mark."""
    return phone.rstrip("012")


def answers(run: Run, beams: int) -> list[Answer]:
    """The run's answers to all test words, each beside its closest reference."""
    references = words_by_part(stressed=True)["test"]
    words = list(references)
    predictions = run.translator.predict_all(words, beams=beams)
    found = []
    for word, prediction in zip(words, predictions, strict=True):
        phones = tuple(without_stress(prediction.text).split())
        choices = [tuple(reference.split()) for reference in references[word]]
        closest = min(choices, key=lambda choice: edit_distance(phones, [plain(phone) for phone in choice]))
        found.append(Answer(word, phones, closest))
    return found


def aligned(answer: Answer) -> Iterator[tuple[str, str]]:
    """Pairs (predicted, reference with stress) along the cheapest edits; `ABSENT` on one side of an insertion or deletion."""
    first, second = answer.predicted, answer.reference
    if answer.edits == 0:
        yield from zip(first, second, strict=True)
        return
    costs = [
        [edit_distance(first[i:], [plain(p) for p in second[j:]]) for j in range(len(second) + 1)] for i in range(len(first) + 1)
    ]
    i = j = 0
    while i < len(first) or j < len(second):
        if i < len(first) and j < len(second) and costs[i][j] == costs[i + 1][j + 1] + (first[i] != plain(second[j])):
            yield first[i], second[j]
            i, j = i + 1, j + 1
        elif i < len(first) and costs[i][j] == costs[i + 1][j] + 1:
            yield first[i], ABSENT
            i += 1
        else:
            yield ABSENT, second[j]
            j += 1


def rates(some: list[Answer]) -> dict[str, float]:
    """Words, and the two error rates."""
    length = sum(len(answer.reference) for answer in some)
    wrong = sum(answer.edits > 0 for answer in some)
    edits = sum(answer.edits for answer in some)
    return {"words": len(some), "wer": wrong / max(1, len(some)), "per": edits / max(1, length)}


def kind_by(listed: Path) -> Callable[[str], str]:
    """What a list of English words says of a word."""
    lines = set(listed.read_text(encoding="utf-8").split())
    return lambda word: "in small letters" if word in lines else "a name" if word.capitalize() in lines else "not listed"


def by_group(found: list[Answer], group: Callable[[Answer], str]) -> dict[str, dict[str, float]]:
    """The rates of each group, in the order of their names."""
    groups: dict[str, list[Answer]] = {}
    for answer in found:
        groups.setdefault(group(answer), []).append(answer)
    return {name: rates(some) for name, some in sorted(groups.items())}


def length_of(answer: Answer) -> str:
    """The range of lengths that a word falls in."""
    first, last = next(pair for pair in LENGTHS if pair[0] <= len(answer.word) <= pair[1])
    return f"{first:>2} to {last}" if last < 99 else f"{first} and more"


def by_sound(found: list[Answer]) -> tuple[dict[str, dict[str, float]], Counter[tuple[str, str]]]:
    """How often each kind of phoneme of the references is predicted otherwise, and the commonest mistakes."""
    seen: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    mistakes: Counter[tuple[str, str]] = Counter()
    for answer in found:
        for predicted, reference in aligned(answer):
            kind = "put in" if reference == ABSENT else _sound(reference)
            seen[kind] += 1
            if predicted != plain(reference):
                wrong[kind] += 1
                mistakes[plain(reference), predicted] += 1
    del seen["put in"]
    sounds = {kind: {"phonemes": count, "rate": wrong[kind] / count} for kind, count in sorted(seen.items())}
    return sounds, mistakes


def _sound(reference: str) -> str:
    if reference[-1] not in "012":
        return "consonant"
    return {"0": "vowel, unstressed", "1": "vowel, primary stress", "2": "vowel, secondary stress"}[reference[-1]]


def print_groups(head: str, groups: dict[str, dict[str, float]]) -> None:
    """A table of rates in Markdown."""
    print(f"\n| {head} | words | word error rate | phoneme error rate |\n|---|---|---|---|")
    for name, found in groups.items():
        print(f"| {name.strip()} | {found['words']:,} | {100 * found['wer']:.1f} % | {100 * found['per']:.1f} % |")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run")
    options.add_argument("--beams", type=int, default=4)
    options.add_argument("--words", type=Path, help="a list of English words, one a line")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    print_machine()
    run = load_run(given.run)
    if run.recipe != "g2p":
        raise SystemExit(f"expected a run of g2p, {given.run} is one of {run.recipe}")
    found = answers(run, given.beams)
    groups = {"all": {"all": rates(found)}, "letters": by_group(found, length_of)}
    if given.words is not None:
        kind = kind_by(given.words)
        groups["in the list"] = by_group(found, lambda answer: kind(answer.word))
    for head, some in groups.items():
        print_groups(head, some)
    sounds, mistakes = by_sound(found)
    print("\n| sound of the reference | number | predicted otherwise |\n|---|---|---|")
    for name, some in sounds.items():
        print(f"| {name} | {some['phonemes']:,} | {100 * some['rate']:.1f} % |")
    total = sum(mistakes.values())
    print(f"\n| reference | predicted | of all {total:,} mistakes |\n|---|---|---|")
    for (reference, predicted), count in mistakes.most_common(12):
        print(f"| {reference} | {predicted} | {100 * count / total:.1f} % |")
    if given.json:
        worst = [[*pair, count] for pair, count in mistakes.most_common(50)]
        report = {
            "machine": machine(),
            "run": given.run,
            "beams": given.beams,
            "groups": groups,
            "sounds": sounds,
            "mistakes": worst,
        }
        given.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
