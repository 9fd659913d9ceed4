"""`secateurs advise`: how a network should have been trained for the density to which it is pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import MODEL, Model, Opening, Output, flat
from ._session import Session, session, table

if TYPE_CHECKING:
    from torch import nn

    from ..integrations import LoadedModel
    from ..methods.weights.three_regime import Cell, Family, Grid, Ladder

__all__ = ["advise"]

_FACTORY = "module:factory, a function of yours that makes the untrained network; it is called once a training."
_KNOBS = "sam-rho, epochs, batch-size or lr."

advise = typer.Typer(
    help="How should the dense network have been trained for this density (arXiv 2305.18383)?",
    no_args_is_help=True,
)


@dataclass(frozen=True)
class Retraining:
    """The options by which pruned copies are trained again and compared; None is the paper's value."""

    data: Annotated[str, typer.Option("--data", help="Training data, as for prune.", show_default=False)]
    test_data: Annotated[str, typer.Option("--test-data", help="Data for errors.", show_default=False)]
    copies: Annotated[int | None, typer.Option("--copies", min=2, help="Compared copies.", show_default="3")] = None
    retrain_epochs: Annotated[
        int | None, typer.Option("--retrain-epochs", min=1, help="Of each copy.", show_default="160")
    ] = None
    retrain_lr: Annotated[float | None, typer.Option("--retrain-lr", help="Of each copy.", show_default="0.1")] = None
    delta: Annotated[
        float | None, typer.Option("--delta", help="Largest barrier of two connected copies.", show_default="0.02")
    ] = None
    kappa: Annotated[
        float | None, typer.Option("--kappa", help="Least CKA of two copies that are alike.", show_default="0.98")
    ] = None
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 64
    granularity: Annotated[str | None, typer.Option("--granularity", help="As for prune.", show_default="weight")] = (
        None
    )

    def grid(self, **more: Any) -> Grid:
        """The hyperparameters, where they were given."""
        from ..methods.weights.three_regime import Grid

        names = ("copies", "retrain_epochs", "retrain_lr", "delta", "kappa")
        given = {name: getattr(self, name) for name in names} | more
        return Grid(**{name: value for name, value in given.items() if value is not None})

    def look(self, opened: LoadedModel, seed: int) -> dict[str, Any]:
        """What every advice takes: data, and what is pruned."""
        from ..integrations import load_data

        formats: dict[str, Any] = {"images": opened.images, "text": opened.text, "size": self.batch_size, "seed": seed}
        return {
            "data": load_data(self.data, split="train", **formats),
            "test": list(load_data(self.test_data, split="test", **formats)),
            **({} if self.granularity is None else {"granularity": self.granularity}),
        }


Budget = Annotated[str, typer.Option("--budget", help="What is pruned, as sparsity=95%.", show_default=False)]


def temperature(model: Model, *, budget: Budget, retraining: Retraining, opening: Opening, output: Output) -> None:
    """Say whether a trained network should have been trained hotter or colder for this density."""
    with session(**vars(output), threads=opening.threads) as talk:
        from ..methods.weights.three_regime import advise_temperature

        loaded = opening.load(model)
        look = retraining.look(loaded, opening.seed)
        ready = loaded.with_examples(look["test"][0], 2).runnable().to(opening.device)
        found = advise_temperature(
            ready.model, ready.example_inputs, budget, options=retraining.grid(), name=model, **look
        )
        talk.result(found.to_dict(), str(found))


def family(
    models: Annotated[list[str], typer.Argument(help=f"Two or more of: {MODEL}", show_default=False)],
    *,
    budget: Budget,
    sharpness: Annotated[bool, typer.Option("--sharpness", help="Also choose by the flattest dense loss.")] = False,
    retraining: Retraining,
    opening: Opening,
    output: Output,
) -> None:
    """Rank trained networks by which of them should be pruned, and say what other rules of choice would cost."""
    with session(**vars(output), threads=opening.threads) as talk:
        from ..core.errors import OptionError
        from ..methods.weights.three_regime import advise_family

        if len(set(models)) < len(models):
            raise OptionError(f"each model of a family is named once, got {', '.join(models)}.")
        loaded = {name: opening.load(name) for name in models}
        look = retraining.look(loaded[models[0]], opening.seed)
        ready = {n: m.with_examples(look["test"][0], 2).runnable().to(opening.device) for n, m in loaded.items()}
        found = advise_family(
            {name: one.model for name, one in ready.items()}, ready[models[0]].example_inputs, budget,
            options=retraining.grid(), by_sharpness=sharpness, on_cell=_teller(talk), **look,
        )  # fmt: skip
        talk.result(found.to_dict(), _table(found), found.sentence)


def sam(
    model: Annotated[str, typer.Argument(help=_FACTORY, show_default=False)],
    *,
    budget: Annotated[list[str], typer.Option("--budget", help="As sparsity=95%; repeatable.", show_default=False)],
    knob: Annotated[str, typer.Option("--knob", help=f"What is turned: {_KNOBS}")] = "sam-rho",
    setting: Annotated[
        list[float] | None,
        typer.Option("--setting", help="Of the knob; repeatable.", show_default="the paper's"),
    ] = None,
    start: Annotated[float | None, typer.Option("--start", help="First setting.", show_default="the middle")] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Of dense training.")] = 160,
    lr: Annotated[float, typer.Option("--lr", help="Of dense training.")] = 0.1,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Dense networks of every setting.")] = 1,
    retraining: Retraining,
    opening: Opening,
    output: Output,
) -> None:
    """Train dense networks and find the SAM radius, or another knob's setting, that suits each density."""
    with session(**vars(output), threads=opening.threads) as talk:
        from dataclasses import replace

        from ..methods.weights.three_regime import advise_ladder

        fresh = replace(opening, random_weights=True)

        def build(seed: int) -> nn.Module:
            return replace(fresh, seed=seed).load(model).to(opening.device).model

        loaded = fresh.load(model)
        look = retraining.look(loaded, opening.seed)
        ready = loaded.with_examples(look["test"][0], 2).runnable().to(opening.device)
        turned = {"knob": knob, "settings": tuple(setting or _usual(knob, epochs))}
        how = retraining.grid(**turned, epochs=epochs, lr=lr, seeds=tuple(range(seeds)))
        found = advise_ladder(
            build, ready.example_inputs, budget, options=how, start=start, on_cell=_teller(talk), **look
        )
        talk.result(found.to_dict(), _table(found), found.sentence)


for _command in (temperature, family, sam):
    advise.command()(flat(_command))


def _usual(knob: str, epochs: int) -> list[float]:
    """The paper's settings of a knob, as far as a run of so many epochs reaches."""
    from ..core.errors import unknown_name
    from ..methods.weights.three_regime import PAPER_SETTINGS

    usual = {str(name): values for name, values in PAPER_SETTINGS.items()}
    if knob not in usual:
        raise unknown_name("knob with settings of its own (for others give --setting)", knob, usual)
    return [value for value in usual[knob] if knob != "epochs" or value <= epochs]


def _teller(talk: Session) -> Any:
    def tell(cell: Cell) -> None:
        talk.say(str(cell))

    return tell


def _table(found: Family | Ladder) -> Any:
    return table(found.columns, found.rows)
