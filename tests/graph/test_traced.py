"""Traced forwards: they compute what the code computed, at any batch size, and their numbers can be edited."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.shufflenetv2 import InvertedResidual
from torchvision.models.swin_transformer import ShiftedWindowAttention

from secateurs.core.dims import Fixed
from secateurs.core.errors import FileError, ModelError
from secateurs.deploy.store import load_model, save_model
from secateurs.graph.mend import apply_edits, matching_attributes
from secateurs.graph.recorded.traced import Step, TracedForward, traced_forward
from secateurs.graph.run import running
from secateurs.graph.twin import meta_twin

from .nets import check, drawn


class LambdaLayer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def shortcut(planes: int) -> LambdaLayer:
    """The parameter-free shortcut of CIFAR ResNets; its paddings are in a closure."""
    return LambdaLayer(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0))


class Attention(nn.Module):
    """Self-attention whose head size is computed from the width."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.gamma = nn.Parameter(drawn(width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q * 0.5) @ k.transpose(-2, -1)
        scores = F.dropout(scores.softmax(-1), 0.3, self.training)
        return self.gamma * self.proj((scores @ v).transpose(1, 2).reshape(batch, tokens, width))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, groups=2)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        x = self.norm(self.conv(x)).view(b, 2, c // 2, h, w)
        return torch.transpose(x, 1, 2).contiguous().view(b, -1, h, w)


class C2f(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)
        self.inner = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.first(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.inner)
        return self.last(torch.cat(y, 1)).relu_()


class Writes(nn.Module):
    """In-place ops, writing through slices and views, a tuple of values and indices."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.clone()
        y[:, 1:3] = 0.5
        y[..., 0] += 2
        part = y[:, :2]
        part.mul_(3)
        found = y.max(dim=1)
        best, where = torch.topk(y, 2, dim=1)
        return found.values + best[:, 0], found.indices + where.sum(1)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1) if x.shape[1] > 3 else x.sum()


class Keywords(nn.Module):
    def forward(self, x: Tensor, *more: Tensor, scale: float = 2.0, mask: Tensor | None = None, **rest: Any) -> Tensor:
        x = x * scale + rest["shift"]
        x = x + sum(more)
        return x if mask is None else x.masked_fill(mask, 0.0)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclass
class Boxed:
    value: Tensor
    name: str


class Outputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        if self.kind == "dict":
            return {"out": y, "parts": [x, (y, None)], "width": 3}
        if self.kind == "ordered":
            return OrderedDict(out=y, x=x)
        return Pair(y, None) if self.kind == "pair" else Boxed(y, "boxed")


class Masked(nn.Module):
    """Constants on the input's device and in its dtype, and a part without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        with torch.no_grad():
            mask = torch.ones(n, n, device=x.device, dtype=x.dtype).tril()
        return torch.einsum("bij,jk->bik", x * mask.to(x.dtype), mask).float()


def twice(*args: Tensor, **kwargs: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The call, and the same with everything doubled along the batch."""

    def doubled(v: Any) -> Any:
        return torch.cat([v, v]) if isinstance(v, Tensor) else v

    return [(args, kwargs), (tuple(map(doubled, args)), {k: doubled(v) for k, v in kwargs.items()})]


IMAGE = drawn(2, 8, 6, 6)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "lambda": (lambda: shortcut(16), IMAGE),
    "swin": (lambda: ShiftedWindowAttention(12, [4, 4], [0, 0], 3), drawn(2, 8, 8, 12)),
    "swin, shifted": (lambda: ShiftedWindowAttention(12, [4, 4], [2, 2], 3), drawn(2, 8, 8, 12)),
    "swin, padded": (lambda: ShiftedWindowAttention(12, [4, 4], [2, 2], 3), drawn(2, 6, 10, 12)),
    "shuffle": (Shuffle, IMAGE),
    "inverted residual": (lambda: InvertedResidual(8, 8, 1), IMAGE),
    "inverted residual, stride 2": (lambda: InvertedResidual(8, 8, 2), IMAGE),
    "c2f": (C2f, IMAGE),
    "attention": (Attention, drawn(2, 5, 12)),
    "writes": (Writes, IMAGE),
    "branches": (Branches, IMAGE),
    "masked": (Masked, drawn(2, 4, 4)),
    "sequential": (lambda: nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), IMAGE),
}


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in leaves(v)]


def assert_same(traced: nn.Module, original: nn.Module, x: Tensor) -> None:
    for ours, theirs in zip(leaves(traced(x.clone())), leaves(original(x.clone())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor]:
    """A module that was traced, its original, and an input."""
    make, x = CASES[request.param]
    torch.manual_seed(0)
    original = make().eval()
    return traced_forward(copy.deepcopy(original), twice(x)), original, x


def test_computes_the_same_at_any_batch_size(case: tuple[nn.Module, nn.Module, Tensor]) -> None:
    traced, original, x = case
    assert type(traced) is TracedForward
    assert list(traced.state_dict()) == list(original.state_dict())
    assert not traced.training
    for batch in (1, 2, 5):
        assert_same(traced, original, drawn(batch, *x.shape[1:]) * 2)


def test_trains_as_the_original_does(case: tuple[nn.Module, nn.Module, Tensor]) -> None:
    traced, original, x = case
    for module in (traced, original):
        module.train()
        torch.manual_seed(3)
        x = x.detach().requires_grad_()
        sum(t.float().square().sum() for t in leaves(module(x * 1))).backward()
        module.x_grad = x.grad
    torch.testing.assert_close(traced.x_grad, original.x_grad)
    for ours, theirs in zip(traced.state_dict().values(), original.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(traced.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_is_data(case: tuple[nn.Module, nn.Module, Tensor]) -> None:
    traced, original, x = case
    document = json.loads(json.dumps(traced.to_dict()))
    again = TracedForward.from_dict(copy.deepcopy(original), document)
    assert again.to_dict() == traced.to_dict()
    assert_same(again, original, x)
    assert_same(copy.deepcopy(traced), original, x)


def test_is_exported(case: tuple[nn.Module, nn.Module, Tensor]) -> None:
    traced, original, x = case
    assert_same(torch.export.export(traced, (x.clone(),)).module(), original, x)


def test_is_exported_for_any_batch_size() -> None:
    original = ShiftedWindowAttention(12, [4, 4], [2, 2], 3).eval()
    traced = traced_forward(copy.deepcopy(original), twice(drawn(2, 8, 8, 12)))
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(traced, (drawn(3, 8, 8, 12),), dynamic_shapes={"args": (batch,)})
    assert_same(program.module(), original, drawn(5, 8, 8, 12))


def test_is_saved_and_loaded(case: tuple[nn.Module, nn.Module, Tensor], tmp_path: Path) -> None:
    traced, _, x = case
    loaded = load_model(save_model(nn.Sequential(traced), tmp_path / "model"))
    for ours, theirs in zip(leaves(loaded(x.clone())), leaves(traced(x.clone())), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded[0].to_dict() == traced.to_dict()


def test_dropout_passed_through_is_told_from_its_input() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = F.dropout(self.drop(x), 0.5, self.training)
            return x + y

    original = Skips()
    traced = traced_forward(copy.deepcopy(original), twice(drawn(4, 8)))
    for module in (original, traced):
        torch.manual_seed(0)
        module.out = module(drawn(4, 8))
    assert torch.equal(traced.out, original.out)
    assert not torch.equal(original.out, 2 * drawn(4, 8))


def test_constants_that_follow_training() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.4 if self.training else 0.0)
            return F.dropout(y, 0.1, training=True)

    traced = traced_forward(Scaled(), twice(drawn(2, 4, 4)))
    steps = traced.to_dict()["steps"]
    assert steps[0]["arguments"]["kwargs"] == {"dropout_p": {"$training": [0.4, 0.0]}}
    assert steps[1]["arguments"]["kwargs"]["training"] is True


def test_flags_named_training_follow_where_the_code_does_not_run_in_training() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(F.dropout(self.norm(x), 0.5, training=self.training), 0.5, training=True)

    traced = traced_forward(Normed(), [((drawn(1, 8),), {})])
    flags = [step["arguments"]["kwargs"].get("training") for step in traced.to_dict()["steps"]]
    assert flags == [None, {"$training": [True, False]}, True]
    assert (traced.train()(drawn(4, 8)) == 0).any()


def test_dtypes_follow_the_input_where_the_code_does() -> None:
    class Upcast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float32).softmax(-1).to(x.dtype)

    traced = traced_forward(Upcast(), twice(drawn(2, 4)))
    assert traced(drawn(2, 4).double()).dtype == torch.float64
    assert traced(drawn(2, 4).half()).dtype == torch.float16
    assert [s["arguments"]["args"][1] for s in traced.to_dict()["steps"][::2]] == [
        {"$dtype": "float32"},
        {"$dtype": "input"},
    ]


def test_what_is_made_stands_where_the_input_is() -> None:
    class Counted(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return ids + torch.arange(ids.shape[1], device=ids.device)

    traced = traced_forward(Counted(), twice(torch.arange(6).view(2, 3)))
    assert torch.equal(traced(torch.zeros(4, 3, dtype=torch.long)), torch.arange(3).expand(4, 3))
    assert traced(torch.zeros(4, 3, dtype=torch.long, device="meta")).device.type == "meta"


def test_recorded_on_the_meta_device_runs_on_another() -> None:
    original = ShiftedWindowAttention(12, [4, 4], [2, 2], 3).eval()
    x = torch.empty(2, 8, 8, 12, device="meta")
    document = traced_forward(meta_twin(original), twice(x)).to_dict()
    assert_same(TracedForward.from_dict(copy.deepcopy(original), document), original, drawn(3, 8, 8, 12))


def test_keeps_hooks_flags_and_attributes_but_no_local_function() -> None:
    module = Attention().eval()
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    module.proj.register_forward_hook(lambda *_: calls.append(2))
    module.gamma.requires_grad_(False)
    traced_forward(module, twice(drawn(2, 5, 12)))
    calls.clear()
    module(drawn(2, 5, 12))
    assert calls == [2, 1]
    assert (module.heads, module.gamma.requires_grad, module.qkv.weight.requires_grad) == (3, False, True)
    assert "function" not in vars(traced_forward(shortcut(16), twice(IMAGE)))


def test_modules_name_the_step_as_the_caller() -> None:
    traced = traced_forward(Shuffle().eval(), twice(IMAGE))
    seen = []
    with running(traced) as path:
        hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: seen.append(path()))
        traced(IMAGE)
        hook.remove()
    assert seen == ["", "conv", "norm", "step_2_view", "step_3_transpose", "step_4_contiguous", "step_5_view"]


def test_edited_padding_fits_sliced_channels() -> None:
    traced = traced_forward(shortcut(16), twice(IMAGE))
    keys = [f"{n}.{a}" for n, s in traced.named_children() for a in matching_attributes(s, 4)]
    assert keys == ["step_1_pad.numbers[4]", "step_1_pad.numbers[5]"]
    apply_edits(traced, {keys[0]: Fixed(3), keys[1]: Fixed(1)}, {})
    assert torch.equal(traced(IMAGE[:, :5]), F.pad(IMAGE[:, :5, ::2, ::2], (0, 0, 0, 0, 3, 1)))


def test_edited_attention_equals_the_masked_one() -> None:
    original = Attention(12, 3).eval()
    masked = copy.deepcopy(original)
    rows = torch.tensor([i for i in range(36) if i // 4 % 3 != 1])  # the second of three heads goes
    with torch.no_grad():
        masked.proj.weight[:, 4:8] = 0
    traced = traced_forward(original, twice(drawn(2, 5, 12)))
    traced.qkv.weight = nn.Parameter(traced.qkv.weight[rows])
    traced.qkv.bias = nn.Parameter(traced.qkv.bias[rows])
    traced.proj.weight = nn.Parameter(traced.proj.weight[:, [0, 1, 2, 3, 8, 9, 10, 11]])
    steps = dict(traced.named_children())
    assert steps["step_1_reshape"].numbers == (5, 3, 3, 4)
    assert steps["step_11_reshape"].numbers == (5, 12)
    apply_edits(traced, {"step_1_reshape.numbers[2]": Fixed(2), "step_11_reshape.numbers[1]": Fixed(8)}, {})
    assert_same(traced, masked, drawn(3, 5, 12))


class Windows(nn.Module):
    """A residual block round the attention of Swin, which computes head sizes from the width of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 30)
        self.attention = ShiftedWindowAttention(30, [4, 4], [2, 2], 6)
        self.last = nn.Linear(30, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.attention(x)).mean((1, 2))


def test_heads_and_width_of_a_traced_attention_can_be_cut() -> None:
    model = Windows().eval()
    traced_forward(model.attention, twice(model.first(drawn(2, 8, 8, 6)).detach()))
    structure = check(model, drawn(2, 8, 8, 6))
    assert sorted(group.size for group in structure.groups) == [6, 30]


def test_multiples_of_the_batch_can_be_edited() -> None:
    class Folded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            return x.view(b, n, 3, c // 3).transpose(1, 2).reshape(b * 3, n, c // 3).reshape(b // 2, -1)

    traced = traced_forward(Folded(), twice(drawn(2, 5, 12)))
    shapes = [s.numbers for s in traced.steps()]
    assert shapes == [(5, 3, 4), (1, 2), (3, 5, 4), (-1,)]
    for step, numbers in zip(traced.steps(), [(5, 2, 4), (1, 2), (2, 5, 4), (-1,)], strict=True):
        step.numbers = numbers
    assert traced(drawn(4, 5, 8)).shape == (2, 80)


@pytest.mark.parametrize("kind", ["dict", "ordered", "pair", "boxed"])
def test_outputs_keep_their_kind(kind: str) -> None:
    original = Outputs(kind).eval()
    traced = traced_forward(copy.deepcopy(original), twice(drawn(2, 3)))
    traced = TracedForward.from_dict(copy.deepcopy(original), json.loads(json.dumps(traced.to_dict())))
    ours, theirs = traced(drawn(5, 3)), original(drawn(5, 3))
    assert type(ours) is type(theirs)
    if kind == "boxed":
        assert ours.name == theirs.name
        ours, theirs = ours.value, theirs.value
    torch.testing.assert_close(ours, theirs)


def test_calls_are_bound_by_name() -> None:
    x, mask = drawn(2, 4), drawn(2, 4) > 0
    original = Keywords()
    traced = traced_forward(copy.deepcopy(original), twice(x, x + 1, mask=mask, shift=1.5))
    y = drawn(3, 4) * 3
    for kwargs in ({"mask": y < 0, "shift": 1.5}, {"shift": 1.5, "scale": 2.0, "mask": y > 1}):
        assert torch.equal(traced(y, y, **kwargs), original(y, y, **kwargs))


@pytest.mark.parametrize(
    "call",
    [
        ((drawn(2, 4), drawn(2, 4)), {"shift": 1.5}),
        ((drawn(2, 4), drawn(2, 4)), {"shift": 2.5, "mask": drawn(2, 4) > 0}),
        ((drawn(2, 4),), {"shift": 1.5, "mask": drawn(2, 4) > 0}),
        ((drawn(2, 4), drawn(2, 4)), {"shift": 1.5, "mask": drawn(2, 4) > 0, "scale": 3.0}),
    ],
)
def test_calls_of_another_form_are_refused(call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    traced = traced_forward(Keywords(), twice(drawn(2, 4), drawn(2, 4) + 1, mask=drawn(2, 4) > 0, shift=1.5))
    with pytest.raises(ModelError, match="is not as it was when this module was traced"):
        traced(*call[0], **call[1])


def test_one_call_fixes_the_batch() -> None:
    traced = traced_forward(Shuffle().eval(), twice(IMAGE)[:1])
    assert traced(IMAGE).shape == IMAGE.shape
    with pytest.raises(RuntimeError, match="invalid for input"):
        traced(drawn(3, 8, 6, 6))


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Remembers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x * 2
        return self.last


SECRET = drawn(4)


class Uses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + SECRET


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.mul(x, 2)


class GrowsOddly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, x.shape[0] + 1))


class Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row * 2 for row in x])


class Local(nn.Module):
    def forward(self, x: Tensor) -> Any:
        class Out(NamedTuple):
            x: Tensor

        return Out(x + 1)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) if self.training else x


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1.0 / x.shape[0])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Reads(), "reads the value of a tensor"),
        (Remembers(), "sets its attribute 'last'"),
        (Uses(), r"uses a tensor of shape \[4\] that it was not given"),
        (Custom(), "calls aten.mul, which cannot be recorded|calls mul, which cannot be recorded"),
        (GrowsOddly(), "the calls differ in step 0 .torch.nn.functional.pad"),
        (Loops(), "the calls differ in length: they take 4 and 6 steps|the calls differ in step 0"),
        (Local(), "the class .*Local.forward.<locals>.Out' of an output is not known"),
        (Noisy(), "does other things in training"),
        (Counts(), "the calls differ in step 0"),
        (torch.jit.script(nn.ReLU()), "its forward is not that of its class"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "it is parametrized"),
        (nn.LayerNorm(5), "cannot be recorded .RuntimeError"),
    ],
)
def test_what_cannot_be_recorded_is_refused_and_left_alone(module: nn.Module, message: str) -> None:
    before, names = type(module), set(vars(module))
    with pytest.raises(ModelError, match=message):
        traced_forward(module, twice(drawn(2, 4)))
    assert type(module) is before
    assert set(vars(module)) == names


def test_no_call_is_refused() -> None:
    with pytest.raises(ModelError, match="was not called"):
        traced_forward(nn.ReLU(), [])


def tampered(document: dict[str, Any], where: str) -> dict[str, Any]:
    """`document` with one thing in it that no recording wrote."""
    document = json.loads(json.dumps(document))
    step = document["steps"][2]
    changes: dict[str, Callable[[], Any]] = {
        "function": lambda: step.update(function="os.system"),
        "method": lambda: step.update(function="torch.load"),
        "child": lambda: step.update(child="nowhere"),
        "tensor": lambda: step["arguments"]["args"].append({"$tensor": "conv.forward"}),
        "value": lambda: step["arguments"]["args"].append({"$value": "3.0"}),
        "batch": lambda: document.update(batch="0.0"),
        "number": lambda: step["arguments"]["args"].append({"$number": 99}),
        "tag": lambda: step["arguments"]["args"].append({"$code": "1"}),
        "dtype": lambda: step["arguments"]["args"].append({"$dtype": "load"}),
        "numbers": lambda: step.update(numbers=["4"]),
        "record": lambda: document.update(output={"$record": "subprocess:Popen", "fields": {"args": "x"}}),
        "unknown record": lambda: document.update(output={"$record": "antigravity:X", "fields": {}}),
        "field": lambda: document.update(more=1),
        "missing": lambda: document["steps"][0].pop("grad"),
    }
    changes[where]()
    return document


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("function", "'os.system' is no function of torch"),
        ("method", "'torch.load' is no function of torch"),
        ("child", "malformed or belongs to another module"),
        ("tensor", "conv.forward is no tensor"),
        ("value", "no value '3.0'"),
        ("batch", "no value '0.0'"),
        ("number", "unknown form"),
        ("tag", "unknown form"),
        ("dtype", "unknown form"),
        ("numbers", "no integers"),
        ("record", "'subprocess:Popen' is no class of records"),
        ("unknown record", "import 'antigravity' first"),
        ("field", "'more'"),
        ("missing", "'grad'"),
    ],
)
def test_tampered_documents_are_refused(where: str, message: str) -> None:
    document = traced_forward(Shuffle().eval(), twice(IMAGE)).to_dict()
    module = Shuffle()
    with pytest.raises(FileError, match=message):
        TracedForward.from_dict(module, tampered(document, where))
    assert type(module) is Shuffle


def test_a_tampered_saved_model_is_refused(tmp_path: Path) -> None:
    traced = traced_forward(shortcut(16), twice(IMAGE))
    next(c for c in traced.children() if isinstance(c, Step)).function = "os.system"
    save_model(traced, tmp_path / "model")
    with pytest.raises(FileError, match=r"'os\.system' is no function of torch"):
        load_model(tmp_path / "model")


def test_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    traced = traced_forward(Attention().eval(), twice(drawn(2, 5, 12)))
    path = tmp_path / "model.onnx"
    torch.onnx.export(traced, (drawn(2, 5, 12),), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    (out,) = session.run(None, {session.get_inputs()[0].name: drawn(2, 5, 12).numpy()})
    torch.testing.assert_close(torch.from_numpy(out), traced(drawn(2, 5, 12)).detach(), rtol=1e-4, atol=1e-5)
