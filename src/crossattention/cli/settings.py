"""What one `train` command line asks for: the recipe's settings, the training's, and where the run lies."""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from crossattention.cli.flags import config_of, flags_of
from crossattention.recipes.listing import RECIPES

if TYPE_CHECKING:
    from crossattention.recipes.recipe import RecipeTask
    from crossattention.training.config import TrainConfig


LENGTHS = ("minutes", "steps", "epochs")


@dataclass(frozen=True)
class Place:
    """Where the run lies.

    Args:
        out: folder of the run; made where it does not exist.
        resume: go on with the run in `out`; its own settings are the defaults.
    """

    out: Path
    resume: bool = False


@dataclass(frozen=True)
class Order:
    """What a command line asks for.

    Args:
        recipe: its name.
        run: the folder, and whether its run goes on.
        config: the recipe's settings.
        training: the training's settings.
    """

    recipe: str
    run: Place
    config: Any
    training: "TrainConfig"

    @property
    def resume_command(self) -> str:
        """What to type to go on after a stop."""
        return shlex.join(["crossattention", "train", self.recipe, "--out", str(self.run.out), "--resume"])

    def build_task(self) -> "RecipeTask":
        """Read the data."""
        return RECIPES[self.recipe].load().TASK(self.config, seed=self.training.seed)


def read_order(name: str, arguments: Sequence[str], *, prog: str) -> Order:
    """Read the flags of a recipe.

    Args:
        name: of the recipe.
        arguments: the words after it.
        prog: the words up to it, for the help.

    Raises:
        ValueError: a setting out of range, or nothing to resume.
        SystemExit: the help was asked for, or a flag is wrong; both are already printed.
    """
    from crossattention.training.config import TrainConfig

    recipe = RECIPES[name].load()
    config_class = recipe.CONFIG
    place = Place(out=Path("runs") / name)
    config, training = None, recipe.default_training()
    if "--resume" in arguments and not {"-h", "--help"} & set(arguments):
        resumed, _ = tyro.cli(Place, default=place, args=arguments, prog=prog, return_unknown_args=True)
        config, training = _settings_of_run(name, resumed.out)

    lengths = {length: getattr(training, length) for length in LENGTHS}
    default = next(f"(default: {value:g} {length})" for length, value in lengths.items() if value is not None)
    parts = [
        ("run", Place, dataclasses.field(default=place)),
        ("training", flags_of(TrainConfig, training, unset=dict.fromkeys(LENGTHS, default))),
        ("recipe", flags_of(config_class, config)),
    ]
    flags = dataclasses.make_dataclass("Flags", parts, frozen=True, kw_only=True)
    flags.__doc__ = f"Train {RECIPES[name].what}."
    options = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    given: Any = tyro.cli(flags, args=arguments, prog=prog, config=options)

    is_length_given = any(getattr(given.training, length) is not None for length in LENGTHS)
    chosen = config_of(TrainConfig, given.training, **({} if is_length_given else lengths))
    return Order(name, given.run, config_of(config_class, given.recipe), chosen)


def _settings_of_run(recipe: str, out: Path) -> tuple[Any, "TrainConfig"]:
    """The settings that the run in a folder was begun with."""
    from crossattention.training.config import TrainConfig
    from crossattention.training.folder import RunFolder

    folder = RunFolder(out)
    if not folder.config_file.is_file():
        raise ValueError(f"{out} holds no run to resume (no config.json in it): begin one without --resume")
    stored = folder.read_config()
    name = stored["task"].get("recipe")
    if name != recipe:
        raise ValueError(f"the run in {out} is of the recipe {name}, not {recipe}: crossattention train {name} resumes it")
    config = RECIPES[recipe].load().config_from_json(stored["task"]["config"])
    return config, TrainConfig.from_json(stored["training"])
