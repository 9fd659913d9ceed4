"""The counter of "Rethinking the Value of Network Pruning" against the figures of its own networks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.core.errors import ModelError
from secateurs.measure.macs import paper_flops
from secateurs.measure.params import parameters


class Vgg(nn.Module):
    def __init__(self, widths: Sequence[int | str]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(channels, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.avg_pool2d(self.features(x), 2).flatten(1))


class Block(nn.Module):
    def __init__(self, channels: int, inner: int, width: int) -> None:
        super().__init__()
        self.stride = width // channels
        self.conv1 = nn.Conv2d(channels, inner, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.avg_pool2d(x, 2)
            x = torch.cat([x, torch.zeros_like(x)], 1)
        return self.relu(x + y)


class CifarResNet(nn.Module):
    def __init__(self, inner: Sequence[int]) -> None:
        super().__init__()
        stage = len(inner) // 3
        widths = [16] * stage + [32] * stage + [64] * stage
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        blocks = zip([16, *widths], inner, widths, strict=False)
        self.blocks = nn.Sequential(*(Block(channels, cut, width) for channels, cut, width in blocks))
        self.pool = nn.AvgPool2d(8)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


def kept_widths(depth: int, pruned: Sequence[float], skipped: Sequence[int] = ()) -> list[int]:
    """Widths of the first convolutions of all blocks, by rule P1: the block at place b has convolution 2b + 2."""
    stage = (depth - 2) // 6
    widths = []
    for place in range(3 * stage):
        width = (16, 32, 64)[place // stage]
        share = 0.0 if 2 * place + 2 in skipped else pruned[place // stage]
        widths.append(int(width * (1 - share)))
    return widths


VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
VGG16_A = [32, 64, "M", 128, 128, "M", 256, 256, 256, "M", 256, 256, 256, "M", 256, 256, 256]
RESNET56_B = kept_widths(56, (0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54))
NETS = [
    (lambda: Vgg(VGG16), 14_987_722, 627_880_970),
    (lambda: Vgg(VGG16_A), 5_397_034, 413_364_234),
    (lambda: CifarResNet(kept_widths(56, (0, 0, 0))), 853_018, 252_572_938),
    (lambda: CifarResNet(kept_widths(56, (0.1, 0.1, 0.1), (16, 20, 38, 54))), 773_336, 226_390_090),
    (lambda: CifarResNet(RESNET56_B), 735_712, 183_137_866),
    (lambda: CifarResNet(kept_widths(110, (0, 0, 0))), 1_727_962, 508_925_194),
    (lambda: CifarResNet(kept_widths(110, (0.5, 0, 0), (36,))), 1_688_522, 428_291_338),
    (lambda: CifarResNet(kept_widths(110, (0.5, 0.4, 0.3), (36, 38, 74))), 1_168_424, 312_745_738),
]


@pytest.mark.parametrize(("build", "params", "flops"), NETS)
def test_published_networks(build, params, flops):
    with torch.device("meta"):
        net, image = build(), torch.zeros(1, 3, 32, 32)
    assert parameters(net) == params
    assert paper_flops(net, image) == flops


def test_widths_of_resnet_56_b():
    assert RESNET56_B == [6] * 7 + [16, 16] + [32] + [22] * 6 + [32, 22] + [64] + [57] * 7 + [64]


def test_each_term_by_hand():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),  # output [1, 4, 4, 4]: 2·9·1·4·16 + 64 of the bias
        nn.BatchNorm2d(4),  # 2·64
        nn.ReLU(),  # 64
        nn.MaxPool2d(2),  # 4·16
        nn.AvgPool2d((1, 2)),  # 2·8
        nn.Flatten(),
        nn.Linear(8, 3),  # 2·8·3 + 3
        nn.Sigmoid(),
    )
    assert paper_flops(net, torch.zeros(1, 2, 6, 6)) == (1152 + 64) + 128 + 64 + 64 + 16 + (48 + 3)


def test_a_batch_of_three_counts_three_times():
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU())
    assert paper_flops(net, torch.zeros(3, 4)) == 3 * (2 * 4 * 5 + 5)


def test_skip_zeros_counts_nonzero_weights_only():
    net = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.Flatten(), nn.Linear(8, 1))
    with torch.no_grad():
        net[0].weight.fill_(1)[0].zero_()
        net[2].weight.fill_(1)[0, :5] = 0
    assert paper_flops(net, torch.zeros(1, 1, 3, 3)) == 2 * 8 * 4 + 2 * 8 + 1
    assert paper_flops(net, torch.zeros(1, 1, 3, 3), skip_zeros=True) == 2 * 4 * 4 + 2 * 3 + 1


def test_skip_zeros_needs_values():
    with torch.device("meta"):
        net = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="skip_zeros needs the values of the parameters, but the model is on the meta"):
        paper_flops(net, torch.zeros(1, 2), skip_zeros=True)
