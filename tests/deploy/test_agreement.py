"""Agreement of outputs, the batch axis, and the state in which a model is exported."""

from __future__ import annotations

import pytest
import torch

from secateurs.core.errors import DataError, ProofError
from secateurs.deploy.agreement import agree, batch_shapes, enlarged, exporting
from tests.deploy.exportable import llama


def test_agreement_is_relative_to_the_largest_output() -> None:
    large = torch.tensor([1000.0, 0.0])
    agree([large], [large + 0.09], "it", None)
    with pytest.raises(ProofError, match=r"output 0 of the model and of it differ by up to 0.11, where 0.1 is allowed"):
        agree([large], [large + 0.11], "it", None)
    with pytest.raises(ProofError, match=r"differ by up to 0\.09"):
        agree([large], [large + 0.09], "it", 1e-5)
    agree([torch.zeros(2)], [torch.full((2,), 9e-5)], "it", None)
    agree([torch.zeros(2).half()], [torch.full((2,), 0.01)], "it", None)


def test_infinities_and_nan_agree_with_themselves_only() -> None:
    odd = torch.tensor([float("nan"), float("inf"), 1.0])
    agree([odd], [odd.clone()], "it", None)
    for spoiled in (torch.zeros(3), torch.tensor([float("nan"), float("-inf"), 1.0]), torch.tensor([0.0, odd[1], 1.0])):
        with pytest.raises(ProofError):
            agree([odd], [spoiled], "it", None)


def test_shapes_and_numbers_of_outputs_must_agree() -> None:
    with pytest.raises(ProofError, match=r"returns tensors of the shapes \[\[2\]\], it of \[\[2\], \[2\]\]"):
        agree([torch.zeros(2)], [torch.zeros(2), torch.zeros(2)], "it", None)
    agree([torch.zeros(0, 3)], [torch.zeros(0, 3)], "it", None)


def test_batch_axes_are_those_of_the_first_input_size() -> None:
    inputs = (torch.zeros(2, 5), {"mask": torch.zeros(2), "table": torch.zeros(5), "scale": torch.tensor(1.0)}, 7)
    free = {0: torch.export.Dim.DYNAMIC}
    shapes = batch_shapes(inputs)
    assert shapes[:2] == (free, {"mask": free, "table": {}, "scale": {}})
    larger = enlarged(inputs)
    assert [larger[0].shape, larger[1]["mask"].shape, larger[1]["table"].shape] == [(3, 5), (3,), (5,)]
    with pytest.raises(DataError, match="no tensor with a batch axis"):
        enlarged((torch.tensor(1.0),))


def test_the_model_is_itself_again_after_a_failure() -> None:
    model = llama()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    seen = []

    def fail() -> None:
        with exporting(model):
            seen.extend([model.config.use_cache, *(module.training for module in model.modules())])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any(seen)
    assert [module.training for module in model.modules()] == before
    assert model.config.use_cache is True
    assert any(before)
