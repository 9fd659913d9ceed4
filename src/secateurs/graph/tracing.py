"""Traces of a model: on shapes where it runs on them, else on values, and in training where that runs more of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import call, device_of
from ..core.errors import ModelError
from . import rules as _rules  # noqa: F401  (registers the rules)
from .run import output_tensors, place, running
from .trace import Trace, Tracer
from .twin import meta_twin, named_tensors, set_mode, shared_twin, unchanged

__all__ = ["trace_model"]


def trace_model(model: nn.Module, example_inputs: Any) -> list[Trace]:
    """The trace of one run in evaluation mode and, if some parameters took no part in it, of one in training mode.

    A run is on shapes only; where Python asks for values, on real tensors.

    Raises:
        ModelError: the model does not run on these inputs, or is TorchScript.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{path or 'the model'} is TorchScript, whose code cannot follow a cut; prune the model before it is "
                "scripted or traced."
            )
    try:
        trace = _traced(meta_twin(model), example_inputs, Trace())
    except Exception as error:  # noqa: BLE001  (Python may ask shapes for values they do not have; the real run decides)
        trace = _traced_on_values(model, example_inputs, error)
    if all(name in trace.params for name, _ in model.named_parameters()):
        return [trace]
    other = trace.another(training=True)
    try:
        return [trace, _traced(shared_twin(model) if trace.real else meta_twin(model), example_inputs, other)]
    except Exception:  # noqa: BLE001  (a model that cannot train as it is given is pruned for evaluation)
        return [trace]


def _traced_on_values(model: nn.Module, example_inputs: Any, on_shapes: Exception) -> Trace:
    try:
        return _traced(shared_twin(model), example_inputs, Trace(real=True))
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever it is, the user is told)
        raise ModelError(
            f"the model does not run on the example inputs ({_shapes(example_inputs)}): {type(error).__name__}: {error}"
        ) from on_shapes


def _traced(model: nn.Module, inputs: Any, trace: Trace) -> Trace:
    set_mode(model, trace.training)
    names = {id(t): name for name, t in named_tensors(model)}
    placed = place(inputs, device_of(model) if trace.real else "meta")
    with unchanged(model), running(model) as module:
        tracer = Tracer(names, module, trace)
        for path, part in model.named_modules():
            _observe(tracer, path, part)
        with tracer:
            output = call(model, placed)
    trace.copy = model
    outputs = output_tensors(output)
    if not outputs:
        raise ModelError(f"no tensor is found in the model's output, a {type(output).__name__}; return tensors.")
    return tracer.finish(outputs)


def _observe(tracer: Tracer, path: str, module: nn.Module) -> None:
    starts: list[int] = []
    module.register_forward_pre_hook(lambda _m, _i: starts.append(len(tracer.trace.ops)))
    module.register_forward_hook(lambda _m, _i, output: tracer.leave(path, starts.pop(), output))


def _shapes(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return f"tensor {list(inputs.shape)}"
    if hasattr(inputs, "items"):
        return ", ".join(f"{k}: {_shapes(v)}" for k, v in inputs.items())
    if isinstance(inputs, (tuple, list)):
        return ", ".join(_shapes(v) for v in inputs)
    return type(inputs).__name__
