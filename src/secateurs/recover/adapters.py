"""Low-rank adapters that a layer carries while it trains, and that are folded into its weight at the end.

    kind         weight while it trains    start                       weight after merge
    lora         W + s·B·A                 A Kaiming-uniform, B = 0    the same; zeros of W are lost
    lora-prune   W + s·B·A                 as lora                     W + s·(B·A)⊙M, which is another function
    scale-lora   W ⊙ (B·A)                 A = B = 1/√r, so B·A = 1    the same, zeros of W stay
    mask-lora    W + s·(B·A)⊙M             as lora                     the same, zeros of W stay

Here s = alpha / r, and M is what stays of a pruned weight. LoRA: Hu et al., arXiv 2106.09685; the others: Zimmer et al.
(PERP), arXiv 2312.15230. M is stored when the adapter is made: a weight that becomes 0 later, as half precision makes
some, is still one that stays.

An adapter is the submodule `adapter` of its layer and adds its part in a forward hook. So layers keep their class and
weights their names: masks and plans by name stay true, and what PyTorch or Hugging Face asks of a layer it still finds.
`lora` and `lora-prune` never build B·A, but multiply twice by a thin matrix; the other two must build it, and save
optimizer state but no activations.

Not through peft: it has no masked kind, it renames the layers that it wraps, and models that are not from Hugging Face
must not need it. The plain kind computes and merges what peft's LoRA does (a test compares them), and `to_peft` hands
its matrices over. A model that peft wrapped is merged by peft (`merge_and_unload`) before it is pruned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ModelError, OptionError, unknown_name
from ..solvers.blocks import weight_of
from ..solvers.gram import from_matrix, is_hf_conv1d, to_matrix
from .context import seeded

__all__ = ["KINDS", "Adapter", "AdapterKind", "Adapters", "adaptable", "adapters_of", "attach", "merge", "to_peft"]

AdapterKind = Literal["lora", "lora-prune", "scale-lora", "mask-lora"]
KINDS: tuple[str, ...] = get_args(AdapterKind)
_MASKED = ("lora-prune", "mask-lora")
_MOST_FAULTS = 5


class Adapter(nn.Module):
    """The low-rank part of one layer; `attach` makes it.

    Attributes:
        kind: see the module.
        down: A [rank, inputs], trained.
        up: B [outputs, rank], trained.
        scale: s = alpha / rank; 1 for "scale-lora".
        mask: bool [outputs, inputs], True stays; None for the kinds that need none.
        gate: what multiplies the layer's outputs after the bias, [outputs]; None, the default, for nothing. Assign a
            tensor; `merge` folds it into weight and bias.
        dropout: of the inputs of A, in training.
    """

    mask: Tensor | None
    gate: Tensor | None

    def __init__(
        self, kind: str, outputs: int, inputs: int, *, rank: int, alpha: float, dropout: float = 0.0,
        mask: Tensor | None = None, dtype: torch.dtype | None = None, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind, self.dropout = kind, dropout
        self.scale = 1.0 if kind == "scale-lora" else alpha / rank
        self.down = nn.Parameter(torch.empty(rank, inputs, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype, device=device))
        self.register_buffer("mask", mask)
        self.register_buffer("gate", None)
        if kind == "scale-lora":
            nn.init.constant_(self.down, rank**-0.5)
            nn.init.constant_(self.up, rank**-0.5)
        else:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.down)

    @property
    def product(self) -> Tensor:
        """B·A, [outputs, inputs]; differentiable."""
        return self.up @ self.down

    def change(self, weight: Tensor) -> Tensor:
        """What is added to `weight` [outputs, inputs] while it trains; differentiable, in the dtype of A and B."""
        if self.kind == "scale-lora":
            return weight.to(self.up.dtype) * (self.product - 1)
        change = self.scale * self.product
        return change if self.mask is None or self.kind == "lora-prune" else change * self.mask

    def merged(self, weight: Tensor) -> Tensor:
        """The weight after the merge, in the dtype of `weight`: exact zeros where the mask says so, gate included."""
        wide = weight.to(self.up.dtype)
        if self.kind == "scale-lora":
            made = wide * self.product
        else:
            made = wide + self.scale * self.product
        if self.mask is not None:
            made = made.masked_fill(~self.mask, 0)
        return (made if self.gate is None else made * self.gate[:, None]).to(weight.dtype)

    def forward(self, given: Tensor, weight: Tensor) -> Tensor:
        """What is added to the layer's output for the input `given`; `weight` as in `change`."""
        if self.kind in ("lora", "lora-prune"):
            dropped = F.dropout(given.to(self.down.dtype), self.dropout, self.training)
            return F.linear(F.linear(dropped, self.down), self.up) * self.scale
        return F.linear(given, self.change(weight).to(given.dtype))

    def extra_repr(self) -> str:
        """Kind, rank and scale, for printing."""
        return f"{self.kind}, rank={self.rank}, scale={self.scale:g}"


class Adapters(Mapping[str, Adapter]):
    """The adapters that one `attach` made, by the qualified name of their layer.

    As a context manager it takes those away on exit that were not merged, so that a model whose training failed is as
    it was:

        with attach(model, "*", "mask-lora", masks=masks) as adapters:
            ...
            adapters.merge()
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = dict(layers)
        self._made = {name: _adapter(layer) for name, layer in layers.items()}

    def __getitem__(self, name: str) -> Adapter:
        """The adapter of a layer; it stays here after a merge."""
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def __enter__(self) -> Adapters:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer, in order."""
        return [matrix for adapter in self._made.values() for matrix in (adapter.down, adapter.up)]

    def merge(self) -> tuple[str, ...]:
        """As the function `merge`, for these layers alone."""
        return _merge(self._attached())

    def remove(self) -> None:
        """None; the layers are as before `attach`, but for those that were merged."""
        for layer in self._attached().values():
            _detach(layer)

    def _attached(self) -> dict[str, nn.Module]:
        return {name: layer for name, layer in self._layers.items() if _carries(layer)}


def attach(
    model: nn.Module,
    names: str | Sequence[str],
    kind: AdapterKind = "lora",
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    masks: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Adapters:
    """The adapters that the named layers of `model` carry from now on; which parameters train is not changed.

    Args:
        model: changed in place; see `Adapters` for how to undo it.
        names: patterns of names of Linear layers or Hugging Face `Conv1D`s.
        kind: see the module. "lora" needs no mask and is the one for a model from which units were cut out.
        rank: r (16, PERP).
        alpha: the scale is alpha / rank (32, PERP); without effect for "scale-lora".
        dropout: of the inputs of A; for "lora" alone.
        masks: what stays, by name of the weight and in its shape; a layer without one stays dense. None: what is not
            zero now. For "lora-prune" and "mask-lora".
        dtype: of A and B; default float32, or the weight's if it is wider.
        seed: of the random A; each layer draws by its own name.

    Raises:
        OptionError: an unknown name or kind, a rank that a layer cannot have, a mask of another shape or one under
            which the weight is not zero, dropout for another kind, or a kind for pruned layers and none is pruned.
        ModelError: a weight that another module holds too, or one that is no floating-point matrix; or a layer that
            carries an adapter already. Nothing was changed.
    """
    if kind not in KINDS:
        raise unknown_name("adapter kind", kind, KINDS)
    _check_numbers(kind, rank, alpha, dropout)
    layers = _chosen(model, names)
    _check_layers(model, layers, rank)
    kept = {name: _mask(name, layer, masks) for name, layer in layers.items()} if kind != "lora" else {}
    if kept and all(bool(mask.all()) for mask in kept.values()):
        raise OptionError(
            f"{kind} keeps zeros, and no weight of {_listed(layers)} has one: prune first, or use 'lora'."
        )
    made = {}
    for name, layer in layers.items():
        weight = cast(Tensor, layer.weight)
        outputs, inputs = to_matrix(layer, weight)[0].shape
        with seeded(seed, "adapter", name):
            made[name] = Adapter(
                kind, outputs, inputs, rank=rank, alpha=alpha, dropout=dropout,
                mask=kept[name] if kind in _MASKED else None,
                dtype=dtype or torch.promote_types(weight.dtype, torch.float32), device=weight.device,
            )  # fmt: skip
    for name, layer in layers.items():
        layer.add_module("adapter", made[name].train(layer.training))
        # First of all hooks, so that those that were there see what the layer now gives.
        layer.register_forward_hook(_adapt, prepend=True, with_kwargs=True)
    return Adapters(layers)


def merge(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers whose adapters were folded into their weights; they are ordinary layers again.

    Computed in the adapters' dtype and rounded once to the weight's. What a mask removes is exactly zero, and so is
    what "scale-lora" found at zero. "lora-prune" changes the model's function by -s·((B·A)⊙(1-M))·x.

    Raises:
        ModelError: a merged weight is not finite; nothing was changed.
    """
    return _merge({name: layer for name, layer in model.named_modules() if _carries(layer)})


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters that layers of `model` carry, by the qualified name of the layer."""
    return {name: _adapter(layer) for name, layer in model.named_modules() if _carries(layer)}


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can carry an adapter, by qualified name: Linear, and the `Conv1D` of Hugging Face.

    The output projection of `nn.MultiheadAttention` cannot: its weight is read without the layer being called.
    """
    return {name: module for name, module in model.named_modules() if _is_adaptable(module)}


def to_peft(model: nn.Module) -> dict[str, Tensor]:
    """The plain adapters as peft names them, for `peft.set_peft_model_state_dict` on a `LoraConfig` of the same rank,
    alpha and layers.

    Raises:
        OptionError: there is none, or one of another kind or with a gate, which peft does not have.
    """
    found = adapters_of(model)
    strange = [name for name, adapter in found.items() if adapter.kind != "lora" or adapter.gate is not None]
    if strange or not found:
        told = f"{strange[0]} carries {found[strange[0]].kind} or a gate" if strange else "the model carries no adapter"
        raise OptionError(f"peft holds plain LoRA only, and {told}: merge it, or attach kind='lora'.")
    return {
        f"base_model.model.{name}.lora_{letter}.weight": matrix.detach()
        for name, adapter in found.items()
        for letter, matrix in (("A", adapter.down), ("B", adapter.up))
    }


def _adapt(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    given: Tensor = args[0] if args else next(iter(kwargs.values()))
    adapter = _adapter(layer)
    added = adapter(given, to_matrix(layer, cast(Tensor, layer.weight))[0])
    output = output + added.to(output.dtype)
    return output if adapter.gate is None else output * adapter.gate.to(output.dtype)


def _adapter(layer: nn.Module) -> Adapter:
    return cast(Adapter, layer._modules["adapter"])


def _carries(layer: nn.Module) -> bool:
    return isinstance(layer._modules.get("adapter"), Adapter)


def _is_adaptable(module: nn.Module) -> bool:
    uncalled = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return (isinstance(module, nn.Linear) and not uncalled) or is_hf_conv1d(module)


def _detach(layer: nn.Module) -> None:
    # By the function, not by a handle: a deep copy has hooks of its own and no handle.
    for number in [number for number, hook in layer._forward_hooks.items() if hook is _adapt]:
        del layer._forward_hooks[number]
        layer._forward_hooks_with_kwargs.pop(number, None)
    del layer._modules["adapter"]


@torch.no_grad()
def _merge(layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    broken = [name for name, layer in layers.items() if not bool(_merged(layer).isfinite().all())]
    if broken:
        raise ModelError(
            f"the merged weight of {', '.join(broken[:_MOST_FAULTS])} is not finite: train with a lower rate."
        )
    for layer in layers.values():
        gate = _adapter(layer).gate
        if gate is not None and isinstance(layer.bias, Tensor):
            layer.bias.mul_(gate)
        cast(Tensor, layer.weight).copy_(_merged(layer))
        _detach(layer)
    return tuple(layers)


def _merged(layer: nn.Module) -> Tensor:
    weight = cast(Tensor, layer.weight)
    return from_matrix(layer, _adapter(layer).merged(to_matrix(layer, weight)[0])[None], weight.shape)


def _check_numbers(kind: str, rank: int, alpha: float, dropout: float) -> None:
    faults = []
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        faults.append(f"rank must be a whole number of at least 1, got {rank!r}")
    if not alpha > 0 or math.isinf(alpha):
        faults.append(f"alpha must be positive, got {alpha}")
    if not 0 <= dropout < 1:
        faults.append(f"dropout must lie in [0, 1), got {dropout}")
    elif dropout and kind != "lora":
        faults.append(f"dropout must be 0 for {kind}, got {dropout}")
    if faults:
        raise OptionError(f"cannot attach adapters: {'; '.join(faults)}.")


def _chosen(model: nn.Module, names: str | Sequence[str]) -> dict[str, nn.Module]:
    known, modules = adaptable(model), dict(model.named_modules())
    chosen: set[str] = set()
    for pattern in (names,) if isinstance(names, str) else names:
        hits = [name for name in known if fnmatchcase(name, pattern)]
        if not hits and pattern in modules:
            raise OptionError(
                f"{pattern or 'the model'} is a {type(modules[pattern]).__name__} and carries no adapter: name Linear "
                "layers or Conv1Ds of Hugging Face that are called."
            )
        if not hits:
            raise unknown_name("layer", pattern, known)
        chosen.update(hits)
    return {name: layer for name, layer in known.items() if name in chosen}


def _check_layers(model: nn.Module, layers: Mapping[str, nn.Module], rank: int) -> None:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    broken: list[str] = []
    small: list[str] = []
    for name, layer in layers.items():
        weight = cast(Tensor, layer.weight)
        if _carries(layer):
            broken.append(f"{name} carries one already, which must be merged or removed first")
        elif not weight.is_floating_point() or weight.dim() != 2:
            broken.append(f"the weight of {name} is no floating-point matrix ({weight.dtype}, {list(weight.shape)})")
        elif owners.get(id(weight), 0) > 1:
            broken.append(f"another module holds the weight of {name} too, and a merge would change both")
        elif rank > min(weight.shape):
            small.append(f"{name} allows at most {min(weight.shape)}")
    if broken:
        raise ModelError(f"cannot attach adapters: {'; '.join(broken[:_MOST_FAULTS])}; leave those layers out.")
    if small:
        raise OptionError(f"rank {rank} is too high: {'; '.join(small[:_MOST_FAULTS])}.")


def _mask(name: str, layer: nn.Module, masks: Mapping[str, Tensor] | None) -> Tensor:
    """What stays of the layer's weight, bool [outputs, inputs]."""
    weight = cast(Tensor, layer.weight).detach()
    key = weight_of(name)
    if masks is None:
        kept = weight != 0
    elif key not in masks:
        kept = torch.ones_like(weight, dtype=torch.bool)
    else:
        kept = masks[key].to(weight.device)
        if kept.dtype != torch.bool or kept.shape != weight.shape:
            raise OptionError(
                f"the mask of {key} must be bool {list(weight.shape)}, got {kept.dtype} {list(kept.shape)}."
            )
        if bool((weight != 0).logical_and(~kept).any()):
            raise OptionError(f"{key} is not zero where its mask removes it: apply the mask to the model first.")
    return to_matrix(layer, kept)[0].clone()


def _listed(layers: Mapping[str, nn.Module]) -> str:
    shown = [name or "the model" for name in layers][:_MOST_FAULTS]
    return ", ".join(shown) + (" …" if len(layers) > len(shown) else "")
