"""Noise in place of data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateurs.core.errors import OptionError
from secateurs.methods.calibration import NOISE, noise


def whole(example: Tensor, kind: str, samples: int = 256, seed: int = 0) -> Tensor:
    return torch.cat([inputs for inputs, _ in noise(example, kind, samples, seed)])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("shape", [(1, 6), (2, 4, 20), (1, 3, 16, 12), (1, 2, 6, 5, 4)])
def test_shape_mean_and_variance(kind: str, shape: tuple[int, ...]) -> None:
    made = whole(torch.zeros(shape), kind, 512)
    assert made.shape == (512, *shape[1:])
    assert abs(float(made.mean())) < 0.15
    assert float(made.std()) == pytest.approx(1, abs=0.05)


def neighbours(x: Tensor) -> float:
    """Correlation of pixels beside each other."""
    return float(torch.corrcoef(torch.stack([x[..., :-1].flatten(), x[..., 1:].flatten()]))[0, 1])


def test_only_smooth_noise_has_neighbours_that_are_alike() -> None:
    example = torch.zeros(1, 3, 32, 32)
    assert neighbours(whole(example, "smooth")) > 0.7
    assert abs(neighbours(whole(example, "uniform"))) < 0.02
    assert abs(neighbours(whole(example, "gaussian"))) < 0.02


def test_amplitudes_fall_as_one_over_the_frequency() -> None:
    spectrum = torch.fft.rfft(whole(torch.zeros(1, 1, 64), "smooth", 4000)).abs().square().mean((0, 1)).sqrt()
    for wave in (1, 2, 4, 8, 16):
        assert float(spectrum[wave] / spectrum[2 * wave]) == pytest.approx(2, rel=0.1)


def test_uniform_noise_ends_at_the_root_of_three() -> None:
    made = whole(torch.zeros(1, 1000), "uniform")
    assert float(made.abs().max()) == pytest.approx(3**0.5, rel=1e-3)


def test_batches_have_all_samples_and_the_seed_decides() -> None:
    example = torch.zeros(1, 2, 4, 4)
    assert [len(inputs) for inputs, target in noise(example, "uniform", 150) if target is None] == [64, 64, 22]
    assert torch.equal(whole(example, "smooth", seed=1), whole(example, "smooth", seed=1))
    assert not torch.equal(whole(example, "smooth", seed=1), whole(example, "smooth", seed=2))
    before = torch.get_rng_state()
    noise(example, "gaussian", 10)
    assert torch.equal(before, torch.get_rng_state())


def test_inputs_of_several_tensors_keep_their_form_and_dtype() -> None:
    ((inputs, _),) = noise({"x": torch.zeros(1, 3, dtype=torch.float64), "y": (torch.zeros(2, 5),)}, "gaussian", 7)
    assert inputs["x"].shape == (7, 3)
    assert inputs["x"].dtype == torch.float64
    assert inputs["y"][0].shape == (7, 5)


def test_a_single_pixel_is_no_wave() -> None:
    assert torch.isfinite(whole(torch.zeros(1, 2, 1, 1), "smooth")).all()


@pytest.mark.parametrize("example", [torch.zeros(1, 4, dtype=torch.long), torch.tensor(1.0)])
def test_inputs_that_noise_cannot_stand_in_for(example: Tensor) -> None:
    with pytest.raises(OptionError, match=r"smooth noise stands in for floating-point inputs.*give data="):
        noise(example, "smooth", 4)
