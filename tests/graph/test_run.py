"""How a model is run to be traced, and what is seen of what it returns."""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from secateurs.graph.infer import infer
from secateurs.graph.run import output_tensors

sequences = torch.randn(2, 5, 6)


class Recurrent(nn.Module):
    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.cell, self.out, self.packed = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3), packed

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            whole = pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
            return self.out(pad_packed_sequence(self.cell(whole)[0], batch_first=True)[0].sum(1))
        # Without a device, so that the run on shapes fails, as in much code of users.
        state = torch.zeros(1, len(x), 8)
        return self.out(self.cell(x, (state, state))[0][:, -1])


def test_an_lstm_on_real_tensors_is_the_ops_that_it_is_made_of() -> None:
    for packed in (False, True):
        structure = infer(Recurrent(packed), sequences)
        assert {group.name: group.size for group in structure.groups} == {"cell": 8}
    assert torch.backends.mkldnn.enabled
    assert torch.backends.cudnn.enabled


def test_outputs_in_records_with_slots_are_seen() -> None:
    record = make_dataclass("Record", ["logits", "more"], slots=True)
    assert [len(t) for t in output_tensors(record(torch.ones(1), record(torch.ones(2), None)))] == [1, 2]


class Pair(NamedTuple):
    x: Tensor
    shift: Tensor


def test_a_named_tuple_reaches_the_model_as_one() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, pair: Pair) -> Tensor:
            return self.down(F.relu(self.up(pair.x))) + pair.shift

    assert infer(Reads(), (Pair(torch.ones(2, 6), torch.ones(3)),)).groups[0].name == "up"
