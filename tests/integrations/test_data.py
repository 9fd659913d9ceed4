from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from secateurs.core.errors import DataError, MissingExtraError, OptionError, SecateursError
from secateurs.integrations import Batches, ImageFormat, Loader, TextFormat, load_data

MODULE = """
import torch
fixed = [torch.ones(2, 3)]
spent = iter(fixed)
number = 3
def loader(): return fixed
def wrong(): return 3
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "feeds.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("feeds", None)


def stored(**arrays: Any) -> str:
    numpy.savez("data.npz", **{name: numpy.asarray(value) for name, value in arrays.items()})
    return "data.npz"


def first(spec: str, **options: Any) -> Any:
    return next(iter(load_data(spec, **options)))


# -- arrays ------------------------------------------------------------------------------------------------------------


def test_bytes_are_pictures_and_numbers_are_numbers() -> None:
    pixels = numpy.full((3, 4, 4, 3), 255, dtype=numpy.uint8)
    x, y = first(stored(x=pixels, y=[2, 0, 1]), images=ImageFormat((4, 4), 3, (0.5,), (0.5,)))
    assert x.shape == (3, 3, 4, 4)
    assert x.eq(1).all()
    assert (y.dtype, y.tolist()) == (torch.int64, [2, 0, 1])
    x, y = first(stored(x=numpy.ones((3, 5)), y=[0.5, 1.5, 2.5]), images=ImageFormat((4, 4), 3, (0.5,)))
    assert (x.dtype, y.dtype) == (torch.float32, torch.float32)
    assert x.eq(1).all()


def test_whole_numbers_stay_whole() -> None:
    x = first(stored(x=numpy.arange(6, dtype=numpy.int32).reshape(2, 3)))
    assert (x.dtype, x.tolist()) == (torch.int64, [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("names", [("x_{}", "y_{}"), ("{}_x", "{}_y"), ("{}_images", "{}_labels")])
def test_parts_are_known_by_their_names(names: tuple[str, str]) -> None:
    inputs, targets = names
    parts = {"train": 1.0, "test": 2.0}
    arrays = {inputs.format(part): [[value]] for part, value in parts.items()}
    arrays |= {targets.format(part): [[int(value)]] for part, value in parts.items()}
    for part, value in parts.items():
        x, y = first(stored(**arrays), split=part)
        assert (x.item(), y.tolist()) == (value, [int(value)])


def test_a_part_of_its_own_goes_before_a_name_that_stands_alone() -> None:
    spec = stored(x=[[0.0]], x_val=[[3.0]])
    assert first(spec, split="test").item() == 3
    assert first(spec, split="train").item() == 0


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"z": [1.0]}, "data.npz has no array called x or x_train; its arrays are: z."),
        ({"x": [1.0, 2.0], "y": [1]}, "data.npz has 2 inputs but 1 targets"),
        ({"x": numpy.zeros((0, 3))}, "the data is empty"),
        ({"x": numpy.array([{}], dtype=object)}, "data.npz cannot be read as arrays of numbers"),
    ],
)
def test_arrays_that_cannot_be_used(arrays: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError) as refused:
        load_data(stored(**arrays))
    assert sentence in str(refused.value)


def test_a_damaged_file() -> None:
    Path("data.npz").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(DataError, match=r"data\.npz cannot be read as arrays of numbers"):
        load_data("data.npz")


# -- functions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["feeds:loader", "feeds:fixed"])
def test_loaders(spec: str) -> None:
    data = load_data(spec)
    assert isinstance(data, Loader)
    assert [batch.shape for batch in data] == [batch.shape for batch in data] == [(2, 3)]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("feeds:spent", "feeds:spent is spent after one pass; make it a function that returns a new one."),
        ("feeds:number", "feeds:number is a int; it must be a function that returns batches."),
        ("feeds:wrong", "feeds:wrong returned a int; it must return an iterable of batches."),
    ],
)
def test_what_is_no_loader(spec: str, sentence: str) -> None:
    with pytest.raises(OptionError) as refused:
        list(load_data(spec))
    assert str(refused.value) == sentence


# -- hubs --------------------------------------------------------------------------------------------------------------


class Rows(list[dict[str, Any]]):
    """A part of a data set as `datasets` gives it: rows by number, columns by name."""

    column_names: tuple[str, ...]

    def __init__(self, **columns: list[Any]) -> None:
        names = tuple(columns)
        super().__init__(dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True))
        self.column_names, self._columns = names, columns

    def __getitem__(self, key: Any) -> Any:
        return self._columns[key] if isinstance(key, str) else super().__getitem__(key)


def hub(monkeypatch: pytest.MonkeyPatch, **parts: Rows) -> list[tuple[Any, ...]]:
    """A `datasets` that knows one data set; what it was asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*words: Any) -> dict[str, Rows]:
        asked.append(words)
        return parts

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_pictures_of_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    rows = Rows(image=[image.new("L", (9, 9), 255)] * 3, label=[1, 2, 3])
    asked = hub(monkeypatch, train=Rows(image=[], label=[]), validation=rows)
    x, y = first("flowers@small", split="test", images=ImageFormat((4, 4)), size=2)
    assert (tuple(x.shape), y.tolist()) == ((2, 3, 4, 4), [1, 2])
    assert asked == [("flowers", "small")]


@pytest.mark.parametrize(
    ("parts", "options", "sentence"),
    [
        ({"test": Rows(text=["a"])}, {}, "the data set things has no part for training; its parts are test."),
        (
            {"train": Rows(sound=[1])},
            {},
            "the data set things has the columns sound; known are image and label, or text",
        ),
        ({"train": Rows(text=["a"])}, {}, "things is text, and no tokenizer of the model is known"),
    ],
)
def test_data_sets_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, parts: dict[str, Rows], options: dict[str, Any], sentence: str
) -> None:
    hub(monkeypatch, **parts)
    with pytest.raises(SecateursError) as refused:
        load_data("things", **options)
    assert sentence in str(refused.value)


def test_a_data_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any) -> None:
        raise ConnectionError("no way out.\nTry later.")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="neither a file 'things' nor a Hugging Face data set of that name: no way out"):
        load_data("things")


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="datasets is needed here; install it with"):
        load_data("things")


@pytest.mark.parametrize("spec", ["./things", "a/b/c", "/nowhere", "", "gone.npz", "gone.txt"])
def test_what_is_not_there(spec: str) -> None:
    with pytest.raises(DataError, match="there is no file"):
        load_data(spec)


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """The folder of a tokenizer of six words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "the", "cat", "sat", "down"))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "words"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)
    return str(folder)


def test_text_is_cut_into_blocks(tokenizer: str) -> None:
    Path("cats.txt").write_text("the cat sat down the cat sat down the")
    data = load_data("cats.txt", text=TextFormat(tokenizer, 4), size=2)
    assert isinstance(data, Batches)
    (batch,) = data
    assert batch["input_ids"].tolist() == [[2, 3, 4, 5], [2, 3, 4, 5]]
    assert batch["labels"].equal(batch["input_ids"])
    assert list(first("cats.txt", text=TextFormat(tokenizer, 4, causal=False))) == ["input_ids"]


def test_text_that_cannot_be_used(tokenizer: str, tmp_path: Path) -> None:
    Path("cats.txt").write_text("the cat")
    with pytest.raises(DataError, match=r"cats\.txt has 2 tokens, fewer than one block of 4"):
        load_data("cats.txt", text=TextFormat(tokenizer, 4))
    with pytest.raises(OptionError, match=r"cats\.txt is text, and no tokenizer of the model is known"):
        load_data("cats.txt")
    with pytest.raises(DataError, match="no tokenizer can be loaded from"):
        load_data("cats.txt", text=TextFormat(str(tmp_path), 4))
    Path("cats.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(DataError, match="is not text in UTF-8"):
        load_data("cats.txt", text=TextFormat(tokenizer, 4))


def test_sentences_with_labels(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, train=Rows(text=["the cat", "sat down the cat sat"], label=[0, 1]))
    batch = first("moods", text=TextFormat(tokenizer, 4, causal=False))
    assert batch["input_ids"].tolist() == [[2, 3, 0, 0], [4, 5, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]
    blocks = first("moods", text=TextFormat(tokenizer, 3))
    assert blocks["input_ids"].tolist() == [[2, 3, 4], [5, 2, 3]]
