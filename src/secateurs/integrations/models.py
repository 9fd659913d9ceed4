"""Models by name: `timm/…`, `torchvision/…`, Hugging Face, a folder of ours, an ONNX file, or `module:factory`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import move, split
from ..core.errors import FileError, MissingExtraError, ModelError, OptionError, unknown_name
from ..deploy.store import load_model
from ..onnx import example_inputs, read_onnx
from ..pruning import load
from ..recover.context import seeded
from .functions import is_function, named

__all__ = ["ImageFormat", "LoadedModel", "TextFormat", "load_model_from", "random_images"]

_WHAT = (
    "a MODEL is timm/NAME, torchvision/NAME, the name or folder of a Hugging Face model, a folder that secateurs "
    "saved, an ONNX file, or module:factory"
)


@dataclass(frozen=True)
class ImageFormat:
    """How a model wants its pictures.

    Args:
        size: height and width.
        channels: 3 for colours, 1 for grey.
        mean, std: per channel, for values in [0, 1]; empty for none.
        crop: share of a picture's shorter side that the central crop keeps.
        interpolation: "bilinear", "bicubic" or "nearest".
    """

    size: tuple[int, int] = (224, 224)
    channels: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    crop: float = 1.0
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class TextFormat:
    """How a model wants its text.

    Args:
        tokenizer: name or folder of the tokenizer.
        length: tokens a sequence.
        causal: whether the model predicts the next token, so that tokens are their own labels.
        trust_remote_code: whether the tokenizer's own code may run.
    """

    tokenizer: str
    length: int = 128
    causal: bool = True
    trust_remote_code: bool = False


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model and what is known of its inputs.

    Args:
        model: in evaluation mode.
        name: for people.
        example_inputs: what it can be run on; None if nobody said.
        images, text: how it wants its data; None if unknown.
        fixed: whether the example inputs were given by the model's owner and no data should replace them.
    """

    model: nn.Module
    name: str
    example_inputs: Any = None
    images: ImageFormat | None = None
    text: TextFormat | None = None
    fixed: bool = False

    def with_examples(self, batch: Any, samples: int = 1) -> LoadedModel:
        """The same with the inputs of the first samples of a batch as example inputs, unless they are fixed."""
        if self.fixed:
            return self
        inputs = split(batch)[0]
        if hasattr(inputs, "items"):
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        return replace(self, example_inputs=_first(inputs, samples))

    def runnable(self) -> LoadedModel:
        """The same, if there is something to run it on.

        Raises:
            OptionError: nobody said what its inputs look like.
        """
        if self.example_inputs is None:
            raise OptionError(
                f"the inputs of {self.name} are unknown: give --input, as 1,3,224,224, or data, or return (model, "
                "example inputs) from the factory."
            )
        return self

    def to(self, device: str) -> LoadedModel:
        """The same on another device.

        Raises:
            OptionError: PyTorch knows no such device, or it is not there.
        """
        try:
            return replace(self, model=self.model.to(device), example_inputs=move(self.example_inputs, device))
        except (RuntimeError, AssertionError) as error:
            raise OptionError(f"device {device!r} cannot be used: {_line(error)}") from error


def load_model_from(
    spec: str,
    *,
    random_weights: bool = False,
    batch: int = 1,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    trust: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> LoadedModel:
    """The model that `spec` names, in evaluation mode, with example inputs where its configuration tells them.

    Args:
        spec: "timm/NAME"; "torchvision/NAME"; a folder that secateurs saved; the folder or hub name of a transformers
            model; an ONNX file; or "module:factory", where the factory takes nothing and returns a model or (model,
            example inputs). A factory's code runs; the current folder is searched for its module first.
        random_weights: do not load pretrained weights (timm, torchvision, Hugging Face).
        batch: samples in the example inputs.
        shape: of the example input, with the batch; overrides what is known.
        seed: of random weights and random example inputs.
        trust: packages whose classes a folder saved by secateurs may use.
        trust_remote_code: run a hub model's own Python code.

    Raises:
        OptionError: an unknown name, or one of no known form.
        FileError: a folder that holds no model, or an ONNX file that cannot be read.
        ModelError: the weights cannot be fetched, or a factory fails.
        MissingExtraError: timm, torchvision or transformers is not installed.
    """
    with seeded(seed, "model"):
        if spec.startswith("timm/"):
            loaded = _timm(spec.removeprefix("timm/"), random_weights)
        elif spec.startswith("torchvision/"):
            loaded = _torchvision(spec.removeprefix("torchvision/"), random_weights)
        else:
            loaded = _local(spec, trust, seed, batch) or _hugging_face(spec, random_weights, trust_remote_code, batch)
        if shape is not None:
            loaded = replace(loaded, example_inputs=_shaped(loaded, tuple(shape)), fixed=True)
        elif loaded.example_inputs is None and loaded.images is not None:
            loaded = replace(loaded, example_inputs=random_images(loaded.images, batch))
    loaded.model.eval()
    return loaded


def random_images(wanted: ImageFormat, batch: int) -> Tensor:
    """Random pictures float32 [batch, channels, height, width] as a model sees them, of mean 0 and variance 1."""
    return torch.randn(batch, wanted.channels, *wanted.size)


def _local(spec: str, trust: Sequence[str], seed: int, batch: int) -> LoadedModel | None:
    """A model on this machine; None for the name of a model on a hub, or a folder of transformers."""
    place = Path(spec)
    if spec.endswith(".onnx"):
        return _onnx(place, batch, seed)
    if not spec.strip() or (not place.exists() and (spec.startswith((".", "/", "~")) or spec.count("/") > 1)):
        raise FileError(f"there is no folder {spec!r}; {_WHAT}.")
    if (place / "model.json").is_file():
        return _saved(place, trust)
    if place.is_dir() and not (place / "config.json").is_file():
        raise FileError(f"the folder {spec} holds no model: neither model.json nor config.json is in it.")
    if place.is_file():
        raise FileError(
            f"{spec} is a file; {_WHAT}: a factory can build the model and load such weights with "
            "torch.load(…, weights_only=True)."
        )
    return _factory(spec, seed) if is_function(spec) and not place.exists() else None


def _onnx(path: Path, batch: int, seed: int) -> LoadedModel:
    module = read_onnx(path)
    shapes = [one.shape for one in module.inputs if one.dtype.is_floating_point]
    images = None
    if len(module.inputs) == len(shapes) == 1 and len(shapes[0]) == 4:
        channels, *size = (n if isinstance(n, int) else 0 for n in shapes[0][1:])
        images = ImageFormat((size[0], size[1]), channels) if channels in (1, 3) and all(size) else None
    return LoadedModel(module, path.name, example_inputs(module, batch, seed), images)


def _saved(folder: Path, trust: Sequence[str]) -> LoadedModel:
    if not (folder / "plan.safetensors").is_file():
        return LoadedModel(load_model(folder, trust=trust), folder.name)
    saved = load(folder, trust=trust)
    return LoadedModel(saved.model, saved.report.model, saved.plan.example_inputs, fixed=True)


def _factory(spec: str, seed: int) -> LoadedModel:
    found = named(spec)
    if isinstance(found, nn.Module):
        return LoadedModel(found, spec)
    if not callable(found):
        raise OptionError(f"{spec} is a {type(found).__name__}; it must be a function that returns a model.")
    try:
        # Seeded here again: what the import drew must not shift the weights of a second model of the module.
        with seeded(seed, "weights"):
            made = found()
    except Exception as error:
        # A function of the user's own may raise anything.
        raise ModelError(f"{spec} failed with {type(error).__name__}: {_line(error)}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{spec} returned a {type(made).__name__}; it must return a torch.nn.Module, or (module, example inputs)."
        )
    return LoadedModel(model, spec, inputs, fixed=inputs is not None)


def _timm(name: str, random_weights: bool) -> LoadedModel:
    timm = _library("timm")
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models())
    model = _fetched(f"timm/{name}", lambda: timm.create_model(name, pretrained=not random_weights))
    known = timm.data.resolve_model_data_config(model)
    channels, height, width = known["input_size"]
    images = ImageFormat(
        (height, width),
        channels,
        tuple(known["mean"]),
        tuple(known["std"]),
        known["crop_pct"],
        known["interpolation"],
    )
    return LoadedModel(model, f"timm/{name}", images=images)


def _torchvision(name: str, random_weights: bool) -> LoadedModel:
    models = _library("torchvision").models
    if name not in models.list_models():
        raise unknown_name("torchvision model", name, models.list_models())
    weights = models.get_model_weights(name)
    model = _fetched(
        f"torchvision/{name}", lambda: models.get_model(name, weights=None if random_weights else "DEFAULT")
    )
    wanted = weights.DEFAULT.transforms()
    if not hasattr(wanted, "crop_size"):
        return LoadedModel(model, f"torchvision/{name}", images=ImageFormat())
    side, shorter = wanted.crop_size[0], wanted.resize_size[0]
    images = ImageFormat(
        (side, side), 3, tuple(wanted.mean), tuple(wanted.std), side / shorter, wanted.interpolation.value
    )
    return LoadedModel(model, f"torchvision/{name}", images=images)


def _library(name: str) -> Any:
    """The library of pictures.

    Raises:
        MissingExtraError: it is not installed.
        ModelError: it is, but for another build of PyTorch.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(name, "vision") from error
    except RuntimeError as error:
        raise ModelError(
            f"{name} cannot be imported ({_line(error)}): install the build that fits PyTorch's."
        ) from error


def _fetched(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` returns; hubs fail with errors of many libraries, all of which mean that the weights are not here."""
    try:
        return make()
    except Exception as error:
        raise ModelError(
            f"the pretrained weights of {name} cannot be loaded ({_line(error)}); --random-weights goes without them."
        ) from error


def _hugging_face(spec: str, random_weights: bool, trust_remote_code: bool, batch: int) -> LoadedModel:
    try:
        from . import hub
    except ImportError as error:
        raise MissingExtraError("transformers", "language") from error
    try:
        model = hub.model_of(spec, random_weights, trust_remote_code)
    except Exception as error:
        # Hub, configuration, weights and the model's own code each have errors of their own.
        hint = "; --trust-remote-code lets its code run" if "trust_remote_code" in str(error) else ""
        raise ModelError(f"{spec} cannot be loaded as a Hugging Face model ({_line(error)}){hint}; {_WHAT}.") from error
    images = hub.images_of(spec, model.config)
    return LoadedModel(
        model,
        Path(spec).name if Path(spec).is_dir() else spec,
        hub.inputs_of(model, batch, None if images is None else random_images(images, batch)),
        images,
        hub.text_of(spec, model, trust_remote_code),
    )


def _shaped(loaded: LoadedModel, shape: tuple[int, ...]) -> Any:
    """Example inputs of a shape that the user gave, under the name and of the type that the model is known to want."""
    known = loaded.example_inputs
    if isinstance(known, dict):
        name, like = next(iter(known.items()))
        if not like.is_floating_point():
            return {name: torch.randint(0, int(like.max()) + 1, shape)}
        return {name: torch.randn(shape)}
    return torch.randn(shape)


def _first(inputs: Any, samples: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[:samples].clone()
    if isinstance(inputs, (tuple, list)):
        return tuple(_first(value, samples) for value in inputs)
    if hasattr(inputs, "items"):
        return {name: _first(value, samples) for name, value in inputs.items()}
    return inputs


def _line(error: BaseException) -> str:
    """The first sentence of a message of another library, which may go on for a page."""
    text = " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} …"
