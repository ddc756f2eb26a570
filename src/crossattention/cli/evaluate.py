"""`crossattention evaluate`: the scores of a run on the examples that its training never saw."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class EvaluateArguments:
    """Score a run on its test part, which training never saw.

    Args:
        run: folder of the run.
        beams: width of the beam search, for a run that writes text; 1, which is greedy, where it is not given.
        json: print one JSON object in the place of the table.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    beams: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    json: bool = False


def run(arguments: Sequence[str], *, prog: str) -> int:
    """Print the scores."""
    given = tyro.cli(EvaluateArguments, args=arguments, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))

    from crossattention.cli.lines import score_table
    from crossattention.cli.weights import load_and_say, measuring, weights_digest
    from crossattention.recipes.run import check_beams, evaluate

    loaded = load_and_say(given.run)
    check_beams(loaded, given.beams)
    with measuring("scoring the examples that it has never seen") as show:
        found = evaluate(loaded, beams=given.beams, on_progress=show)
    if given.json:
        facts = {"run": str(given.run), "recipe": loaded.recipe, "step": loaded.step}
        if loaded.has_beams:
            facts["beams"] = given.beams or 1
        print(json.dumps({**facts, "sha256": weights_digest(loaded), "scores": found}))
    else:
        print("\n".join(score_table(found, loaded.subsets)))
    return 0
