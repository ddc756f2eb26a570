"""Folders of class folders: the split by names, squares, and what is refused."""

import numpy as np
import pytest

from crossattention.data.easy_vqa import read_picture
from crossattention.data.picture_folders import load_picture_folder, part_of, read_square

image_module = pytest.importorskip("PIL.Image", reason="pictures need the images extra")


def write(path, size=(12, 8), color=(10, 200, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image_module.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    for name, color in (("cat", (250, 0, 0)), ("dog", (0, 0, 250))):
        for number in range(40):
            write(tmp_path / name / f"{number}.{'png' if number % 2 else 'JPG'}", color=color)
    write(tmp_path / "cat" / ".hidden.png")
    (tmp_path / "cat" / "notes.txt").write_text("no picture", encoding="utf-8")
    return tmp_path


def test_every_picture_is_in_the_part_that_its_name_says(folder):
    data = load_picture_folder(folder, 8)
    assert data.classes == ("cat", "dog")
    parts = {"train": data.train, "valid": data.valid, "test": data.test}
    assert sum(map(len, parts.values())) == 80
    for name, part in parts.items():
        assert part.images.shape == (len(part), 8, 8, 3)
        assert all(part_of(f"{path.parent.name}/{path.name}", 0.1, 0.1) == name for path in part.paths)
        for path, label, image in zip(part.paths, part.labels, part.images, strict=True):
            assert data.classes[label] == path.parent.name
            assert image[0, 0].argmax() == (0 if label == 0 else 2)
    write(folder / "dog" / "more.png")
    again = load_picture_folder(folder, 8)
    assert set(data.test.paths) <= set(again.test.paths)
    assert data.sha256 != again.sha256


def test_shares_are_kept_over_many_names():
    parts = [part_of(f"cat/{number}.png", 0.2, 0.1) for number in range(4000)]
    assert abs(parts.count("valid") / 4000 - 0.2) < 0.03
    assert abs(parts.count("test") / 4000 - 0.1) < 0.03


def test_a_square_is_the_middle_and_transparency_is_white(tmp_path):
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255
    image_module.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_square(tmp_path / "wide.png", 4) == 255).all()
    write(tmp_path / "clear.png", color=(0, 0, 0, 0), mode="RGBA")
    assert (read_square(tmp_path / "clear.png", 6) == 255).all()
    write(tmp_path / "gray.png", color=70, mode="L")
    assert (read_square(tmp_path / "gray.png", 6) == 70).all()


def test_a_camera_that_was_held_sideways_is_set_upright(tmp_path):
    tall = np.zeros((8, 8, 3), np.uint8)
    tall[:4] = 255
    exif = image_module.Exif()
    exif[0x0112] = 3  # upside down
    image_module.fromarray(tall).save(tmp_path / "turned.png", exif=exif)
    found = read_square(tmp_path / "turned.png", 8)
    assert (found[:4] == 0).all()
    assert (found[4:] == 255).all()


def test_broken_files_are_named_and_left_out_only_when_asked(folder):
    (folder / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    whole = (folder / "dog" / "1.png").read_bytes()
    (folder / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="2 files in") as caught:
        load_picture_folder(folder, 8)
    assert "broken.png is no readable picture" in str(caught.value)
    assert "cut.png is no readable picture" in str(caught.value)
    data = load_picture_folder(folder, 8, skip_broken=True)
    assert len(data.train) + len(data.valid) + len(data.test) == 80
    assert "broken.png" in data.notes[0]


def test_folders_that_are_none_of_classes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="found nothing"):
        load_picture_folder(tmp_path / "none", 8)
    write(tmp_path / "one" / "1.png")
    with pytest.raises(ValueError, match=r"at least two class folders in .*, got one"):
        load_picture_folder(tmp_path, 8)
    write(tmp_path / "two" / "inner" / "1.png")
    with pytest.raises(ValueError, match=r"class folder .*two, found folders"):
        load_picture_folder(tmp_path, 8)
    write(tmp_path / "two" / "1.png")
    with pytest.raises(ValueError, match="fell into the part"):
        load_picture_folder(tmp_path, 8)
    with pytest.raises(ValueError, match=r"got 0\.5 and 0\.5"):
        load_picture_folder(tmp_path, 8, valid_share=0.5, test_share=0.5)
    with pytest.raises(FileNotFoundError, match="found a folder"):
        read_square(tmp_path, 8)


@pytest.mark.parametrize("read", [lambda path: read_square(path, 4), read_picture])
def test_sixteen_bits_of_grey_are_seen_as_eight_and_thirty_two_are_refused(tmp_path, read):
    grey = np.array([[0, 10, 128, 255]] * 4)
    image_module.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png"), grey[:, :, None].repeat(3, 2))
    image_module.fromarray(grey.astype(np.float32)).save(tmp_path / "b.tiff")
    with pytest.raises(ValueError, match=r"b\.tiff (has pixels of 32 bits|is no readable picture)"):
        read(tmp_path / "b.tiff")
