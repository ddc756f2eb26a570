"""easy-vqa: finding, fetching, checking and reading it, on tiny folders of its layout; and the real data where it is."""

import hashlib
import json
import re
import subprocess
import zipfile

import numpy as np
import pytest

from crossattention.data import easy_vqa
from crossattention.data.easy_vqa import (
    Part,
    Question,
    fetch_easy_vqa,
    find_easy_vqa,
    hold_out,
    load_easy_vqa,
    only_images,
    read_easy_vqa,
    read_picture,
    shape_and_color,
    words_of,
)

Image = pytest.importorskip("PIL.Image", reason="pictures need the images extra")


def write_picture(path, color, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write_folder(folder):
    """Two training pictures and one for the test."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.txt").write_text("yes\nno\ncircle\nred\n", encoding="utf-8")
    write_picture(folder / "train/images/0.png", "red")
    write_picture(folder / "train/images/10.png", "blue")
    write_picture(folder / "test/images/0.png", "gray")
    write_questions(folder / "train", [["is there a circle?", "no", 10], ["what color is it?", "red", 0]])
    write_questions(folder / "test", [["what shape is it?", "circle", 0]])
    return folder


def write_questions(part, records):
    (part / "questions.json").write_text(json.dumps(records), encoding="utf-8")


def write_wheel(path, folder, *, more=()):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"easy_vqa/data/{file.relative_to(folder).as_posix()}")
        for name in more:
            archive.writestr(name, "x")
    return path


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine without the data: no installed package, an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = easy_vqa.importlib.util.find_spec
    monkeypatch.setattr(easy_vqa.importlib.util, "find_spec", lambda name: None if name == "easy_vqa" else real(name))
    return tmp_path


def pip_that(monkeypatch, act):
    """Put `act(destination) -> (exit code, standard error)` in pip's place; gives the list of its commands."""
    commands = []

    def run(command, **_):
        commands.append(command)
        code, error = act(easy_vqa.Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, code, "", error)

    monkeypatch.setattr(easy_vqa.subprocess, "run", run)
    return commands


def test_pictures_and_questions_are_read_with_the_official_split(tmp_path):
    data = read_easy_vqa(write_folder(tmp_path))
    assert data.answers == ("circle", "no", "red", "yes")
    assert data.train.images.shape == (2, 4, 6, 3)
    assert data.train.images.dtype == np.uint8
    assert data.train.image_numbers == (0, 10)  # by number, not by name
    assert data.train.images[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert data.train.questions == (Question("is there a circle?", "no", 1), Question("what color is it?", "red", 0))
    assert data.test.questions == (Question("what shape is it?", "circle", 0),)


def test_the_digest_knows_pictures_questions_and_answers(tmp_path):
    digests = {read_easy_vqa(write_folder(tmp_path)).sha256}
    assert read_easy_vqa(write_folder(tmp_path)).sha256 in digests
    write_picture(tmp_path / "test/images/0.png", (128, 128, 129))
    digests.add(read_easy_vqa(tmp_path).sha256)
    write_questions(tmp_path / "test", [["what shape is this?", "circle", 0]])
    digests.add(read_easy_vqa(tmp_path).sha256)
    (tmp_path / "answers.txt").write_text("yes\nno\ncircle\nred\nblue\n", encoding="utf-8")
    digests.add(read_easy_vqa(tmp_path).sha256)
    assert len(digests) == 4


@pytest.mark.parametrize("inside", [".", "data", "easy_vqa/data"])
def test_a_given_folder_may_be_the_data_or_the_package_around_it(tmp_path, inside):
    folder = write_folder(tmp_path / inside)
    assert find_easy_vqa(tmp_path) == folder


@pytest.mark.parametrize("name", ["answers.txt", "train/questions.json", "test/images"])
def test_a_folder_without_a_file_names_it(tmp_path, name):
    write_folder(tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=f"found no {re.escape(name)}; give a folder that holds answers.txt, train and test"
    ):
        load_easy_vqa(tmp_path)


def test_no_folder_and_a_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="found nothing; give one"):
        load_easy_vqa(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match="found a file; give one"):
        load_easy_vqa(tmp_path / "file")


@pytest.mark.parametrize(
    ("records", "fault"),
    [
        ([["is it?", "no", 7]], r"record 1: there is no picture images/7\.png"),
        ([["is it?", "no", 0], ["is it?", "maybe", 0]], r"record 2: the answer 'maybe' is none of those in answers\.txt"),
        ([["is it?", "no"]], r"got \['is it\?', 'no'\] as record 1"),
        ([["is it?", "no", True]], r"as record 1"),
        ([["  ", "no", 0]], r"as record 1"),
        ({"is it?": "no"}, r"expected a list of \[question, answer, number of the picture\]"),
        ([], r"expected a list of \[question, answer, number of the picture\]"),
    ],
)
def test_a_wrong_record_is_named(tmp_path, records, fault):
    write_questions(write_folder(tmp_path) / "train", records)
    with pytest.raises(ValueError, match=fault):
        read_easy_vqa(tmp_path)


def test_files_that_are_no_json_no_text_no_answers_are_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "test/questions.json").write_bytes(b"[\xff")
    with pytest.raises(ValueError, match=r"questions\.json is no JSON"):
        read_easy_vqa(tmp_path)
    (tmp_path / "answers.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"answers\.txt is not UTF-8 \(byte 1\)"):
        read_easy_vqa(tmp_path)
    (tmp_path / "answers.txt").write_text("yes\n")
    with pytest.raises(ValueError, match=r"at least two answers .* got 1"):
        read_easy_vqa(tmp_path)


def test_pictures_of_two_sizes_are_refused(tmp_path):
    write_folder(tmp_path)
    write_picture(tmp_path / "test/images/0.png", "gray", (5, 5))
    with pytest.raises(ValueError, match=r"of one size in .*, got 6 x 4 pixels and 5 x 5 pixels in train and test"):
        read_easy_vqa(tmp_path)
    write_picture(tmp_path / "train/images/10.png", "gray", (5, 5))
    with pytest.raises(ValueError, match=r"got 5 x 5 pixels in .*10\.png, 6 x 4 pixels before"):
        read_easy_vqa(tmp_path)
    for file in (tmp_path / "train/images").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected pictures 0\.png, 1\.png"):
        read_easy_vqa(tmp_path)


def test_a_picture_is_read_in_any_mode_and_what_is_none_is_refused(tmp_path):
    Image.new("RGBA", (2, 3), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").tolist() == np.full((3, 2, 3), 255).tolist()
    Image.new("L", (2, 3), 7).save(tmp_path / "gray.png")
    assert read_picture(tmp_path / "gray.png").tolist() == np.full((3, 2, 3), 7).tolist()
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png is no readable picture .* expected a PNG, JPEG"):
        read_picture(tmp_path / "text.png")
    damaged = write_picture(tmp_path / "damaged.png", "red", (200, 200))
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"damaged\.png is no readable picture"):
        read_picture(damaged)
    with pytest.raises(ValueError, match="1025 x 1 pixels, more than the 1024"):
        read_picture(write_picture(tmp_path / "wide.png", "red", (1025, 1)))
    with pytest.raises(FileNotFoundError, match="found a folder"):
        read_picture(tmp_path)


def test_without_pillow_the_extra_is_named_before_anything_is_fetched(nowhere, monkeypatch):
    monkeypatch.setitem(easy_vqa.sys.modules, "PIL", None)
    commands = pip_that(monkeypatch, lambda _: (0, ""))
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'crossattention[images]'")):
        load_easy_vqa()
    assert commands == []


def test_an_installed_package_comes_before_the_cache(tmp_path, monkeypatch):
    installed = write_folder(tmp_path / "site" / "easy_vqa" / "data")
    (installed.parent / "__init__.py").write_text("raise RuntimeError('foreign code was run')")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_folder(easy_vqa.cache_folder())
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert find_easy_vqa() == installed
    (installed / "answers.txt").unlink()
    assert find_easy_vqa() == easy_vqa.cache_folder()


def test_it_is_fetched_once_checked_and_unpacked_without_anything_else(nowhere, monkeypatch):
    def fetch(destination):
        write_wheel(destination / easy_vqa.WHEEL_NAME, source, more=["easy_vqa/__init__.py", "../escaped", "easy_vqa/data/x.txt"])
        return 0, ""

    source = write_folder(nowhere / "source")
    wheel = write_wheel(nowhere / "w", source, more=["easy_vqa/__init__.py", "../escaped", "easy_vqa/data/x.txt"])
    monkeypatch.setattr(easy_vqa, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    commands, said = pip_that(monkeypatch, fetch), []
    assert find_easy_vqa() is None
    data = load_easy_vqa(say=said.append)
    assert data.folder == nowhere / "cache" / "crossattention" / "easy-vqa-1.0"
    assert commands[0][-1] == "easy-vqa==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(commands[0])
    assert re.search("not on this machine. Fetching easy-vqa==1.0 .3.2 MB, MIT licence. by pip", said[0])
    assert "its sha256 is right" in said[1]
    files = {file.relative_to(nowhere / "cache").as_posix() for file in (nowhere / "cache").rglob("*") if file.is_file()}
    inside = {file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()}
    assert files == {f"crossattention/easy-vqa-1.0/{name}" for name in inside}
    assert not list(nowhere.rglob("escaped"))
    assert load_easy_vqa(say=said.append).sha256 == data.sha256
    assert (len(commands), len(said)) == (1, 2)


def test_half_a_cache_folder_is_fetched_again(nowhere, monkeypatch):
    def fetch(destination):
        write_wheel(destination / easy_vqa.WHEEL_NAME, source)
        return 0, ""

    source = write_folder(nowhere / "source")
    monkeypatch.setattr(easy_vqa, "WHEEL_SHA256", hashlib.sha256(write_wheel(nowhere / "w", source).read_bytes()).hexdigest())
    (easy_vqa.cache_folder() / "train").mkdir(parents=True)
    pip_that(monkeypatch, fetch)
    assert len(load_easy_vqa(say=lambda _: None).train.images) == 2


def test_every_way_of_not_getting_it_says_what_to_do(nowhere, monkeypatch):
    def damaged(destination):
        (destination / easy_vqa.WHEEL_NAME).write_bytes(b"something else")
        return 0, ""

    def say(_):
        pass

    what_to_do = re.escape("install it (pip install easy-vqa==1.0), or unpack easy_vqa-1.0-py3-none-any.whl and name the folder")
    pip_that(monkeypatch, lambda _: (1, "WARNING: slow\nERROR: No matching distribution found for easy-vqa==1.0\n"))
    with pytest.raises(ConnectionError, match=f"No matching distribution found for easy-vqa==1.0.*{what_to_do}"):
        fetch_easy_vqa(say=say)
    pip_that(monkeypatch, lambda _: (0, ""))
    with pytest.raises(ConnectionError, match=f"exit code 0.*{what_to_do}"):
        fetch_easy_vqa(say=say)
    pip_that(monkeypatch, damaged)
    digest = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ValueError, match=f"sha256 {digest}, expected {easy_vqa.WHEEL_SHA256}.*{what_to_do}"):
        fetch_easy_vqa(say=say)
    monkeypatch.setattr(easy_vqa, "WHEEL_SHA256", digest)
    with pytest.raises(ValueError, match=f"no readable archive.*{what_to_do}"):
        fetch_easy_vqa(say=say)
    monkeypatch.setattr(easy_vqa.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=f"has no pip to fetch it with; {what_to_do}"):
        fetch_easy_vqa(say=say)
    assert not [file for file in (nowhere / "cache").rglob("*") if file.is_file()]


def test_a_pip_that_does_not_end_is_ended(nowhere, monkeypatch):
    def run(command, *, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(easy_vqa.subprocess, "run", run)
    with pytest.raises(ConnectionError, match="after 300 s; try again"):
        fetch_easy_vqa(say=lambda _: None)


def part_of(*questions, count=1):
    return Part(np.zeros((count, 2, 2, 3), np.uint8), tuple(Question(*q) for q in questions), tuple(range(count)))


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        ([("what shape is present?", "circle", 0)], ("circle", None)),
        ([("what color is the circle?", "teal", 0)], ("circle", "teal")),
        ([("what is the gray shape?", "triangle", 0)], ("triangle", "gray")),
        ([("is there a red shape?", "yes", 0)], (None, "red")),
        ([("is there not a red shape?", "no", 0)], (None, "red")),
        ([("is no rectangle present?", "no", 0)], ("rectangle", None)),
        ([("is there a circle?", "no", 0)], (None, None)),
        ([("is there a circle?", "no", 0), ("is no triangle present?", "yes", 0)], ("rectangle", None)),
    ],
)
def test_questions_tell_shape_and_color(questions, expected):
    assert shape_and_color(part_of(*questions)) == [expected]


def test_questions_that_contradict_each_other_are_named():
    with pytest.raises(ValueError, match="picture 0 contradicts its other questions in 'is there a red shape"):
        shape_and_color(part_of(("is there a blue shape?", "yes", 0), ("is there a red shape?", "yes", 0)))


def test_pictures_are_held_out_with_their_questions_and_always_the_same():
    part = part_of(*[(f"is it {image}?", "no", image) for image in range(20) for _ in range(2)], count=20)
    rest, held = hold_out(part, 0.25)
    assert (len(rest.images), len(held.images)) == (15, 5)
    assert sorted(rest.image_numbers + held.image_numbers) == list(range(20))
    for half in (rest, held):
        assert len(half.questions) == 2 * len(half.images)
        assert all(question.text == f"is it {half.image_numbers[question.image]}?" for question in half.questions)
    assert hold_out(part, 0.25)[1].image_numbers == held.image_numbers
    with pytest.raises(ValueError, match="share between 0 and 1, got 1"):
        hold_out(part, 1)
    with pytest.raises(ValueError, match=r"hold out a share of 0\.01, got 20"):
        hold_out(part, 0.01)
    with pytest.raises(ValueError, match="got 1 of them again"):
        only_images(part, [3, 3])


def test_words_have_no_marks():
    assert words_of('What is, the "blue" shape?') == ["what", "is", "the", "blue", "shape"]
    assert words_of("?!") == []


@pytest.mark.slow
def test_the_real_data_is_what_its_description_counts():
    folder = find_easy_vqa()
    if folder is None:
        pytest.skip("easy-vqa is not on this machine: pip install easy-vqa==1.0")
    data = read_easy_vqa(folder)
    assert (len(data.train.images), len(data.test.images)) == (4000, 1000)
    assert (len(data.train.questions), len(data.test.questions)) == (38575, 9673)
    assert len(data.answers) == 13
    assert data.test.images.shape == (1000, 64, 64, 3)
    assert data.sha256 == "a2f8f1564aec7344be6716164a892ee2a94002bdd5a4f2f78897e0ce0d0a9248"
    told = shape_and_color(data.train)
    assert sum(shape is not None for shape, _ in told) == 3837
    assert sum(color is not None for _, color in told) == 3712
