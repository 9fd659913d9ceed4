"""Traces of a model: on shapes where it runs on them, else on values, and in training where that runs more of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _Orthogonal
from torch.nn.utils.parametrize import ParametrizationList

from ..core.batch import call, device_of
from ..core.errors import ModelError
from ..core.ids import located
from . import rules as _rules  # noqa: F401  (registers the rules)
from .ids.rows import tie_heads, tracing
from .ids.vocabulary import Vocabulary
from .run import output_tensors, place, running
from .trace import Trace
from .tracer import Tracer
from .twin import meta_twin, named_tensors, set_mode, shared_twin, unchanged

__all__ = ["trace_model"]


def trace_model(model: nn.Module, example_inputs: Any, vocabulary: Vocabulary | None = None) -> list[Trace]:
    """The trace of one run in evaluation mode and, if some parameters took no part in it, of one in training mode.

    A run is on shapes only; where Python asks for values, on real tensors.

    Args:
        vocabulary: the ids among the inputs, whose rows can then go; None for none.

    Raises:
        ModelError: the model does not run on these inputs, or a module of it cannot be copied or cut (TorchScript, a
            lazy layer without sizes, a weight that a hook computes).
    """
    for path, module in model.named_modules():
        _refuse(path or "the model", module)
    try:
        trace = _traced(meta_twin(model), example_inputs, tracing(vocabulary))
    except Exception as error:  # noqa: BLE001  (Python may ask shapes for values they do not have; the real run decides)
        trace = _traced_on_values(model, example_inputs, tracing(vocabulary, real=True), error)
    if all(name in trace.params for name, _ in model.named_parameters()):
        return [trace]
    other = trace.another(training=True)
    try:
        return [trace, _traced(shared_twin(model) if trace.real else meta_twin(model), example_inputs, other)]
    except Exception:  # noqa: BLE001  (a model that cannot train as it is given is pruned for evaluation)
        return [trace]


def _refuse(where: str, module: nn.Module) -> None:
    """Refuse a module that cannot be copied, or whose copies cannot be cut."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"{where} is TorchScript, whose code cannot follow a cut; prune the model before it is scripted or traced."
        )
    if isinstance(module, torch.fx.GraphModule) and "eval" in vars(module):
        raise ModelError(f"{where} comes from torch.export, whose graph holds every size; prune the model before it.")
    if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None):
        raise ModelError(
            f"{where} is a {type(module).__name__} that has no sizes yet; run the model once on the example inputs, "
            "then prune it."
        )
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            raise ModelError(
                f"{name} of {where} was computed from other tensors and cannot be copied; undo what made it "
                "(torch.nn.utils.prune: prune.remove, weight_norm: remove_weight_norm), or set it to None."
            )


def _traced_on_values(model: nn.Module, example_inputs: Any, trace: Trace, on_shapes: Exception) -> Trace:
    try:
        return _traced(shared_twin(model), example_inputs, trace)
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever it is, the user is told)
        raise ModelError(
            f"the model does not run on the example inputs ({_shapes(example_inputs)}): {type(error).__name__}: {error}"
            f"{_hint(example_inputs) if isinstance(error, TypeError) else ''}"
        ) from on_shapes


def _hint(inputs: Any) -> str:
    """How to give what may have been meant."""
    if isinstance(inputs, Mapping):
        return ". A dict is the keywords of forward; write (inputs,) to pass it as one argument."
    if isinstance(inputs, list):
        return ". A list is one argument; write tuple(inputs) to pass its items one by one."
    return ""


def _traced(model: nn.Module, inputs: Any, trace: Trace) -> Trace:
    set_mode(model, trace.training)
    names = {id(t): name for name, t in named_tensors(model)}
    placed = place(inputs, device_of(model) if trace.real else "meta")
    with unchanged(model), running(model) as module:
        tracer = Tracer(names, module, trace)
        for path, part in model.named_modules():
            _observe(tracer, path, part)
        for where, tensor in located(placed) if trace.ids else ():
            if where in trace.ids:
                known = tracer.type_of(tensor)
                into = trace.solver.unify_all([trace.ids[where], known.into or trace.ids[where]], "one tensor of ids")
                tracer.remember(tensor, replace(known, into=into))
        with tracer:
            output = call(model, placed)
    trace.copy = model
    outputs = output_tensors(output)
    if not outputs:
        raise ModelError(f"no tensor is found in the model's output, a {type(output).__name__}; return tensors.")
    tie_heads(model, trace, names)
    return tracer.finish(outputs)


def _observe(tracer: Tracer, path: str, module: nn.Module) -> None:
    starts: list[int] = []
    module.register_forward_pre_hook(lambda _m, _i: starts.append(len(tracer.trace.ops)))
    module.register_forward_hook(lambda _m, _i, output: tracer.leave(path, starts.pop(), output))
    if isinstance(module, ParametrizationList):
        module.register_forward_hook(lambda module, _i, output: _stand_in(tracer, module, output))


def _stand_in(tracer: Tracer, parametrization: nn.Module, made: Tensor) -> None:
    """What a parametrization makes counts as the parameter of its shape that it is made from."""
    resolve, kind = tracer.trace.solver.resolve, tracer.type_of(made)
    if any(isinstance(part, _Orthogonal) for part in parametrization.children()):
        for dim in kind.dims:
            tracer.trace.solver.freeze(dim, "a part of an orthogonal weight is none")
    for parameter in parametrization.parameters(recurse=False):
        own = tracer.type_of(parameter)
        if [resolve(d) for d in own.dims] == [resolve(d) for d in kind.dims]:
            tracer.remember(made, replace(kind, param=own.param, axes=own.axes))


def _shapes(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return f"tensor {list(inputs.shape)}"
    if hasattr(inputs, "items"):
        return ", ".join(f"{k}: {_shapes(v)}" for k, v in inputs.items())
    if isinstance(inputs, (tuple, list)):
        return ", ".join(_shapes(v) for v in inputs)
    return type(inputs).__name__
