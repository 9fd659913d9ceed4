"""CFSP's recovery: adapters of one total size, of higher rank in blocks that turn their input more."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from benchmarks.families import FAMILIES
from secateurs.core.errors import ModelError, OptionError
from secateurs.methods.language.cfsp import importance
from secateurs.methods.language.guided_lora import GuidedLora, adapted_layers, ranks_of
from secateurs.pruning import Pruned
from secateurs.recover.adapters import adapters_of, attach
from secateurs.recover.finetune import fine_tune
from secateurs.recover.trainable import only_trained


def family(name: str = "Llama") -> tuple[Any, dict[str, Tensor]]:
    """A model whose second block turns its input more."""
    torch.manual_seed(0)
    model, x = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.get_submodule(list(adapted_layers(model))[1]).parameters():
            parameter.mul_(3)
    return model, x


def batches(number: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(3, 100, (4, 12), generator=generator) for _ in range(number)]
    return [{"input_ids": one, "labels": one} for one in ids]


def cut(method: str = "cfsp", **options: Any) -> Pruned:
    model, x = family()
    return sec.prune(model, x, "sparsity=40%", method=method, data=batches(), measure=False, **options)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for adapter in adapters_of(model).values() for p in (adapter.up, adapter.down))


def while_training(model: nn.Module, how: GuidedLora) -> tuple[int, dict[str, tuple[int, float]]]:
    """How many parameters train, and rank and scale of each adapter, seen in the first step."""
    seen: list[Any] = []

    def look(_: Any) -> None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == parameters(model)
        seen.append((trained, {name: (a.rank, a.scale) for name, a in adapters_of(model).items()}))

    how.run(model, family()[0], batches(), on_step=look)
    return seen[0]


def test_ranks_follow_the_importance_and_cost_as_much_as_equal_ones() -> None:
    made = cut()
    assert len({layer.mlp.gate_proj.out_features for layer in made.model.model.layers}) == 2
    guided, plain = (
        while_training(copy.deepcopy(made.model), GuidedLora(steps=1, rank=6, importance=how))
        for how in ("angular", "none")
    )
    weighed = importance(family()[0], batches())
    assert weighed["model.layers.1"] > 1.2 * weighed["model.layers.0"]
    found = {name: rank for name, (rank, _) in guided[1].items()}
    layers = made.model.model.layers
    costs = [sum(sum(m.weight.shape) for m in layer.modules() if isinstance(m, nn.Linear)) for layer in layers]
    assert plain[0] == 6 * sum(costs)
    assert abs(guided[0] - plain[0]) <= max(costs) / 2
    low, high = (found[f"model.layers.{i}.mlp.down_proj"] for i in (0, 1))
    assert low < 6 < high
    assert abs(high / low - weighed["model.layers.1"] / weighed["model.layers.0"]) < 1 / low + high / low**2
    assert len(found) == 2 * 7
    # All blocks learn at one scale.
    scales = [scale for _, scale in (*guided[1].values(), *plain[1].values())]
    assert scales == pytest.approx([16 / 6] * 28)


def test_layers_are_ordinary_again_and_only_those_of_blocks_have_moved() -> None:
    start, made = cut(), cut(recover=GuidedLora(steps=12, lr=1e-2, rank=4))
    assert adapters_of(made.model) == {}
    assert made.model.state_dict().keys() == start.model.state_dict().keys()
    assert [type(m) for m in made.model.modules()] == [type(m) for m in start.model.modules()]
    assert all(p.requires_grad for p in made.model.parameters())
    before = start.model.state_dict()
    moved = {name for name, value in made.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"{name}.weight" for names in adapted_layers(start.model).values() for name in names}
    with torch.no_grad():
        losses = [sum(float(it.model.eval()(**batch).loss) for batch in batches()) for it in (start, made)]
    assert losses[1] < losses[0] - 0.05


def test_equal_ranks_are_plain_lora() -> None:
    start = cut()
    guided, plain = copy.deepcopy(start.model), copy.deepcopy(start.model)
    GuidedLora(steps=4, lr=1e-2, rank=4, importance="none").run(guided, family()[0], batches())
    names = [name for layers in adapted_layers(plain).values() for name in layers]
    with attach(plain, names, rank=4, alpha=16) as adapters, only_trained(plain, "adapters"):
        fine_tune(plain, batches(), steps=4, lr=1e-2, optimizer="adamw", schedule="linear-warmup")
        adapters.merge()
    theirs = plain.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in guided.state_dict().items())


@pytest.mark.parametrize(("name", "method"), [("GPT-2", "flap"), ("BERT", None)])
def test_it_recovers_after_any_cut(name: str, method: str | None) -> None:
    model, x = family(name)
    data = batches() if name == "GPT-2" else [batch | {"labels": torch.tensor([0, 1, 2, 0])} for batch in batches()]
    made = sec.prune(
        model, x, "sparsity=40%", method=method, data=data, recover=GuidedLora(steps=6, rank=2), measure=False
    )
    assert adapters_of(made.model) == {}
    assert made.report.history is not None
    assert made.report.proof is not None


def test_no_block_gets_more_than_its_smallest_layer_allows() -> None:
    model, _ = family()
    narrow = sec.prune(*family(), "sparsity=90%", scope="*.0.mlp.gate_proj", measure=False).model
    width = narrow.model.layers[0].mlp.gate_proj.out_features
    assert width < 16
    found = ranks_of(narrow, {"model.layers.0": 9.0, "model.layers.1": 1.0}, 8)
    assert found["model.layers.0"] == width
    assert ranks_of(model, {"model.layers.0": 9.0, "model.layers.1": 1.0}, 8)["model.layers.0"] == 14


# -- resuming ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Stands for a kill."""


def stop(progress: Any) -> None:
    if progress.step == 5:
        raise Stopped


def test_a_killed_training_ends_like_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = GuidedLora(steps=9, lr=1e-2, rank=4)
    whole = cut(recover=how)
    with pytest.raises(Stopped):
        cut(recover=how, checkpoint=tmp_path, on_step=stop)
    # A loader may have gone on since, so that the ranks are those of the first time.
    monkeypatch.setattr("secateurs.methods.language.guided_lora.importance", None)
    steps: list[int] = []
    resumed = cut(recover=how, checkpoint=tmp_path, on_step=lambda progress: steps.append(progress.step))
    assert steps == [4, 5, 6, 7, 8, 9]
    theirs = whole.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in resumed.model.state_dict().items())
    with pytest.raises(OptionError, match="holds a run of another model, budget or options"):
        cut(recover=GuidedLora(steps=9, lr=1e-2, rank=3), checkpoint=tmp_path)


def test_a_failed_training_takes_its_adapters_away() -> None:
    start = cut()
    before = copy.deepcopy(start.model.state_dict())
    with pytest.raises(Stopped):
        GuidedLora(steps=9, lr=1e-2).run(start.model, family()[0], batches(), on_step=stop)
    assert before.keys() == start.model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in start.model.state_dict().items())


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_zeros_of_single_weights_would_be_filled() -> None:
    model, x = family()
    with pytest.raises(OptionError, match="adapters would fill the zeros of single weights: recover by Retraining"):
        sec.prune(model, x, "2:4", method="wanda", data=batches(), recover=GuidedLora(steps=2), measure=False)


def test_a_model_of_other_blocks() -> None:
    model, _ = family()
    with pytest.raises(ModelError, match=r"model\.layers\.1 is no block of the dense model"):
        ranks_of(model, {"model.layers.0": 1.0}, 4)
    with pytest.raises(ModelError, match="no block of Sequential has a linear layer, so no adapter can train"):
        adapted_layers(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()))


def test_all_faults_of_the_options_are_told() -> None:
    with pytest.raises(OptionError, match=r"GuidedLora: rank .*; alpha .*; importance .*; calibration "):
        GuidedLora(steps=1, rank=0, alpha=0, importance="norm", calibration=0)  # type: ignore[arg-type]
