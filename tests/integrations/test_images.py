from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from secateurs.core.errors import DataError
from secateurs.integrations import ImageFormat
from secateurs.integrations.images import folder_batches, normalised, pictures_of_bytes, prepared

Image = pytest.importorskip("PIL.Image")


def painted(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    painted(tmp_path / "red" / "a.png", (255, 0, 0))
    painted(tmp_path / "red" / "deep" / "b.PNG", (255, 0, 0), (30, 8))
    painted(tmp_path / "blue" / "c.jpg", (0, 0, 255))
    (tmp_path / "blue" / "notes.txt").write_text("no picture")
    return tmp_path


def test_classes_count_in_the_order_of_their_names(folder: Path) -> None:
    (batch,) = folder_batches(folder, ImageFormat((6, 4)), 8, 0)
    x, y = batch
    assert x.shape == (3, 3, 6, 4)
    assert y.tolist() == [0, 1, 1]
    assert x[0, 2].min() > 0.95
    assert x[1, 0].eq(1).all()
    assert x[1, 1:].eq(0).all()


def test_pictures_are_normalised_for_the_model(folder: Path) -> None:
    wanted = ImageFormat((6, 4), 3, (0.5, 0.5, 0.5), (0.25, 0.5, 0.5))
    x, _ = next(iter(folder_batches(folder, wanted, 8, 0)))
    torch.testing.assert_close(x[1, :, 0, 0], torch.tensor([2.0, -1.0, -1.0]))


@pytest.mark.parametrize("size", [(20, 10), (10, 20), (7, 31), (4, 4)])
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.3])
def test_the_crop_has_the_size_that_the_model_wants(size: tuple[int, int], crop: float) -> None:
    picture = Image.new("RGB", size, (10, 20, 30))
    assert prepared(picture, ImageFormat((6, 8), crop=crop, interpolation="bicubic")).shape == (3, 6, 8)
    assert prepared(picture, ImageFormat((6, 8), channels=1, crop=crop)).shape == (1, 6, 8)


def test_the_crop_is_in_the_middle() -> None:
    """A white square of a third of the side is all that a crop of a third shows."""
    pixels = numpy.zeros((90, 90, 3), dtype=numpy.uint8)
    pixels[30:60, 30:60] = 255
    x = prepared(Image.fromarray(pixels), ImageFormat((30, 30), crop=1 / 3, interpolation="nearest"))
    assert x.eq(1).all()
    assert not prepared(Image.fromarray(pixels), ImageFormat((30, 30), interpolation="nearest")).eq(1).all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 8, 9), (5, 1, 8, 9)),
        ((5, 8, 9, 3), (5, 3, 8, 9)),
        ((5, 8, 9, 1), (5, 1, 8, 9)),
        ((5, 3, 8, 9), (5, 3, 8, 9)),
        ((5, 7), (5, 7)),
    ],
)
def test_where_the_channels_are(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    x = pictures_of_bytes(numpy.full(shape, 51, dtype=numpy.uint8))
    assert x.shape == expected
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.full(expected, 0.2))


def test_grey_pictures_for_a_model_of_colours() -> None:
    x = normalised(torch.full((2, 1, 4, 4), 0.5), ImageFormat((4, 4), 3, (0.5, 0.25, 0.0)))
    assert x.shape == (2, 3, 4, 4)
    assert x[0, :, 0, 0].tolist() == [0, 0.25, 0.5]


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    with pytest.raises(DataError, match="holds no pictures; it must have one folder a class"):
        folder_batches(tmp_path, None, 8, 0)


def test_a_damaged_picture_is_named(folder: Path) -> None:
    (folder / "blue" / "c.jpg").write_bytes(b"no jpeg")
    with pytest.raises(DataError, match=r"c\.jpg cannot be read as a picture"):
        list(folder_batches(folder, None, 8, 0))
