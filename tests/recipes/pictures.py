"""A folder of easy-vqa's layout that is made up: squares and lines of two colours on plain backgrounds, 16 x 16 pixels."""

import json

import numpy as np

from crossattention.recipes.vqa import ReaderShape, VQAConfig

TINY = ReaderShape(dim=16, heads=2, layers=2, feed_forward_dim=32, channels=(8,))
COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
SHAPES = {"circle": (4, 4), "rectangle": (4, 8)}  # height and width of what stands for them


def write_pictures(folder, *, train=40, test=12):
    """Write the folder; every picture is asked five questions."""
    from PIL import Image

    generator = np.random.default_rng(0)
    (folder / "train" / "images").mkdir(parents=True)
    (folder / "test" / "images").mkdir(parents=True)
    (folder / "answers.txt").write_text("\n".join(["yes", "no", *COLORS, *SHAPES]), encoding="utf-8")
    for part, count in (("train", train), ("test", test)):
        questions = []
        for number in range(count):
            color, shape = generator.choice(list(COLORS)), generator.choice(list(SHAPES))
            Image.fromarray(draw(generator, color, shape)).save(folder / part / "images" / f"{number}.png")
            questions += [[f"what color is the {shape}?", str(color), number], ["what shape is present?", str(shape), number]]
            questions.append(["is there a red shape?", "yes" if color == "red" else "no", number])
            questions.append(["is there no circle?", "no" if shape == "circle" else "yes", number])
        (folder / part / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    return folder


def draw(generator, color, shape):
    """A picture of one shape at a place of its own."""
    picture = np.full((16, 16, 3), generator.integers(235, 256, 3), dtype=np.uint8)
    height, width = SHAPES[shape]
    top, left = generator.integers(0, 17 - height), generator.integers(0, 17 - width)
    picture[top : top + height, left : left + width] = COLORS[color]
    return picture


def tiny_config(folder, **changes):
    """Settings for such a folder."""
    return VQAConfig(folder, **{"batch_size": 16, "model": TINY, **changes})
