"""A plan for a model: applied as zeros or as a cut, saved, and applied again elsewhere with the same result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.cost import CostModel
from ..core.errors import FileError, OptionError, PlanError, ProofError
from ..core.ids import Recoded, recoded
from ..core.plan import Plan, Recipe, pack, unpack
from ..core.state import read_state, write_state
from ..core.units import Group, WeightGroup
from ..core.wrapped import unwrapped
from .biases import with_biases
from .compact import on_kept
from .configs.config import mend_config
from .cut import AnyStructure, check_fits, cut, element_masks, mask, prove
from .depth.layers import LayerStructure, layer_groups, original_paths, skipped
from .mixtures.cut import ExpertStructure, expert_groups, never_known
from .structure import Structure, fingerprint, long_names, short_names, substituted
from .twin import named_tensors

__all__ = ["ModelPlan", "digest"]

_KIND = "plan"
_SAMPLE = 16_384
_RUNS = 128


def digest(model: nn.Module) -> str:
    """A digest of names, shapes, dtypes and values of all parameters and buffers.

    It tells one training state from another, not one tampered weight: of large tensors it reads 16,384 values in runs,
    evenly spread, since hashing all of a model can take longer than pruning it. Tensors on meta have no values.
    """
    sha = hashlib.sha256()
    for name, tensor in sorted(named_tensors(model), key=lambda item: item[0]):
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.is_meta:
            continue
        sampled = _sample(tensor.detach().flatten()).cpu().contiguous()
        sha.update(sampled.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _sample(values: Tensor) -> Tensor:
    """All of a few values; of many, runs of neighbours, which are read much faster than single ones far apart."""
    if values.numel() <= _SAMPLE:
        return values
    rows = values[: values.numel() // _RUNS * _RUNS].view(_RUNS, -1)
    return rows[:, : _SAMPLE // _RUNS]


@dataclass(frozen=True, eq=False)
class ModelPlan(Plan):
    """A `Plan` over the units of one model.

    Args:
        fingerprint: of the names and shapes of the model's tensors.
        digest: of their values, too; a plan may be applied to other values, such as fine-tuned or rewound ones.
        structure: for channel units, what the shape algebra found, and for layers, which can go; None for single
            weights.
        example_inputs: what the model is run on to prove a cut.
    """

    fingerprint: str = ""
    digest: str = ""
    structure: AnyStructure | None = None
    example_inputs: Any = None

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """For each parameter that is touched, the bool mask of the entries that stay, in its shape."""
        model = unwrapped(model)
        groups = self.suited(model).groups
        return element_masks(groups, self.keep, {n: p.shape for n, p in model.named_parameters()})

    def mask(self, model: nn.Module) -> nn.Module:
        """A copy of `model` in which everything that goes is zero; it is neither smaller nor faster.

        Layers that go pass their input on.

        Raises:
            PlanError: the plan is for another model.
        """
        model = unwrapped(model)
        self.check(model)
        if isinstance(self.structure, LayerStructure):
            return skipped(model, self.structure, self.keep)
        return mask(model, self.suited(model).groups, self.keep)

    def cut(self, model: nn.Module) -> nn.Module:
        """A smaller copy of `model`, proven equal to `mask(model)` on the example inputs.

        Raises:
            PlanError: the plan is for another model, or is about single weights, which cannot be cut out.
            ProofError: the two forms differ.
        """
        return self.proven_cut(model)[0]

    def proven_cut(self, model: nn.Module) -> tuple[nn.Module, float]:
        """The cut model, and the largest relative difference that the proof found; see `cut`."""
        model = unwrapped(model)
        self.check(model)
        if self.structure is None:
            raise PlanError(
                f"{self.recipe.granularity} units are entries of a tensor and cannot be cut out of it; "
                "use plan.mask(model), or granularity='channel' for a smaller model."
            )
        structure = self.suited(model).structure
        assert structure is not None
        smaller = cut(model, structure, self.keep)
        masked = self.mask(model)
        if isinstance(structure, LayerStructure):
            original = original_paths(model, structure.gone(self.keep))
            return smaller, prove(masked, smaller, self.example_inputs, original=original)
        if isinstance(structure, ExpertStructure):
            original = original_paths(model, structure.gone(self.keep))
            reference = never_known(structure.mixtures, self.keep)
            proof = partial(prove, model, smaller, self.example_inputs, reference, original)
            return smaller, _with_config(smaller, proof)
        proof = partial(
            prove, masked, smaller, self.example_inputs, on_kept(structure, self.keep), recode=self.recode,
            outputs=structure.kept_outputs(self.keep),
        )  # fmt: skip
        return smaller, _with_config(smaller, proof)

    def kept_ids(self, group: str | None = None) -> Tensor:
        """The ids that stay, in the old numbering: int64 [rows left], ascending. The new number of one is its place.

        Args:
            group: of granularity "embedding"; may be left out where there is one.

        Raises:
            OptionError: no such group, or several to choose from.
        """
        known = [g.name for g in self.groups if g.kind == "embedding"]
        if group is None and len(known) == 1:
            group = known[0]
        if group is None or group not in known:
            raise OptionError(f"kept_ids needs the name of one of the groups of ids: {', '.join(known) or 'none'}.")
        return self.keep[group].cpu().nonzero().flatten()

    def recode(self, inputs: Any, unknown: int | None = None) -> Any:
        """Inputs of the original model as those of the cut one: ids of rows of embeddings get their new numbers.

        Args:
            inputs: a tensor, a tuple of positional arguments or a dict of keywords; labels that are ids, as those of a
                language model, are renumbered under the name "labels", too. Negative ids stay.
            unknown: the id (old number) that stands for ids that were removed. Default: that of the plan, if it has
                one; else none may occur.

        Raises:
            DataError: an id was removed, and there is no `unknown`.
        """
        return recoded(inputs, self._places(), self.recipe.unknown if unknown is None else unknown)

    def recode_batches(self, data: Any, unknown: int | None = None) -> Any:
        """`data`, batches or a function from the number of a pass to batches, with the ids of each renumbered.

        Batches are as in `core.batch`, `unknown` is as in `recode`. Of a plan without ids, `data` itself.
        """
        places = self._places()
        if not places or data is None:
            return data
        return Recoded(data, places, self.recipe.unknown if unknown is None else unknown)

    def _places(self) -> dict[str, Tensor]:
        return self.structure.kept_ids(self.keep) if isinstance(self.structure, Structure) else {}

    def check(self, model: nn.Module, values: bool = False) -> None:
        """Refuse a model that the plan was not made for.

        Args:
            values: also refuse other weights of the same shapes.

        Raises:
            PlanError: says which tensor differs.
        """
        model = unwrapped(model)
        structure = self.suited(model).structure
        if structure is not None:
            check_fits(model, structure)
        elif fingerprint(model) != self.fingerprint:
            _name_difference(model, self.groups)
        if values and digest(model) != self.digest:
            raise PlanError("this plan was made from other weights of the same shapes.")

    def suited(self, model: nn.Module) -> ModelPlan:
        """The plan for a model that has got biases since it was planned (see `biases`); for any other, this one."""
        if not isinstance(self.structure, Structure):
            return self
        structure = with_biases(self.structure, model)
        return replace(self, structure=structure, groups=structure.groups, costs=structure.costs)

    def save(self, path: str | Path) -> Path:
        """The path of the file written: one safetensors file, masks packed to bits, the rest as JSON in its header."""
        tree = {
            "recipe": self.recipe.to_dict(),
            "fingerprint": self.fingerprint,
            "digest": self.digest,
            "structure": None if self.structure is None else self.structure.to_dict(),
            "groups": [
                [g.name, list(g.shape), list(g.block), g.inputs] for g in self.groups if isinstance(g, WeightGroup)
            ],
            "costs": substituted(self.costs, short_names(self.groups)).to_dict(),
            "keep": {name: [pack(m), len(m)] for name, m in self.keep.items()},
            "scores": dict(self.scores),
            "example_inputs": _plain(self.example_inputs),
        }
        write_state(path, tree, _KIND)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> ModelPlan:
        """The plan in a file of `save`.

        Raises:
            FileError: the file is missing, damaged, or not a plan.
        """
        tree = read_state(path, _KIND)
        try:
            structure: AnyStructure | None = None
            groups: tuple[Group, ...]
            found = tree["structure"]
            if found is None:
                # Plans of the first release lack the axis of the inputs, which was the second.
                groups = tuple(WeightGroup(n, tuple(s), (b[0], b[1]), *axis) for n, s, b, *axis in tree["groups"])
            elif "depth" in found:
                groups = layer_groups(found)
            elif "experts" in found:
                groups = expert_groups(found)
            else:
                structure = Structure.from_dict(found)
                groups = structure.groups
            costs = CostModel.from_dict(tree["costs"], {f"g{i}": g.size for i, g in enumerate(groups)})
            costs = substituted(costs, long_names(groups))
            if found is not None and structure is None:
                kind = LayerStructure if "depth" in found else ExpertStructure
                structure = kind.from_dict(found, costs)
            return cls(
                groups=groups,
                scores=tree["scores"],
                keep={name: unpack(bits, n) for name, (bits, n) in tree["keep"].items()},
                costs=costs,
                recipe=Recipe.from_dict(tree["recipe"]),
                fingerprint=tree["fingerprint"],
                digest=tree["digest"],
                structure=structure,
                example_inputs=tree["example_inputs"],
            )
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FileError(f"{path} is not a plan that this release can read: {error!r}.") from error


def _with_config(smaller: nn.Module, proof: Callable[[], float]) -> float:
    """What the proof finds, with the config of the cut model mended where that is right."""
    undo = mend_config(smaller)
    try:
        return proof()
    except ProofError:
        if undo is None:
            raise
        undo()
    # The config is as it was; the numbers that code reads from it at every run are not of its sizes.
    return proof()


def _name_difference(model: nn.Module, groups: tuple[Any, ...]) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for group in groups:
        if shapes.get(group.name) != group.shape:
            found = "is missing" if group.name not in shapes else f"has shape {list(shapes[group.name])}"
            raise PlanError(
                f"this plan is for another model: {group.name} {found}, the plan expects {list(group.shape)}."
            )
    raise PlanError("this plan is for another model: names or shapes of its tensors differ.")


def _plain(inputs: Any) -> Any:
    """Example inputs as plain containers of tensors; a BatchEncoding becomes a dict, a named tuple a tuple."""
    if hasattr(inputs, "items"):
        return {k: _plain(v) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return (list if isinstance(inputs, list) else tuple)(_plain(v) for v in inputs)
    return inputs
