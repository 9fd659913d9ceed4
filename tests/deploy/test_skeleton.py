"""A module tree comes back whole: attributes, ties, sharing, modes; what cannot be saved is named with its remedy."""

from __future__ import annotations

import copy
import functools
import json
import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from secateurs.core.errors import FileError
from secateurs.deploy.skeleton import decode, encode
from tests.deploy import samples
from tests.deploy.samples import Holder, Net, same


def again(model: nn.Module, trust: tuple[str, ...] = samples.HERE) -> Any:
    skeleton, tensors = encode(model)
    return decode(json.loads(json.dumps(skeleton, allow_nan=False)), tensors.__getitem__, trust=trust)


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def test_a_narrowed_net_comes_back() -> None:
    net = Net(8)
    samples.narrow_linear(net.inner, net.outer, seed=1)
    back = again(net)
    assert same(net, back, X)
    assert repr(back) == repr(net)
    assert back.inner.out_features == len(net.inner.weight) < 8
    assert type(back) is Net


def test_tensors_keep_their_roles() -> None:
    net = Net()
    net.inner.weight.requires_grad_(False)
    back = again(net)
    assert list(back.state_dict()) == list(net.state_dict())
    assert [name for name, _ in back.named_buffers()] == ["scale", "cache"]
    assert back.missing is None
    assert back.absent is None
    assert [p.requires_grad for p in back.parameters()] == [False, True, True, True]


def test_modes_are_kept_module_by_module() -> None:
    net = Net()
    net.inner.eval()
    assert [module.training for module in again(net).modules()] == [True, False, True]


def test_the_model_is_left_as_it_was() -> None:
    net = Net()
    before = copy.deepcopy(net)
    encode(net)
    assert vars(net).keys() == vars(before).keys()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.state_dict().values(), strict=True))


def test_tied_weights_stay_tied() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    net[1].weight = net[0].weight
    back = again(net)
    assert back[1].weight is back[0].weight
    assert list(encode(net)[1]) == ["0.weight"]
    back(torch.tensor([1])).sum().backward()
    assert back[0].weight.grad is back[1].weight.grad is not None


def test_shared_modules_stay_shared() -> None:
    shared = nn.Linear(4, 4)
    back = again(nn.Sequential(shared, nn.ReLU(), shared))
    assert back[0] is back[2] is not back[1]


def test_modules_that_contain_each_other() -> None:
    outer, inner = nn.Module(), nn.Module()
    outer.inner, inner.outer = inner, outer
    back = again(outer)
    assert back.inner.outer is back


def test_one_config_for_all_layers() -> None:
    config = samples.settings(width=3)
    net = nn.Sequential(Holder(config=config, act=F.relu), Holder(config=config, act=F.relu))
    back = again(net)
    assert back[0].config is back[1].config
    assert back[0].config.width == 3


def test_modules_in_attributes() -> None:
    net = Holder(act=nn.functional.relu)
    net.listed = [net.inner, None]
    net.unregistered = (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1)))
    net.parent = weakref.ref(net)
    back = again(net)
    assert back.listed[0] is back.inner
    assert back.parent() is back
    assert [name for name, _ in back.named_parameters()] == ["inner.weight", "inner.bias"]
    assert same(net.unregistered[1], back.unregistered[1], torch.ones(1, 2))
    assert sorted(encode(net)[1])[:4] == [
        f"$hidden.{path}" for path in ("0.bias", "0.weight", "1.0.bias", "1.0.weight")
    ]


def test_tensors_in_attributes() -> None:
    net = Holder(act=F.relu)
    net.constant = {"table": torch.arange(3)}
    net.alias = [net.inner.weight]
    back = again(net)
    assert torch.equal(back.constant["table"], torch.arange(3))
    assert back.alias[0] is back.inner.weight


def test_attributes_of_tensors() -> None:
    net = Net()
    net.inner.weight.no_decay = True
    net.outer.weight.partner = net.inner.weight
    back = again(net)
    assert back.inner.weight.no_decay is True
    assert back.outer.weight.partner is back.inner.weight


@pytest.mark.parametrize(
    "act",
    [F.gelu, torch.relu, functools.partial(F.leaky_relu, negative_slope=0.3), nn.Tanh(), samples.double],
    ids=["gelu", "relu", "partial", "module", "own"],
)
def test_held_functions_are_called_again(act: Any) -> None:
    net = Holder(act=act)
    assert same(net, again(net), X)


def test_methods_are_bound_to_the_new_module() -> None:
    net = Holder()
    net.act = torch.sigmoid
    net.forward = net.shifted
    back = again(net)
    assert same(net, back, X)
    assert back.forward.__self__ is back


def test_recurrent_nets_keep_their_weak_references() -> None:
    net = nn.LSTM(4, 5, num_layers=2, bidirectional=True)
    back = again(net)
    assert same(net, back, X[:, None])
    assert all(
        reference() is weight for reference, weight in zip(back._flat_weight_refs, back._flat_weights, strict=True)
    )
    back.double()(X[:, None].double())


def test_load_hooks_are_hung_again() -> None:
    class_level = HookedNet()
    back = again(class_level)
    renamed = {"old": torch.zeros(2, 2)}
    back.load_state_dict(renamed)
    assert back.new.sum() == 0


class HookedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Parameter(torch.ones(2, 2))
        self._register_load_state_dict_pre_hook(self.rename)

    def rename(self, state: dict[str, Tensor], *_: Any) -> None:
        state["new"] = state.pop("old")


def with_hook(net: Net) -> Net:
    net.inner.register_forward_hook(lambda *_: None)
    return net


def with_mask(net: Net) -> Net:
    prune.l1_unstructured(net.inner, "weight", 0.5)
    return net


def parametrized(net: Net) -> Net:
    parametrizations.orthogonal(net.inner)
    return with_hook(net)


def by_local_code(net: Net) -> Net:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    parametrize.register_parametrization(net.inner, "weight", Half())
    return net


def on_meta(net: Net) -> Net:
    return net.to("meta")


def with_lambda(net: Net) -> Net:
    net.inner.act = lambda x: x
    return net


def with_graph(net: Net) -> Net:
    net.last = net.inner(X)
    return net


def of_local_class(net: Net) -> nn.Module:
    class Local(nn.Module):
        pass

    return nn.Sequential(Local())


def traced(net: Net) -> nn.Module:
    return torch.fx.symbolic_trace(net)


def compiled(net: Net) -> nn.Module:
    return torch.compile(net)


def scripted(net: Net) -> nn.Module:
    return torch.jit.script(nn.ReLU())


OBSTACLES = [
    (with_hook, "inner (Linear): it has a forward hook (with_hook.<locals>.<lambda>); remove it"),
    (with_mask, "inner (Linear): it has a forward pre hook (L1Unstructured); remove it"),
    (parametrized, "inner (ParametrizedLinear): it has a forward hook (with_hook.<locals>.<lambda>); remove it"),
    (by_local_code, "inner.parametrizations.weight.0 (Half): tests.deploy.test_skeleton.by_local_code.<locals>.Half"),
    (on_meta, "inner (Linear), tensor 'weight': it is on the meta device and has no data; load the weights first"),
    (
        with_lambda,
        "inner (Linear), attribute 'act': tests.deploy.test_skeleton.with_lambda.<locals>.<lambda> cannot be",
    ),
    (with_graph, "the model itself (Net), attribute 'last': it is part of an autograd graph; detach() it"),
    (
        of_local_class,
        "0 (Local): tests.deploy.test_skeleton.of_local_class.<locals>.Local cannot be imported by its name",
    ),
    (traced, "it is a traced graph, whose code has no name; use export_program"),
    (compiled, "it is a compiled model; save its ._orig_mod"),
    (scripted, "it is a TorchScript module; save the model that it was made from"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("spoil", "message"), OBSTACLES, ids=[case[0].__name__ for case in OBSTACLES])
def test_what_cannot_be_saved_is_named(spoil: Any, message: str) -> None:
    with pytest.raises(FileError, match=re.escape(message)):
        encode(spoil(Net()))


def test_all_faults_are_reported_at_once() -> None:
    net = nn.Sequential(*(Holder(act=lambda x: x) for _ in range(10)))
    with pytest.raises(FileError) as caught:
        encode(net)
    text = str(caught.value)
    assert [f"{index} (Holder), attribute 'act'" in text for index in range(10)] == [True] * 8 + [False] * 2
    assert text.endswith("; and 2 more.")


def test_what_stays_behind_a_removed_weight_norm_is_left_out() -> None:
    net = Net()
    parametrizations.weight_norm(net.inner)
    parametrize.remove_parametrizations(net.inner, "weight")
    assert same(net, again(net), X)
    assert not again(net).inner._load_state_dict_pre_hooks


def test_masks_save_once_removed() -> None:
    net = with_mask(Net())
    prune.remove(net.inner, "weight")
    back = again(net)
    assert same(net, back, X)
    assert int((back.inner.weight == 0).sum()) == 16


def test_untrusted_code_is_listed() -> None:
    with pytest.raises(FileError) as caught:
        again(nn.Sequential(Net(), Holder(act=samples.double)), trust=())
    assert "tests.deploy.samples:Net" in str(caught.value)
    assert "tests.deploy.samples:double" in str(caught.value)
    assert str(caught.value).endswith("pass trust=('tests',)")


def spoiled(path: str, value: Any) -> Any:
    """The skeleton of a net, JSON, with one place changed."""
    skeleton, tensors = encode(nn.Sequential(nn.Linear(2, 2)))
    place = skeleton
    *way, last = path.split("/")
    for step in way:
        place = place[step]
    place[last] = value
    return skeleton, tensors


LINEAR = "modules//children/0"
MALFORMED = [
    ("surprise", 1, "unknown field 'surprise'"),
    (f"{LINEAR}/surprise", 1, "unknown field 'surprise'"),
    (f"{LINEAR}/class", "torch.nn.modules.conv:Conv2d", "used but not declared under 'uses'"),
    (f"{LINEAR}/parameters/weight", "elsewhere", "there is no tensor 'elsewhere'"),
    (f"{LINEAR}", {"shared": "nowhere"}, "there is no module 'nowhere'"),
    (f"{LINEAR}/attributes/in_features", {"$function": "os:system"}, "used but not declared"),
    ("modules", {}, "there is no module ''"),
    ("uses", ["posix:system"], "outside the packages that are allowed by default"),
]


@pytest.mark.parametrize(("path", "value", "message"), MALFORMED)
def test_malformed_skeletons_are_refused(path: str, value: Any, message: str) -> None:
    skeleton, tensors = spoiled(path, value)
    with pytest.raises(FileError, match=message):
        decode(skeleton, tensors.__getitem__)


def test_declared_acting_functions_are_refused() -> None:
    skeleton, tensors = spoiled("uses", ["torch.nn.modules.container:Sequential", "torch.nn.modules.linear:Linear"])
    skeleton["uses"].append("torch.hub:load")
    skeleton["modules"][""]["children"]["0"]["attributes"]["forward"] = {
        "$partial": {"$function": "torch.hub:load"},
        "args": ["someone/something", "entry"],
        "keywords": {},
    }
    with pytest.raises(FileError, match=r"'torch\.hub:load' is not among the classes and functions"):
        decode(skeleton, tensors.__getitem__)
