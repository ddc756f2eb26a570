"""Put the best model of a run into the package, as weights that `load`, `predict` and `evaluate` take by an id.

    python dev/bundle.py RUN ID "COMMAND THAT TRAINED IT"

Writes src/crossattention/recipes/assets/ID: the weights in float16, the model's config, the recipe's description, the scores on the
test part, the run's settings and its log, and a model card. The scores are those of the rounded weights.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from crossattention.checkpoints.files import read_json, read_safetensors, write_json, write_safetensors
from crossattention.recipes.run import evaluate, load_run

ASSETS = Path(__file__).parents[1] / "src" / "crossattention" / "recipes" / "assets"
LARGEST_BYTES = 8_000_000

CARD = """# {id}

Letters to phonemes: how English words are pronounced, without stress (39 phonemes of the CMU Pronouncing Dictionary).

| | |
|---|---|
| model | the 2017 Transformer, encoder and decoder: {encoder_layers} + {decoder_layers} layers, width {dim}, {heads} heads |
| parameters | {parameters:,}, stored in float16, run in float32 |
| data | the dictionary inside this package (sha256 {data}), its training part: no word of the test part, docs/g2p.md |
| trained by | `{command}`, {steps:,} steps in {minutes:.0f} minutes on {threads} |
| chosen | step {step:,}, the lowest phoneme error rate on validation words |

On the {words:,} words of the test part, any of a word's pronunciations counting as right:

| beams | word error rate | phoneme error rate, micro |
|---|---|---|
{scores}

`crossattention evaluate {id}` gives the first row, with `--beams 4` the second. `metrics.jsonl` is the log of the run,
`training.json` its settings.

What it is for: words that no dictionary has. What it is not for: names and words of other languages, of which it has seen few;
stress, which it does not write; homographs, which it cannot tell apart without their sentence.

Licence: Apache-2.0, as this package; the dictionary that it was trained on is under its own licence (LICENSE.cmudict).
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run", type=Path)
    options.add_argument("id")
    options.add_argument("command")
    given = options.parse_args()
    target = ASSETS / given.id
    if target.exists():
        raise SystemExit(f"{target} exists; delete it first")
    best = given.run / "best"
    weights = {name: tensor.half() for name, tensor in read_safetensors(best / "model.safetensors").items()}
    target.mkdir(parents=True)
    write_safetensors(target / "model.safetensors", weights)
    size = (target / "model.safetensors").stat().st_size
    if size > LARGEST_BYTES:
        shutil.rmtree(target)
        raise SystemExit(f"the weights take {size:,} bytes in float16, more than {LARGEST_BYTES:,}")
    for name in ("config.json", "task.json"):
        shutil.copyfile(best / name, target / name)
    shutil.copyfile(given.run / "metrics.jsonl", target / "metrics.jsonl")
    settings = read_json(given.run / "config.json")["training"]
    write_json(target / "training.json", settings)

    step = read_json(best / "scores.json")["step"]
    write_json(target / "scores.json", {"step": step})
    loaded = load_run(target)
    found = {beams: evaluate(loaded, beams=beams) for beams in (1, 4)}
    write_json(target / "scores.json", {"step": step, "metrics": {f"beams={b}": scores for b, scores in found.items()}})
    (target / "README.md").write_text(card(given, target, step, settings, found), encoding="utf-8")
    print((target / "README.md").read_text(encoding="utf-8"))


def card(given: argparse.Namespace, target: Path, step: int, settings: dict, found: dict[int, dict[str, float]]) -> str:
    """The model card."""
    log = [json.loads(line) for line in (target / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shape = read_json(target / "config.json")["config"]
    threads = settings["threads"] or torch.get_num_threads()
    parameters = sum(tensor.numel() for tensor in load_run(target).model.parameters())
    rows = [f"| {beams} | {100 * s['wer']:.1f} % | {100 * s['per']:.1f} % |" for beams, s in found.items()]
    return CARD.format(
        id=given.id,
        command=given.command,
        parameters=parameters,
        data=read_json(target / "task.json")["data"]["sha256"][:12],
        steps=max(entry["step"] for entry in log),
        minutes=max(entry["seconds"] for entry in log if "seconds" in entry) / 60,
        threads="one CPU thread" if threads == 1 else f"{threads} CPU threads",
        step=step,
        words=int(found[1]["words"]),
        scores="\n".join(rows),
        **{name: shape[name] for name in ("encoder_layers", "decoder_layers", "dim", "heads")},
    )


if __name__ == "__main__":
    main()
