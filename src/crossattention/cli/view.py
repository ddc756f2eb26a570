"""`crossattention view`: what a run read of an input, as one HTML page or as a figure."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from crossattention.recipes.recipe import Input, Run
    from crossattention.views.content import AttentionLayer, AttentionView, FeedForwardView, MemoryLayer, Side

LONGEST_NAME = 40


@dataclass(frozen=True)
class ViewArguments:
    """Show what a run reads of an input: one HTML file that opens from disk, or a figure as PNG or SVG.

    Args:
        run: folder of the run.
        input: what to read: a text, the name of a file, or several words, as the run's recipe has it. With --feed-forward it may be
            left out: one of the run's own training texts is read then.
        out: file to write, ending in .html, .png or .svg; attention-INPUT.html in this folder where it is not given.
        answer: the output to look at, in the place of the run's own.
        layer: the layer to show first, or in a figure; the mean of all where it is not given.
        head: the head of that layer; the mean of all where it is not given.
        feed_forward: show the decoder's feed-forward layers as memories instead: which keys fire, what their values promote,
            and on which training texts.
        json: print the numbers as one JSON object; a file is then written only where one is named.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    input: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT [...]")] = ()
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    answer: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    layer: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    head: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    feed_forward: bool = False
    json: bool = False


def run(arguments: Sequence[str], *, prog: str) -> int:
    """Write the file, or print the numbers."""
    given = tyro.cli(ViewArguments, args=arguments, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))

    from crossattention.cli.weights import load_and_say, measuring
    from crossattention.views.figures import FORMATS, write_figure
    from crossattention.views.files import checked_path
    from crossattention.views.pages import write_page
    from crossattention.views.selection import check_choice

    out = given.out if given.out is not None or given.json else Path(_name(" ".join(given.input) or "feed-forward"))
    if out is not None:
        checked_path(out, (".html", *FORMATS))  # before the work, not after it
    loaded = load_and_say(given.run)
    if given.feed_forward and not loaded.shows_feed_forward:
        raise ValueError(f"a run of {loaded.recipe} does not show its feed-forward layers; leave out --feed-forward")
    asked = loaded.sample_input() if given.feed_forward and not given.input else _asked(loaded, given.input)
    with measuring("reading the input") as show:
        view = _view(loaded, asked, given, show)
    check_choice(view, given.layer, given.head)
    if out is not None:
        write: Callable[..., Path] = write_page if out.suffix.lower() == ".html" else write_figure
        write(view, out, layer=given.layer, head=given.head)
    if given.json:
        print(json.dumps(_facts(loaded, asked, given, view, out), ensure_ascii=False))
    else:
        print(out)
    return 0


def _asked(loaded: "Run", words: Sequence[str]) -> "Input":
    """The words as the run is asked them: one text, or as many as its inputs have names.

    Raises:
        ValueError: another number of words.
    """
    names = loaded.input_names
    if len(words) != len(names):
        count = "one word" if len(names) == 1 else f"{len(names)} words"
        found = f"{len(words)}: {' '.join(words)}" if words else "none"
        raise ValueError(f"a run of {loaded.recipe} reads {count}, {' '.join(names)}; got {found}")
    return words[0] if len(names) == 1 else tuple(words)


def _view(
    loaded: "Run", asked: "Input", given: ViewArguments, show: Callable[[int, int], None]
) -> "AttentionView | FeedForwardView":
    if given.feed_forward:
        return loaded.feed_forward_view(asked, given.answer, on_progress=show)
    return loaded.view(asked, given.answer)


def _name(text: str) -> str:
    """A file name out of an input: its letters and digits, whatever else it holds."""
    letters = re.sub(r"\W+", "-", text).strip("-")[:LONGEST_NAME]
    return f"attention-{letters or 'input'}.html"


def _facts(
    loaded: "Run", asked: "Input", given: ViewArguments, view: "AttentionView | FeedForwardView", out: Path | None
) -> dict[str, Any]:
    """All that the view shows, its numbers included."""
    from crossattention.cli.weights import weights_digest
    from crossattention.views.content import FeedForwardView

    facts = {"run": str(given.run), "recipe": loaded.recipe, "step": loaded.step, "sha256": weights_digest(loaded)}
    facts |= {"input": asked, "title": view.title, "file": None if out is None else str(out)}
    if isinstance(view, FeedForwardView):
        return {**facts, "tokens": view.tokens.tokens, "layers": [_memory(layer) for layer in view.layers]}
    layers = [_layer(layer) for layer in view.layers]
    return {**facts, "queries": _side(view.queries), "context": _side(view.context), "layers": layers}


def _side(side: "Side") -> Any:
    """The tokens of a text; of other sides how their positions lie."""
    from crossattention.views.content import ImageSide, SoundSide, TextSide

    if isinstance(side, TextSide):
        return side.tokens
    if isinstance(side, ImageSide):
        return {"kind": "image", "leading": side.leading, "rows": side.rows, "columns": side.columns}
    if isinstance(side, SoundSide):
        seconds = round(float(side.seconds_per_position or 0), 6)
        return {"kind": "sound", "positions": side.positions, "seconds_per_position": seconds}
    return {"kind": "long", "positions": side.length, "labels": dict(side.labels)}


def _layer(layer: "AttentionLayer") -> dict[str, Any]:
    """All weights of a layer, or where these were never held, those that were."""
    facts: dict[str, Any] = {"name": layer.name, "kind": layer.kind}
    if layer.weights is not None:
        return {**facts, "weights": _rounded(layer.weights)}
    return {**facts, "top_indices": layer.top_indices.tolist(), "top_weights": _rounded(layer.top_weights)}


def _memory(layer: "MemoryLayer") -> dict[str, Any]:
    keys = {str(key): asdict(found) for key, found in layer.keys.items()}
    top = {
        "top_keys": layer.top_keys.tolist(),
        "coefficients": layer.coefficients.tolist(),
        "num_firing": layer.num_firing.tolist(),
    }
    return {
        "name": layer.name,
        "size": layer.size,
        **top,
        "agreement": layer.agreement,
        "num_triggered": layer.num_triggered,
        "keys": keys,
    }


def _rounded(weights: Any) -> Any:
    """Nested lists with six decimals: float32 has no more."""
    return [[[round(weight, 6) for weight in row] for row in head] for head in weights.tolist()]
