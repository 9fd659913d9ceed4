"""What a model is worth on data: accuracy, loss, calibration, perplexity, detection, robustness, agreement.

The scores are functions of tensors; `evaluate`, `perplexity` and the rest feed a model with batches and use them. A
batch is `(inputs, target)` or a dict of keywords with `labels`, as Hugging Face collators make it; data is an
iterable of batches, read once and one batch at a time. Sums are kept in float64. Models run in evaluation mode and
keep their training flags.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.batch import Loss, call, default_loss, device_of, main_output, move, split
from ..core.errors import DataError, ModelError, OptionError
from ._metrics import BINS, Seen, bin_sums, ece_of, hits, metric_called
from ._run import batches, evaluating, forward

__all__ = [
    "Agreement",
    "accuracy",
    "agreement",
    "auroc",
    "ece",
    "evaluate",
    "fgsm",
    "fgsm_accuracy",
    "max_softmax",
    "nll",
    "ood_auroc",
    "perplexity",
]


def accuracy(logits: Tensor, target: Tensor, k: int = 1) -> float:
    """Share of rows whose target is among the k largest logits, in [0, 1]; of equal logits the earlier class leads.

    Args:
        logits: float [rows, classes].
        target: int64 [rows].
        k: how many classes may be named.

    Raises:
        DataError: there is no row.
    """
    _some(target, "accuracy")
    return hits(logits, target, k).double().mean().item()


def nll(logits: Tensor, target: Tensor) -> float:
    """Mean negative log-likelihood in nats of `target` int64 [rows] under softmax of `logits` [rows, classes].

    Raises:
        DataError: there is no row.
    """
    _some(target, "negative log-likelihood")
    return F.cross_entropy(logits.float(), target, reduction="none").cpu().double().mean().item()


def ece(confidence: Tensor, correct: Tensor, bins: int = BINS) -> float:
    """Expected calibration error in [0, 1]: the mean over predictions of |accuracy − mean confidence| of their bin.

    Args:
        confidence: float [predictions] in [0, 1], the probability of the class that was named.
        correct: bool or 0/1 [predictions].
        bins: equal-width bins, each with its upper edge; 15 as in "The Unreasonable Effectiveness of Random Pruning".

    Raises:
        DataError: there is no prediction.
        OptionError: fewer than one bin.
    """
    if bins < 1:
        raise OptionError(f"bins must be at least 1, got {bins}.")
    _some(confidence, "calibration error")
    return ece_of(bin_sums(confidence, correct, bins))


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Chance that a random positive scores above a random negative, a tie counting half: the area under the ROC curve.

    Args:
        positive, negative: scores [n], [m]; higher should mean positive. Compared in float64.

    Raises:
        DataError: a list is empty or has NaN.

    >>> auroc(torch.tensor([0.9, 0.4]), torch.tensor([0.4, 0.1]))
    0.875
    """
    above, below = positive.flatten().cpu().double(), negative.flatten().cpu().double()
    for name, scores in (("positive", above), ("negative", below)):
        if not scores.numel() or scores.isnan().any():
            raise DataError(f"the {name} scores must be at least one number without NaN.")
    ordered = below.sort().values
    beaten = torch.searchsorted(ordered, above) + torch.searchsorted(ordered, above, right=True)
    return (beaten.double().sum() / 2 / above.numel() / below.numel()).item()


def max_softmax(logits: Tensor) -> Tensor:
    """The largest softmax probability of each row: float32 [rows] (Hendrycks & Gimpel 2017, arXiv 1610.02136)."""
    return logits.float().softmax(-1).amax(-1)


def _some(values: Tensor, what: str) -> None:
    if not values.numel():
        raise DataError(f"the {what} of nothing is not defined: give at least one row.")


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    metrics: Sequence[str] = ("accuracy", "nll", "ece"),
    *,
    causal: bool | None = None,
    loss: Loss = default_loss,
) -> dict[str, float]:
    """The metrics by name, from one pass over `data`.

    Args:
        model: run in evaluation mode on its own device, without gradients; its training flags are put back.
        data: iterable of batches. Targets of -100 are left out. Logits may be [rows, classes], [rows, classes, …] as
            in segmentation, or [rows, positions, classes] as in language. Batches of token ids without labels are
            their own labels, less what `attention_mask` hides.
        metrics: "accuracy", "top5" (any number), "nll" (nats), "ece" (15 bins), "perplexity" (weighted by tokens) or
            "loss" (weighted by rows).
        causal: whether labels inside a batch are to be compared with the logits one position earlier, as for causal
            language models. By default so for class names in …ForCausalLM or …LMHeadModel, and with "perplexity".
            A target given as `(inputs, target)` is never shifted.
        loss: function of (output, target) for "loss".

    Raises:
        DataError: no data, no labels, or labels whose shape does not fit the logits.
        ModelError: the forward pass fails or its output has NaN.
        OptionError: an unknown metric.
    """
    chosen = {name: metric_called(name, loss) for name in metrics}
    shift = _is_causal(model, metrics) if causal is None else causal
    sums: dict[str, Tensor] = {}
    for seen in _answers(model, data, shift):
        for name, metric in chosen.items():
            part = metric.gather(seen)
            sums[name] = sums[name] + part if name in sums else part
    return {name: metric.finish(sums[name]) for name, metric in chosen.items()}


def perplexity(model: nn.Module, data: Iterable[Any]) -> float:
    """exp of the mean negative log-likelihood of a token, each token of `data` weighing the same.

    Args:
        model: a causal language model: token ids to logits [rows, positions, vocabulary].
        data: batches of ids [rows, positions]; dicts with `input_ids` and perhaps `attention_mask` and `labels`; or
            pairs (ids, next tokens), which are not shifted again.

    Raises:
        DataError: no data, or not one token to predict.
        ModelError: the forward pass fails or its output has NaN.
    """
    return evaluate(model, data, ("perplexity",))["perplexity"]


def _is_causal(model: nn.Module, metrics: Iterable[str]) -> bool:
    return "perplexity" in metrics or type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _answers(model: nn.Module, data: Iterable[Any], causal: bool) -> Iterator[Seen]:
    device = device_of(model)
    for place, batch in enumerate(batches(data, "evaluation data")):
        inputs, target = split(move(batch, device))
        if target is None and isinstance(inputs, Mapping):
            target = inputs.get("labels")
        # The mode is entered for each batch, so that a consumer that stops early leaves the model as it was.
        with evaluating(model), torch.no_grad():
            output = forward(model, inputs)
        if main_output(output).isnan().any():
            raise ModelError(
                f"the output of {type(model).__name__} has NaN in batch {place}: look for it in the weights or inputs."
            )
        yield Seen(inputs, target, output, causal)


def ood_auroc(model: nn.Module, inside: Iterable[Any], outside: Iterable[Any]) -> float:
    """AUROC of telling data like the training data from other data by the maximum softmax probability.

    Args:
        model: a classifier with logits [rows, classes]; its training flags are put back.
        inside, outside: iterables of batches; targets are not used.

    Raises:
        DataError: one of them is empty.
        ModelError: the forward pass fails.
    """
    return auroc(_confidences(model, inside, "data inside"), _confidences(model, outside, "data outside"))


def _confidences(model: nn.Module, data: Iterable[Any], what: str) -> Tensor:
    with evaluating(model), torch.no_grad():
        return torch.cat([max_softmax(main_output(forward(model, split(b)[0]))).cpu() for b in batches(data, what)])


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Any,
    eps: float = 8 / 255,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    loss: Loss = default_loss,
) -> Tensor:
    """`x + eps·sign(gradient of the loss)`, clipped to `bounds`: a one-step attack (Goodfellow et al. 2015).

    The gradient is taken in pixel space, before normalisation, so that `eps` is in units of pixels.

    Args:
        model: sees (x − mean)/std; in evaluation mode meanwhile. Neither its weights nor their `.grad` change.
        x: pixels [rows, channels, …], not normalised; the result has its shape, dtype and device.
        y: target for `loss`.
        eps: step; 8/255 as in "The Unreasonable Effectiveness of Random Pruning".
        mean, std: per channel, as the model was trained with; none by default.
        bounds: range of valid pixels, None for no clipping.
        loss: function of (output, target); cross-entropy for integer targets.

    Raises:
        OptionError: a negative eps, a std that is not positive.
    """
    if eps < 0:
        raise OptionError(f"eps must not be negative, got {eps}.")
    if std is not None and min(std) <= 0:
        raise OptionError(f"std must be positive in every channel, got {tuple(std)}.")
    device = device_of(model)
    with evaluating(model), torch.enable_grad():
        pixels = x.detach().to(device).clone().requires_grad_()
        output = call(model, _normalised(pixels, mean, std))
        (slope,) = torch.autograd.grad(loss(output, move(y, device)), pixels)
    stepped = pixels.detach() + eps * slope.sign()
    return (stepped if bounds is None else stepped.clamp(*bounds)).to(x.device)


def fgsm_accuracy(
    model: nn.Module,
    data: Iterable[Any],
    eps: float = 8 / 255,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> float:
    """Top-1 accuracy in [0, 1] on the attacked batches of `data`: pairs of pixels and class labels [rows].

    Arguments as in `fgsm`.

    Raises:
        DataError: the data is empty.
        OptionError: a negative eps, a std that is not positive.
    """
    right = rows = 0.0
    for batch in batches(data, "evaluation data"):
        x, y = split(batch)
        attacked = fgsm(model, x, y, eps, mean=mean, std=std, bounds=bounds)
        with evaluating(model), torch.no_grad():
            logits = main_output(forward(model, _normalised(attacked, mean, std)))
        right += accuracy(logits, y.to(logits.device)) * y.numel()
        rows += y.numel()
    return right / rows


def _normalised(x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    if mean is not None:
        x = x - torch.tensor(mean, dtype=x.dtype, device=x.device).view(shape)
    if std is not None:
        x = x / torch.tensor(std, dtype=x.dtype, device=x.device).view(shape)
    return x


@dataclass(frozen=True)
class Agreement:
    """How alike the outputs of two models are on the same inputs.

    Args:
        max_difference: largest absolute difference of two entries.
        cosine: mean over rows of the cosine between the outputs; a row that is zero in both counts 1, in one 0.
        top1: share of positions where the largest entry along the last axis is the same.
        rows: number of rows compared.
    """

    max_difference: float
    cosine: float
    top1: float
    rows: int


def agreement(first: nn.Module, second: nn.Module, data: Iterable[Any]) -> Agreement:
    """The `Agreement` of two models over batches of `data`; targets are not used.

    Args:
        first, second: run in evaluation mode, each on its own device; training flags are put back.
        data: iterable of batches; compared are `.logits`, else the first floating-point output.

    Raises:
        DataError: the data is empty, or the outputs differ in shape.
        ModelError: a forward pass fails.
    """
    largest: list[Tensor] = []
    cosines: list[Tensor] = []
    same: list[Tensor] = []
    with evaluating(first), evaluating(second), torch.no_grad():
        for batch in batches(data, "data"):
            inputs = split(batch)[0]
            a, b = (torch.atleast_1d(main_output(forward(m, inputs)).cpu().double()) for m in (first, second))
            if a.shape != b.shape:
                raise DataError(f"the outputs differ in shape: {tuple(a.shape)} and {tuple(b.shape)}.")
            # Equal infinities (masked logits) do not differ.
            largest.append(torch.where(a == b, 0.0, (a - b).abs()).amax())
            cosines.append(_cosines(a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)))
            same.append((a.argmax(-1) == b.argmax(-1)).flatten())
    every = torch.cat(cosines)
    return Agreement(
        torch.stack(largest).amax().item(), every.mean().item(), torch.cat(same).double().mean().item(), every.numel()
    )


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    na, nb = a.norm(dim=1), b.norm(dim=1)
    both_zero = (na == 0) & (nb == 0)
    cosine = (a * b).sum(1) / (na * nb).clamp(min=torch.finfo(a.dtype).tiny)
    return torch.where(both_zero, 1.0, cosine)
