"""Train, prune, go back, train again: the rounds of the lottery ticket, whatever decides what goes in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .finetune import History
from .rewinding import rewind, snapshot

__all__ = ["Masks", "Round", "training_rounds"]

Masks = Mapping[str, Tensor]
Train = Callable[[Masks, int], History]
Choose = Callable[[Mapping[str, Tensor], Masks, int], Masks | None]


@dataclass(frozen=True)
class Round:
    """What a training in the middle of the rounds has come to.

    Args:
        number: prunings before it, from 0.
        masks: under which it was trained, by parameter name.
        history: of this training.
    """

    number: int
    masks: Masks
    history: History

    @property
    def density(self) -> float:
        """The share of the masked parameters that is left."""
        entries = sum(mask.numel() for mask in self.masks.values())
        return sum(int(mask.sum()) for mask in self.masks.values()) / entries


def training_rounds(
    model: nn.Module, masks: Masks, train: Train, choose: Choose, *, rewinding: bool = True
) -> Iterator[Round]:
    """The rounds one after the other; `model` is after each as its training left it.

    Iterative magnitude pruning (Frankle and Carbin, arXiv 1803.03635): the next round begins with the weights that
    `model` has now, masked. For late rewinding give a model that was trained for some steps.

    Args:
        model: trained in place, with the masks of each round.
        masks: bool masks of the first round, mostly all true.
        train: trains the model under given masks, which it must hold, in the round of given number.
        choose: from the trained weights, their masks and the number of the round to the masks of the next one; None
            ends the rounds, and so does it if nothing goes. What went never comes back.
        rewinding: go back to the first weights and buffers in every round; otherwise training goes on with the pruned
            ones, which with the same learning rates again is learning-rate rewinding (arXiv 2003.02389).

    Raises:
        OptionError: a mask is of no parameter of the model.
    """
    start = snapshot(model)
    rewind(model, start, masks)
    number = 0
    while True:
        yield Round(number, masks, train(masks, number))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        chosen = choose({name: parameters[name].detach() for name in masks}, masks, number)
        if chosen is None or all(torch.equal(chosen[name] & mask, mask) for name, mask in masks.items()):
            return
        masks = {name: chosen[name] & mask for name, mask in masks.items()}
        number += 1
        if rewinding:
            rewind(model, start, masks)
