"""Scores of predicted sequences: phoneme and word error rates against several references, and text metrics.

What lives here: numbers from strings. What does not: how the predictions were made, or which items are held out.
Phoneme scores need nothing beyond Python; BLEU, chrF and the error rates of texts come from sacrebleu and jiwer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

TextMetric = Literal["bleu", "chrf", "cer", "wer", "exact"]

LOWER_IS_BETTER: dict[TextMetric, bool] = {"bleu": False, "chrf": False, "cer": True, "wer": True, "exact": False}


@dataclass(frozen=True)
class PronunciationScores:
    """How well words were pronounced, each word against all of its references.

    Args:
        words: how many were scored.
        wer: share of words that equal none of their references.
        per: micro: edits to the closest reference, summed, over the length of those references, summed.
        per_macro: mean over the words of edits / reference length, of the reference where that is least.
    """

    words: int
    wer: float
    per: float
    per_macro: float


def edit_distance(first: Sequence[object], second: Sequence[object]) -> int:
    """The least number of insertions, deletions and substitutions that turn one sequence into the other.

    Cost: len(first) * len(second) steps. Source: Levenshtein 1966; the rows of Wagner and Fischer 1974.

    Example:
        >>> edit_distance("K AE T".split(), "K AA T S".split())
        2
    """
    if first == second:
        return 0
    above = list(range(len(second) + 1))
    for row, item in enumerate(first, start=1):
        corner, above[0] = above[0], row
        for column, other in enumerate(second, start=1):
            step = corner if item == other else 1 + min(corner, above[column], above[column - 1])
            corner, above[column] = above[column], step
    return above[-1]


def score_pronunciations(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> PronunciationScores:
    """Score one predicted pronunciation a word against all of its references.

    WER counts a word as right where it equals any reference. PER (micro) sums edits and lengths of the closest
    reference, the first of equally close ones; PER (macro) takes for each word the least edits / length. Both can
    exceed 1, when predictions are longer than their references.

    Args:
        predictions: phones between spaces, one a word; "" where nothing was predicted.
        references: all pronunciations of each word; none empty.

    Returns:
        The three rates, as fractions of 1.

    Raises:
        ValueError: no words, differing counts, or a word without a reference or with an empty one.

    Cost: some 0.4 s for 10,000 words.
    Source: the any-reference rule of g2p-seq2seq; closest reference and macro mean: Wu et al. 2021.

    Example:
        >>> score_pronunciations(["K AE T", "D AO"], [["K AE T"], ["D AO G", "D AA G"]])
        PronunciationScores(words=2, wer=0.5, per=0.16666666666666666, per_macro=0.16666666666666666)
    """
    _check_counts(predictions, references)
    wrong = edits = length = 0
    ratios = 0.0
    for index, (prediction, choices) in enumerate(zip(predictions, references, strict=True)):
        phones = prediction.split()
        split_choices = [choice.split() for choice in choices]
        if not split_choices or not all(split_choices):
            raise ValueError(f"expected at least one reference and none empty, got {list(choices)} for word {index}")
        distances = [edit_distance(phones, choice) for choice in split_choices]
        closest = min(range(len(distances)), key=distances.__getitem__)
        wrong += distances[closest] > 0
        edits += distances[closest]
        length += len(split_choices[closest])
        ratios += min(distance / len(choice) for distance, choice in zip(distances, split_choices, strict=True))
    words = len(predictions)
    return PronunciationScores(words, wrong / words, edits / length, ratios / words)


def check_text_metrics(metrics: Sequence[TextMetric]) -> None:
    """Check, before any training, that metrics exist and that what computes them is installed.

    Raises:
        ValueError: an unknown metric, or none.
        ModuleNotFoundError: its library is missing; the command that installs it is named.
    """
    if not metrics:
        raise ValueError(f"expected at least one metric among {', '.join(LOWER_IS_BETTER)}, got none")
    for metric in metrics:
        if metric not in LOWER_IS_BETTER:
            raise ValueError(f"expected metrics among {', '.join(LOWER_IS_BETTER)}, got {metric!r}")
        if metric in ("bleu", "chrf"):
            _sacrebleu()
        elif metric in ("cer", "wer"):
            _jiwer()


def score_texts(predictions: Sequence[str], references: Sequence[str], metrics: Sequence[TextMetric]) -> dict[str, float]:
    """Score one predicted text an item against its reference.

    Args:
        predictions: texts; "" where nothing was predicted.
        references: one an item, none empty.
        metrics: "bleu" and "chrf" (0 to 100, corpus level, sacrebleu's defaults), "cer" and "wer" (edits over
            reference length, characters and words, corpus level, jiwer), "exact" (share that equals its reference).

    Returns:
        Each metric by its name.

    Raises:
        ValueError: no items, differing counts, an empty reference, an unknown metric.
        ModuleNotFoundError: a metric's library is missing; the command that installs it is named.

    Example:
        >>> score_texts(["a b"], ["a b"], ["exact"])
        {'exact': 1.0}
    """
    _check_counts(predictions, references)
    check_text_metrics(metrics)
    empty = [index for index, reference in enumerate(references) if not reference.strip()]
    if empty:
        raise ValueError(f"expected references that are not empty, got an empty one at item {empty[0]}")
    return {metric: _score_text(metric, list(predictions), list(references)) for metric in metrics}


def _score_text(metric: TextMetric, predictions: list[str], references: list[str]) -> float:
    if metric == "bleu":
        return float(_sacrebleu().corpus_bleu(predictions, [references]).score)
    if metric == "chrf":
        return float(_sacrebleu().corpus_chrf(predictions, [references]).score)
    if metric == "cer":
        return float(_jiwer().cer(references, predictions))
    if metric == "wer":
        return float(_jiwer().wer(references, predictions))
    pairs = zip(predictions, references, strict=True)
    return sum(prediction == reference for prediction, reference in pairs) / len(references)


def _check_counts(predictions: Sequence[str], references: Sequence[object]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"expected one prediction an item, got {len(predictions)} for {len(references)} references")
    if not predictions:
        raise ValueError("expected at least one item to score, got none")


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("BLEU and chrF need sacrebleu; install it with: pip install 'crossattention[data]'") from error
    return sacrebleu


def _jiwer() -> Any:
    try:
        import jiwer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("CER and WER need jiwer; install it with: pip install 'crossattention[data]'") from error
    return jiwer
