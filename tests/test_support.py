"""The test suite's own helpers do what they promise."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.torchvision_shim import SCHEMAS, declare_missing_ops


def test_torchvision_models_run() -> None:
    import torchvision

    assert torchvision.models.resnet18().eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_a_declared_operator_has_no_kernel() -> None:
    library = declare_missing_ops()
    if library is None:
        pytest.skip("torchvision brings its own operators here.")
    for schema in SCHEMAS:
        assert hasattr(torch.ops.torchvision, schema.partition("(")[0])
    with pytest.raises(NotImplementedError, match="torchvision::nms"):
        torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


@pytest.mark.parametrize("_again", range(2))
def test_every_test_starts_from_the_same_seed(_again: int) -> None:
    assert torch.rand(()).item() == torch.rand((), generator=torch.Generator().manual_seed(0)).item()


def test_hypothesis_replays_tensors() -> None:
    drawn: dict[int, list[float]] = {}

    @given(st.integers(0, 3))
    def draw(example: int) -> None:
        drawn.setdefault(example, []).append(torch.rand(()).item())

    draw()
    assert len({value for values in drawn.values() for value in values}) == 1


def test_connections_leave_this_machine_never() -> None:
    with socket.socket() as client, pytest.raises(OSError, match="no network"):
        client.connect(("192.0.2.1", 80))


def test_connections_on_this_machine_work() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_shared_data_is_a_folder(shared_data: Path, request: pytest.FixtureRequest) -> None:
    assert shared_data.is_dir()
    assert request.node.get_closest_marker("data")
