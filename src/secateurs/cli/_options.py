"""Options that several commands take, alone and in records, and how the texts of some are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..integrations import LoadedModel

MODEL = (
    "timm/NAME, torchvision/NAME, the name or folder of a Hugging Face model, a folder that secateurs saved, or "
    "module:factory (a function of yours that returns a model, or a model and example inputs; its code runs)."
)


def _shape(text: str | None) -> str | None:
    """The text, if it is a shape; else the command is misused."""
    if text is not None and not all(part.strip().isdecimal() and int(part) for part in text.split(",")):
        raise typer.BadParameter(f"{text!r} is no shape; give sizes with commas between, as 1,3,224,224.")
    return text


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """The shape that `--input` gives."""
    return None if text is None else tuple(int(part) for part in text.split(","))


def _floor(text: str | None) -> str | None:
    try:
        floor_of(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a count, as 8, nor a share, as 10%.") from None
    return text


def floor_of(text: str | None) -> int | float | None:
    """The count or the share that `--floor` gives.

    >>> floor_of("8"), floor_of("10%"), floor_of("0.1")
    (8, 0.1, 0.1)
    """
    if text is None:
        return None
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return int(text) if text.isdecimal() else float(text)


def _settings(texts: list[str] | None) -> list[str] | None:
    for text in texts or ():
        if "=" not in text:
            raise typer.BadParameter(f"{text!r} must read NAME=VALUE.")
    return texts


def settings_of(texts: list[str] | None) -> dict[str, Any]:
    """The values that `--set NAME=VALUE` gives: numbers, true, false, null and lists as in JSON, else text."""
    import json

    found: dict[str, Any] = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        try:
            found[name.strip().replace("-", "_")] = json.loads(value)
        except ValueError:
            found[name.strip().replace("-", "_")] = value
    return found


def filled(record: Any, method: str, given: Mapping[str, Any]) -> Any:
    """`record`, the hyperparameters of the method so called, with the values `given`.

    Raises:
        OptionError: a value that it has no field for.
    """
    from ..core.errors import unknown_name

    names = [field.name for field in fields(record)] if record else []
    for name in given:
        if name not in names:
            raise unknown_name(f"option of {method}", name, names)
    return record(**given)


Model = Annotated[str, typer.Argument(help=MODEL, show_default=False)]
Input = Annotated[
    str | None,
    typer.Option("--input", metavar="1,3,224,224", callback=_shape, help="Shape of the example input, with the batch."),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Samples in the example input, where its shape is known.")]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="Do not load pretrained weights.")]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", metavar="PACKAGE", help="A package whose classes a saved model may use; repeatable."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that a Hugging Face model brings.")
]
Device = Annotated[str, typer.Option("--device", help="Where the model runs, as cpu or cuda:0.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads within an operation.", show_default="all")
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]
Granularity = Annotated[
    str | None,
    typer.Option(
        "--granularity",
        help="channel (widths and heads, cut out), head, head-size, expert, embedding (rows of vocabularies), layer "
        "(whole blocks), weight or block:4x1 (zeros).",
        show_default="channel; weight for N:M",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the result.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]
Floor = Annotated[
    str | None,
    typer.Option(
        "--floor",
        metavar="COUNT|SHARE",
        callback=_floor,
        help="Fewest units that stay in a group, as 8 or 10%.",
        show_default="10% of channels, 1 weight",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        callback=_settings,
        help="An option of the method or, without one, of the criterion; repeatable.",
    ),
]


@dataclass(frozen=True)
class Opening:
    """The options by which a command opens a MODEL."""

    shape: Input = None
    batch: Batch = 1
    random_weights: RandomWeights = False
    trust: Trust = None
    trust_remote_code: TrustRemoteCode = False
    device: Device = "cpu"
    threads: Threads = None
    seed: Seed = 0

    def load(self, model: str) -> LoadedModel:
        """The model that was named, not yet on the device that was asked for."""
        from ..integrations import load_model_from

        return load_model_from(
            model,
            random_weights=self.random_weights,
            batch=self.batch,
            shape=shape_of(self.shape),
            seed=self.seed,
            trust=self.trust or (),
            trust_remote_code=self.trust_remote_code,
        )

    def ready(self, model: str) -> LoadedModel:
        """The model that was named, with inputs to run it on, on the device that was asked for."""
        return self.load(model).runnable().to(self.device)


@dataclass(frozen=True)
class Output:
    """The options by which a command speaks; see `session`."""

    as_json: Json = False
    quiet: Quiet = False
    debug: Debug = False


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it: a record of options among its parameters is taken apart into its fields."""
    taken = signature(command, eval_str=True).parameters
    records: dict[str, Any] = {name: p.annotation for name, p in taken.items() if is_dataclass(p.annotation)}

    @wraps(command)
    def run(**given: Any) -> None:
        made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in records.items()}
        command(**given, **made)

    options = [
        option
        for name, parameter in taken.items()
        for option in (signature(records[name], eval_str=True).parameters.values() if name in records else [parameter])
    ]
    run.__dict__["__signature__"] = Signature([o.replace(kind=Parameter.KEYWORD_ONLY) for o in options])
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run
