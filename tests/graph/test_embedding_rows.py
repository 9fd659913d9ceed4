"""Rows of embeddings: what is looked up in a table goes with its id, and the ids that stay get new numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs as sec
from secateurs.core.batch import call
from secateurs.core.errors import DataError, ModelError, OptionError, PlanError
from secateurs.graph.cut import cut
from secateurs.graph.infer import infer
from secateurs.graph.run import output_tensors
from secateurs.graph.structure import Structure

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
ROWS = 40
IDS = torch.tensor([[7, 11, 30, 7], [12, 30, 11, 39]])


class Table(nn.Module):
    """A table, of whose ids `way` makes something."""

    def __init__(self, way: Callable[[Table, Tensor], Tensor], padding_idx: int | None = None) -> None:
        super().__init__()
        self.pad_id, self.other = 3, 9
        self.table = nn.Embedding(ROWS, 6, padding_idx)
        self.places = nn.Embedding(8, 6)
        self.out = nn.Linear(6, 5)
        self.way = way

    def forward(self, ids: Tensor) -> Tensor:
        return self.way(self, ids)


def plain(net: Table, ids: Tensor) -> Tensor:
    return net.out(net.table(ids).mean(1))


def by_attribute(net: Table, ids: Tensor) -> Tensor:
    seen = (ids != net.pad_id)[..., None]
    return net.out((net.table(ids) * seen).sum(1))


def by_number(net: Table, ids: Tensor) -> Tensor:
    return net.out((net.table(ids) * (ids != 3)[..., None]).sum(1))


def by_other_use(net: Table, ids: Tensor) -> Tensor:
    return net.out((net.table(ids) * net.pad_id).sum(1))


def by_order(net: Table, ids: Tensor) -> Tensor:
    last = net.table(ids)[torch.arange(len(ids)), ids.argmax(-1)]
    return net.out(last + net.table(ids.sort(-1)[0]).sum(1) * (ids[:, :1] < ids[:, 1:2]))


def filled_in(net: Table, ids: Tensor) -> Tensor:
    shifted = ids.new_zeros(ids.shape)
    shifted[:, 1:] = ids[:, :-1].clone()
    shifted[:, 0] = net.pad_id
    shifted.masked_fill_(shifted == -100, net.pad_id)
    return net.out(net.table(F.pad(shifted, (0, 1), value=net.pad_id)).sum(1))


def with_places(net: Table, ids: Tensor) -> Tensor:
    return net.out((net.table(ids) + net.places(torch.arange(ids.shape[1]))).sum(1))


def shifted_on(net: Table, ids: Tensor) -> Tensor:
    return net.out(net.table(ids // 2).sum(1))


def both(net: Table, ids: Tensor) -> Tensor:
    return plain(net, ids) + net.places(ids % 8).sum((1, 2))[:, None]


def other_sizes(net: Table, ids: Tensor) -> Tensor:
    return net.out((net.table(ids) + net.places(ids.clamp(max=7))).sum(1))


def compared_with_others(net: Table, ids: Tensor) -> Tensor:
    return net.out((net.table(ids) * (ids == torch.arange(ids.shape[1]) + ids[:, :1] // 2)[..., None]).sum(1))


def compared_with_positions(net: Table, ids: Tensor) -> Tensor:
    seen = ids == (ids != net.pad_id).cumsum(1)
    return net.out((net.table(ids) * seen[..., None]).sum(1))


def among_positions(net: Table, ids: Tensor) -> Tensor:
    mixed = torch.arange(ids.numel()).view(ids.shape)
    mixed[:, 1:] = ids[:, 1:]
    return net.out(net.table(mixed).sum(1))


def in_training(net: Table, ids: Tensor) -> Tensor:
    return plain(net, ids + 1 if net.training else ids)


def prepended(net: Table, ids: Tensor) -> Tensor:
    return net.out(net.table(torch.cat([torch.full((len(ids), 1), net.pad_id), ids], 1)).sum(1))


def among_special(net: Table, ids: Tensor) -> Tensor:
    special = torch.isin(ids, torch.tensor([net.pad_id, net.pad_id + 5]))
    return net.out((net.table(ids) * ~special[..., None]).sum(1))


def in_two_tables(net: Table, ids: Tensor) -> Tensor:
    return plain(net, ids) + F.embedding(ids, net.out.weight.new_ones(8, 3)).sum()


def told(net: Table, ids: Tensor) -> Any:
    return plain(net, ids), ids


def net(way: Callable[[Table, Tensor], Any], **options: Any) -> Table:
    torch.manual_seed(0)
    return Table(way, **options).eval()


def rows_of(model: nn.Module, inputs: Any) -> Structure:
    return infer(model, inputs, kinds=["embedding"], entangled=True)


def pruned(model: nn.Module, inputs: Any, budget: str = "sparsity=50%", **options: Any) -> sec.Pruned:
    return sec.prune(model, inputs, budget, granularity="embedding", measure=False, **options)


def other_inputs(plan: sec.Plan, inputs: Any, seed: int = 0) -> Any:
    """Inputs of the same form, with any ids that the plan keeps."""
    generator = torch.Generator().manual_seed(seed)
    kept = plan.structure.kept_ids(plan.keep)

    def drawn(name: str, tensor: Tensor) -> Tensor:
        if name not in kept:
            return tensor
        return kept[name][torch.randint(len(kept[name]), tensor.shape, generator=generator)]

    if isinstance(inputs, Tensor):
        return drawn("0", inputs)
    return {name: drawn(name, tensor) for name, tensor in inputs.items()}


def agree(model: nn.Module, made: sec.Pruned, inputs: Any) -> None:
    """On ids that stay the smaller model says of them what the model does, to rounding."""
    kept = made.plan.structure.kept_outputs(made.plan.keep)
    with torch.no_grad():
        wanted = output_tensors(call(model, inputs))
        found = output_tensors(call(made.model, made.plan.recode(inputs)))
    for number, (a, b) in enumerate(zip(wanted, found, strict=True)):
        for axis, stays in enumerate(kept.get(number, ())):
            a = a.index_select(axis, stays.nonzero().flatten())
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# -- tables of any module ----------------------------------------------------------------------------------------------


UNDERSTOOD = [plain, by_attribute, by_number, by_order, filled_in, prepended, among_special, with_places]


@pytest.mark.parametrize("way", UNDERSTOOD)
def test_rows_go_and_what_is_left_is_the_same(way: Callable[[Table, Tensor], Tensor]) -> None:
    model = net(way)
    made = pruned(model, IDS)
    assert made.model.table.weight.shape == (ROWS // 2, 6)
    assert made.model.table.num_embeddings == ROWS // 2
    assert torch.equal(made.model.table.weight, model.table.weight[made.plan.kept_ids()])
    for seed in range(5):
        agree(model, made, other_inputs(made.plan, IDS, seed))


def test_the_model_is_untouched() -> None:
    model = net(by_attribute)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    pruned(model, IDS)
    assert model.pad_id == 3
    assert model.table.num_embeddings == ROWS
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_ids_in_the_example_inputs_stay() -> None:
    made = pruned(net(plain), IDS, "sparsity=85%")
    assert made.plan.kept_ids().tolist() == [3, 7, 11, 12, 30, 39]
    assert made.plan.groups[0].stays == (3, 7, 11, 12, 30, 39)
    with pytest.raises(sec.SecateursError, match="Nearest feasible"):
        pruned(net(plain), IDS, "sparsity=95%")


def test_the_number_of_an_attribute_follows() -> None:
    made = pruned(net(by_attribute, padding_idx=20), IDS)
    kept = made.plan.kept_ids()
    assert made.plan.groups[0].stays == (3, 7, 11, 12, 20, 30, 39)
    assert kept[made.model.pad_id] == 3
    assert kept[made.model.table.padding_idx] == 20
    assert made.model.other == 9


@pytest.mark.parametrize("way", [by_number, by_other_use, among_special])
def test_a_number_in_the_code_keeps_its_meaning(way: Callable[[Table, Tensor], Tensor]) -> None:
    """As does that of an attribute with which more than ids is computed, or from which another is."""
    made = pruned(net(way), IDS)
    assert set(range(9 if way is among_special else 4)) <= set(made.plan.groups[0].stays)
    assert made.model.pad_id == 3


def test_zeros_below_ids_keep_their_meaning() -> None:
    assert 0 in rows_of(net(filled_in), IDS).groups[0].stays


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (shifted_on, "looked up by number: embedding in table"),
        (both, "input 0 keeps its ids: its ids are computed with: remainder in the model"),
        (other_sizes, "input 0 keeps its ids: its ids are computed with: clamp in the model"),
        (compared_with_others, "input 0 keeps its ids: its ids are computed with: floor_divide in the model"),
        (compared_with_positions, "input 0 keeps its ids: its ids meet other numbers: eq in the model"),
        (among_positions, "looked up by number: embedding in table"),
        (in_training, "input 0 keeps its ids: its ids are computed with: add in the model"),
        (in_two_tables, "input 0 keeps its ids: it is looked up in tables of different sizes"),
        (told, "the model's output has positions along it"),
    ],
)
def test_what_is_not_understood_stays(way: Callable[[Table, Tensor], Any], why: str) -> None:
    few = IDS % 8 if way is in_two_tables else IDS
    structure = rows_of(net(way), few)
    assert structure.groups == ()
    assert any(f.tensor == "table.weight" and f.axis == 0 and why in f.reason for f in structure.frozen), [
        f.reason for f in structure.frozen
    ]
    with pytest.raises(ModelError, match="nothing to prune"):
        pruned(net(way), few)


def test_positions_are_no_vocabulary() -> None:
    frozen = {(f.tensor, f.axis): f.reason for f in rows_of(net(with_places), IDS).frozen}
    assert frozen["places.weight", 0] == "looked up by number: embedding in places"

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(ROWS, 4), nn.Embedding(8, 4)

        def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.a(ids) + self.b(position_ids)

    structure = rows_of(Told(), {"ids": IDS, "position_ids": torch.arange(4).expand(2, 4)})
    assert [g.name for g in structure.groups] == ["a"]
    assert any("its numbers are positions" in f.reason for f in structure.frozen)


def test_without_being_asked_for_no_row_goes() -> None:
    structure = infer(net(plain), IDS, entangled=True)
    assert [g.kind for g in structure.groups] == ["channel"]
    assert any(f.tensor == "table.weight" and f.axis == 0 for f in structure.frozen)


class Recommender(nn.Module):
    """Bags of items beside columns of categories, each with a table of its own, and one table that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(ROWS, 6, mode="mean", padding_idx=2)
        self.biases = nn.EmbeddingBag(ROWS, 1, mode="sum")
        self.days, self.towns = nn.Embedding(7, 6), nn.Embedding(20, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, dense: Tensor, items: Tensor, offsets: Tensor, cats: Tensor) -> Tensor:
        found = self.items(items, offsets) + self.days(cats[:, 0]) + self.towns(cats[:, 2])
        return self.out(found + dense) + self.biases(items, offsets)


def recommender() -> tuple[Recommender, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    cats = torch.tensor([[1, 99, 4], [1, 99, 19], [5, 99, 4]])
    return Recommender().eval(), (torch.randn(3, 6), torch.tensor([4, 8, 2, 15, 4]), torch.tensor([0, 2, 3]), cats)


def test_bags_and_columns() -> None:
    model, inputs = recommender()
    structure = rows_of(model, inputs)
    assert {g.name: (g.inputs, g.stays) for g in structure.groups} == {
        "items": (("1", "items"), (2, 4, 8, 15)),
        "days": (("3[0]", "cats[0]"), (1, 5)),
        "towns": (("3[2]", "cats[2]"), (4, 19)),
    }
    made = pruned(model, inputs, "params<=60%")
    assert made.model.items.weight.shape[0] == made.model.biases.weight.shape[0] < ROWS
    assert made.plan.kept_ids("items")[made.model.items.padding_idx] == 2
    assert made.plan.recode(inputs)[3][:, 1].tolist() == [99, 99, 99]
    torch.testing.assert_close(made.model(*made.plan.recode(inputs)), model(*inputs))
    with pytest.raises(OptionError, match="the name of one of the groups of ids: items, days, towns"):
        made.plan.kept_ids()


def test_a_whole_lookup_beside_one_of_a_column() -> None:
    def way(net: Table, ids: Tensor) -> Tensor:
        return net.out(net.table(ids[:, -1]) + net.table(ids).sum(1))

    model = net(way)
    made = pruned(model, IDS)
    assert made.plan.groups[0].inputs == ("0", "ids")
    agree(model, made, other_inputs(made.plan, IDS))


@settings(max_examples=15, deadline=None)
@given(st.integers(6, 39))
def test_as_many_rows_stay_as_the_budget_says(count: int) -> None:
    model = net(plain)
    made = sec.plan(model, IDS, f"sparsity={100 - 100 * count / ROWS}%", granularity="embedding")
    assert made.counts == {"table": count}
    assert set(IDS.flatten().tolist()) <= set(made.kept_ids().tolist())


def test_bytes_and_macs() -> None:
    model, ids = tiny("llama untied")
    made = sec.plan(model, ids, "bytes<=80%", granularity="embedding")
    assert made.cost("bytes") <= 0.8
    assert made.cost("macs") < 1


def test_a_plan_that_lets_a_special_id_go_is_refused() -> None:
    structure = rows_of(net(by_attribute), IDS)
    keep = {"table": torch.arange(ROWS) != 3}
    with pytest.raises(PlanError, match="id 3 is that of pad_id"):
        cut(net(by_attribute), structure, keep)


# -- data and its ids --------------------------------------------------------------------------------------------------


def test_how_often_an_id_occurs_decides() -> None:
    data = [(torch.tensor([[1, 1, 2, 5]]), torch.tensor([0])), (torch.tensor([[1, 2, 7, 7]]), torch.tensor([1]))]
    made = sec.plan(net(plain), IDS, "sparsity=80%", granularity="embedding", data=data)
    assert made.recipe.criterion == "token-frequency"
    # Five of the example inputs, that of `pad_id`, and the most frequent two; 5 and the others come after.
    assert made.kept_ids().tolist() == [1, 2, 3, 7, 11, 12, 30, 39]
    assert sec.plan(net(plain), IDS, "sparsity=80%", granularity="embedding").recipe.criterion == "magnitude"
    with pytest.raises(OptionError, match="'token-frequency' scores embedding groups"):
        sec.plan(net(plain), IDS, "sparsity=50%", criterion="token-frequency", data=data)


def test_data_without_ids_or_with_wrong_ones_is_refused() -> None:
    asked = {"granularity": "embedding", "criterion": "token-frequency"}
    with pytest.raises(DataError, match="holds no ids of table: they are looked for at 0, ids"):
        sec.plan(net(plain), IDS, "sparsity=50%", data=[{"words": IDS}], **asked)
    with pytest.raises(DataError, match="id 40 in the data is beyond the 40 rows"):
        sec.plan(net(plain), IDS, "sparsity=50%", data=[{"ids": IDS + 1}], **asked)


def test_a_removed_id_is_refused_unless_another_stands_for_it() -> None:
    made = pruned(net(plain), IDS)
    gone = int((~made.plan.keep["table"]).nonzero()[0])
    asked = torch.tensor([[gone, 7]])
    with pytest.raises(DataError, match=f"id {gone} was removed"):
        made.plan.recode(asked)
    kept = made.plan.kept_ids()
    assert kept[made.plan.recode(asked, unknown=30)].tolist() == [[30, 7]]
    standing = pruned(net(plain), IDS, unknown=17, keep_ids=[1, 2])
    assert {1, 2, 17} <= set(standing.plan.kept_ids().tolist())
    gone = int((~standing.plan.keep["table"]).nonzero()[0])
    assert standing.plan.kept_ids()[standing.plan.recode(torch.tensor([gone]))].tolist() == [17]


def test_data_of_a_run_is_renumbered() -> None:
    torch.manual_seed(1)
    batches = [(torch.randint(25, (8, 4)), torch.randint(5, (8,))) for _ in range(4)]
    recover = sec.FineTune(epochs=1, lr=0.1, data=lambda number: batches[number:])
    made = pruned(
        net(plain), IDS, "sparsity=25%", data=batches, test=batches[:2], recover=recover, unknown=7,
        sensitivities=[0.5], budgets=["sparsity=50%"],
    )  # fmt: skip
    assert set(made.report.stages) == {"one-shot", "recovered"}
    assert len(made.report.front) == 1
    with pytest.raises(OptionError, match="distill=True needs a teacher with the same ids"):
        pruned(net(plain), IDS, data=batches, recover=sec.FineTune(epochs=1, distill=True))


def test_times_are_taken_of_both() -> None:
    model = net(plain)
    made = sec.prune(model, IDS, "latency<=1000ms,sparsity=50%", granularity="embedding")
    assert made.report.speedup is not None
    looked = sec.inspect(model, IDS, granularity="embedding", timed=True, seconds=0.01)
    assert [(g.kind, g.size) for g in looked.groups] == [("embedding", ROWS)]


# -- language models ---------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": ROWS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2}
T5 = {"vocab_size": ROWS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


def _llama(tied: bool) -> nn.Module:
    special = {"pad_token_id": 5, "bos_token_id": 1, "eos_token_id": [2, 9]}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **special, tie_word_embeddings=tied))


def _gpt2(kind: Any = None) -> nn.Module:
    kind = kind or transformers.GPT2LMHeadModel
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 38)
    return kind(transformers.GPT2Config(vocab_size=ROWS, n_embd=16, n_layer=1, n_head=2, n_positions=32, **special))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "llama untied": (lambda: _llama(False), {"input_ids": IDS}),
    "llama tied": (lambda: _llama(True), {"input_ids": IDS}),
    "llama with labels": (lambda: _llama(False), {"input_ids": IDS, "labels": IDS.clone()}),
    "gpt2": (_gpt2, {"input_ids": IDS}),
    "gpt2 classifier": (lambda: _gpt2(transformers.GPT2ForSequenceClassification), {"input_ids": IDS}),
    "bert": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
        {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS), "labels": IDS.clone()},
    ),
    "roberta": (
        lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL, max_position_embeddings=20)),
        {"input_ids": IDS},
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0)),
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :3].contiguous()},
    ),
    "t5 with labels": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0)),
        {"input_ids": IDS, "labels": IDS[:, :3].contiguous()},
    ),
}


def tiny(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, inputs


@pytest.mark.parametrize("name", MODELS)
def test_language_models(name: str) -> None:
    model, inputs = tiny(name)
    made = pruned(model, inputs)
    assert list(made.plan.counts.values()) == [ROWS // 2]
    assert made.report.proof is not None
    assert made.report.proof < 1e-5
    assert made.model.config.vocab_size == made.model.get_input_embeddings().num_embeddings == ROWS // 2
    if "labels" not in inputs:
        agree(model, made, other_inputs(made.plan, inputs))
    head = made.model.get_output_embeddings() if name != "gpt2 classifier" else None
    if head is not None:
        tied = name.partition(" ")[2] not in ("untied", "with labels") or name.startswith("t5")
        assert head.weight.shape[0] == ROWS // 2
        assert (head.weight is made.model.get_input_embeddings().weight) == tied


def test_the_loss_is_over_what_is_left() -> None:
    """As if the model had never known the others: their logits are minus infinity."""
    model, inputs = tiny("llama with labels")
    made = pruned(model, inputs)
    kept = made.plan.kept_ids()
    logits = model(input_ids=IDS).logits[:, :-1, kept]
    wanted = F.cross_entropy(logits.flatten(0, 1), made.plan.recode(IDS_AS_LABELS)["labels"][:, 1:].flatten())
    torch.testing.assert_close(made.model(**made.plan.recode(inputs)).loss, wanted)


IDS_AS_LABELS = {"labels": IDS}


def test_special_ids_stay_and_follow() -> None:
    model, inputs = tiny("llama untied")
    model.generation_config.suppress_tokens = [7, 20, 21, 22, 23]
    model.generation_config.bad_words_ids = [[7, 11], [7, 20, 21, 22, 23]]
    made = pruned(model, inputs, "sparsity=75%")
    kept = made.plan.kept_ids().tolist()
    assert set(kept) > {1, 2, 5, 7, 9, 11, 12, 30, 39}
    for config in (made.model.config, made.model.generation_config):
        found = [config.pad_token_id, config.bos_token_id, *config.eos_token_id]
        assert [kept[i] for i in found] == [5, 1, 2, 9]
    assert kept[made.model.model.embed_tokens.padding_idx] == 5
    assert made.model.generation_config.suppress_tokens == [kept.index(i) for i in (7, 20, 21, 22, 23) if i in kept]
    assert made.model.generation_config.bad_words_ids == [[kept.index(7), kept.index(11)]]
    assert (model.config.pad_token_id, model.generation_config.eos_token_id) == (5, [2, 9])


class OnlyKept(transformers.LogitsProcessor):
    """The original, kept from saying what was removed."""

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_copy(1, self.kept, scores[:, self.kept])


@pytest.mark.parametrize("name", ["llama untied", "llama tied", "gpt2", "t5"])
def test_generated_tokens_are_the_same(name: str) -> None:
    model, inputs = tiny(name)
    made = pruned(model, inputs)
    kept = made.plan.kept_ids()
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1}
    asked = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    wanted = model.generate(**asked, **options, logits_processor=[OnlyKept(kept)])
    assert torch.equal(kept[made.model.generate(**made.plan.recode(asked), **options)], wanted)


def test_several_vocabularies_have_their_own_ids() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Embedding(30, 4), nn.Embedding(ROWS, 4)
            self.shared = nn.Embedding(ROWS, 4)

        def forward(self, first: Tensor, second: list[Tensor]) -> Tensor:
            return self.one(first) + self.two(second[0]) * self.shared(second[0]) + self.shared(second[1])

    groups = rows_of(Towers(), (IDS % 30, [IDS, IDS.flip(0)])).groups
    assert [(g.name, g.inputs) for g in groups] == [
        ("one", ("0", "first")),
        ("two", ("1.0", "second.0", "1.1", "second.1")),
    ]
    assert {m.tensor for m in groups[1].members} == {"two.weight", "shared.weight"}


def test_an_output_layer_that_nothing_ties_stays() -> None:
    def way(net: Table, ids: Tensor) -> Tensor:
        return net.table(ids) @ net.head.T

    model = net(way)
    model.head = nn.Parameter(torch.randn(ROWS, 6))
    made = pruned(model, IDS)
    assert made.model(made.plan.recode(IDS)).shape == (2, 4, ROWS)
    torch.testing.assert_close(made.model(made.plan.recode(IDS)), model(IDS))


# -- folders -----------------------------------------------------------------------------------------------------------

OPEN = """
from tests.support.torchvision_shim import declare_missing_ops
declare_missing_ops()
import sys, torch, secateurs as sec
back = sec.load(sys.argv[1])
ids = torch.tensor([[7, 11, 30, 7], [12, 30, 11, 39]])
with torch.no_grad():
    logits = back.model(**back.plan.recode({"input_ids": ids})).logits
torch.save({"logits": logits, "kept": back.plan.kept_ids()}, sys.argv[2])
"""


@pytest.mark.parametrize("name", ["llama tied"])
def test_a_saved_folder_knows_the_ids(name: str, tmp_path: Path) -> None:
    model, inputs = tiny(name)
    made = pruned(model, {k: v for k, v in inputs.items() if k != "labels"}, keep_ids=[4], unknown=7)
    made.save(tmp_path / "saved")
    given_names = [str(tmp_path / "saved"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", OPEN, *given_names], check=True, cwd=ROOT)
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(out["kept"], made.plan.kept_ids())
    with torch.no_grad():
        assert torch.equal(out["logits"], made.model(**made.plan.recode({"input_ids": IDS})).logits)
    back = sec.load(tmp_path / "saved").plan
    assert back.recipe == made.plan.recipe
    assert back.groups == made.plan.groups
    assert back.structure.numbers == made.plan.structure.numbers
    assert torch.equal(back.cut(model).get_input_embeddings().weight, made.model.get_input_embeddings().weight)


@pytest.mark.parametrize("name", ["llama untied", "gpt2", "bert", "t5"])
def test_transformers_loads_what_is_left(name: str, tmp_path: Path) -> None:
    from secateurs.integrations.pretrained import export_pretrained

    model, inputs = tiny(name)
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    made = pruned(model, inputs)
    export_pretrained(made.model, made.plan.recode(inputs), tmp_path / "hf", kept={"ids": made.plan.kept_ids()})
    again = type(model).from_pretrained(tmp_path / "hf").eval()
    given_ids = made.plan.recode(inputs)
    with torch.no_grad():
        torch.testing.assert_close(again(**given_ids).logits, made.model(**given_ids).logits, rtol=0, atol=0)
    assert again.config.pad_token_id == made.model.config.pad_token_id
    kept = json.loads((tmp_path / "hf" / "kept_ids.json").read_text())
    assert kept == {"ids": made.plan.kept_ids().tolist()}


def test_a_decoder_whose_output_has_other_rows_keeps_its_ids() -> None:
    """What `generate` writes it reads again; the encoder's vocabulary is free."""
    config = transformers.FSMTConfig(
        langs=["en", "de"], src_vocab_size=60, tgt_vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    model = transformers.FSMTForConditionalGeneration(config).eval()
    ids = {"input_ids": torch.tensor([[5, 6, 7, 2]]), "decoder_input_ids": torch.tensor([[2, 4, 5]])}
    structure = infer(model, ids, kinds=("embedding",))
    assert {group.name: group.size for group in structure.groups} == {"model.encoder.embed_tokens": 60}
    assert any("feeds back what is written as decoder_input_ids" in frozen.reason for frozen in structure.frozen)
