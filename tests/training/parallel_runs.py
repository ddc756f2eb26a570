"""A recipe, made small, trained by one process or several.

python parallel_runs.py RECIPE DATA OUT STEPS PARALLEL [resume]     prints each event's step and loss as JSON
python parallel_runs.py RECIPE DATA evaluate                        prints the scores of a new model, and how many batches it did

Alone, or started by `processes.run_processes`. Without dropout, as several processes draw other numbers than one.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from crossattention.training.config import TrainConfig
from crossattention.training.events import Evaluated, Finished, Started, Step
from crossattention.training.loop import train
from crossattention.training.processes import Processes
from crossattention.training.randomness import seed_everything
from processes import join

STILL = {"dim": 16, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "feed_forward_dim": 24, "dropout": 0.0}


def make_task(recipe: str, data: Path):
    """The task of a recipe on small data in a folder, which is written if it is not there."""
    from crossattention.recipes.pair_task import ModelShape

    if recipe == "g2p":
        from crossattention.recipes.g2p import G2PConfig, G2PTask

        return G2PTask(G2PConfig(evaluation_words=4, model=ModelShape(**STILL), tokens_per_batch=400))
    if recipe == "seq2seq":
        data = data.with_suffix(".tsv")
        from crossattention.recipes.seq2seq import Seq2SeqConfig, Seq2SeqTask
        from recipes.reversing_words import write_reversed_words

        if not data.exists():
            write_reversed_words(data)
        shape = ModelShape(**STILL)
        return Seq2SeqTask(Seq2SeqConfig(data, target_tokens="words", metrics=("exact",), tokens_per_batch=150, model=shape))
    if recipe == "vqa":
        from crossattention.recipes.vqa import VQATask
        from recipes.pictures import tiny_config, write_pictures

        return VQATask(tiny_config(data if data.exists() else write_pictures(data)))
    if recipe == "images":
        from recipes.test_images import TINY, ImagesConfig, ImagesTask, write_folder

        folder = data if data.exists() else write_folder(data)
        return ImagesTask(ImagesConfig(folder, image_size=16, shift=1, batch_size=7, model=TINY))
    if recipe == "bytes":
        from recipes.test_byte_text import SMALL, WORDS, BytesConfig, BytesTask

        if not data.exists():
            data.mkdir()
            for index in range(12):
                (data / f"{index}.txt").write_text(" ".join(WORDS[(index * place) % 5] for place in range(200)))
        return BytesTask(BytesConfig(data=data, length=32, batch_size=5, evaluation_windows=4, test_windows=4, model=SMALL))
    if recipe == "listen":
        from crossattention.recipes.listen import ListenConfig, ListenTask
        from recipes.singing import RATE, write_songs

        folder = data if data.exists() else write_songs(data, lengths=(3, 5), count=30)
        small = {"sample_rate": RATE, "bands": 20, "reduction": 2, "tokens_per_batch": 500}
        return ListenTask(ListenConfig(data=folder, model=ModelShape(**STILL), **small))
    if recipe == "retro":
        from recipes.test_retro import SMALL, RetroTask, RetroTextConfig, database_of, write_copies

        db = data / "db"
        if not db.exists():
            database_of(write_copies(data / "text", documents=12, passages=8, words=12), db)
        return RetroTask(RetroTextConfig(db=db, chunks=3, batch_size=5, evaluation_windows=4, test_windows=6, model=SMALL))
    raise ValueError(recipe)


def config_of(recipe: str, steps: int, parallel: str) -> TrainConfig:
    optimizer = "muon" if recipe == "images" else "adamw"
    more = {"log_every": 1, "warmup_steps": 1, "schedule": "constant", "optimizer": optimizer, "device": "cpu", "threads": 1}
    return TrainConfig(steps=steps, evaluate_every=4, learning_rate=2e-3, parallel=parallel, **more)


def evaluate(task, config: TrainConfig) -> None:
    """Scores of a model of random weights, by all processes, in batches of which there are several."""
    from crossattention.recipes import byte_text, images, retro, translator, vqa

    translator._SYMBOLS_TOGETHER = 1
    for module in (byte_text, images, retro, vqa):
        module._TOGETHER = 1
    processes = Processes(config)
    seed_everything(0)
    model = task.build_model().eval()
    done = 0
    shared = processes.together()

    def counting(work, items, plain=shared.map):
        def counted(item):
            nonlocal done
            done += 1
            return work(item)

        return plain(counted, items)

    shared.map = counting
    with torch.no_grad():
        evaluation = task.evaluate(model, shared)
    shared.finish()
    print(json.dumps({"metrics": evaluation.metrics, "batches": done, "sample": evaluation.sample is not None}), flush=True)


def main() -> None:
    recipe, data, *rest = sys.argv[1:]
    if "MEETING_FILE" in os.environ:
        join()
    task = make_task(recipe, Path(data))
    if rest == ["evaluate"]:
        torch.set_num_threads(1)
        evaluate(task, config_of(recipe, 1, "ddp"))
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    out, steps, parallel = rest[:3]
    for event in train(task, config_of(recipe, int(steps), parallel), out, resume=rest[3:] == ["resume"]):
        if isinstance(event, Step):
            print(json.dumps({"step": event.step, "loss": event.loss, "norm": event.gradient_norm}), flush=True)
        elif isinstance(event, Evaluated):
            print(json.dumps({"evaluated": event.step, **event.metrics}), flush=True)
        elif isinstance(event, Started):
            print(json.dumps({"parameters": event.parameters, "notes": event.notes}), flush=True)
        elif isinstance(event, Finished):
            print(json.dumps({"finished": event.step}), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
