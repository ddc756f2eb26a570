"""Folders of runs, as the training loop leaves them, without a training."""

from crossattention.checkpoints.files import write_json


def write_run(folder, task, model, *, step=None):
    """The folder of a run with the model as its best one; the step of the weights is told where it is given."""
    best = folder / "best"
    model.save_pretrained(best)
    write_json(best / "task.json", task.describe())
    if step is not None:
        write_json(best / "scores.json", {"step": step, "metrics": {}})
    return folder
