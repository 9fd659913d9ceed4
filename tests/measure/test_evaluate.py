from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateurs.core.errors import DataError, ModelError, OptionError
from secateurs.measure.quality import accuracy, ece, evaluate, nll, perplexity


class Bigram(nn.Module):
    """A language model whose logits for the next token depend on the token alone."""

    def __init__(self, vocabulary=5):
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.table(input_ids)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


class BigramLMHeadModel(Bigram):
    pass


class Words(nn.Module):
    """A Hugging Face classifier in small: keywords in, `.logits` out."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.table(input_ids).mean(1)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


def batches_of(sizes=(4, 3), classes=3):
    return [(torch.randn(n, 5), torch.randint(0, classes, (n,))) for n in sizes]


def test_batches_of_unequal_size_equal_one_batch():
    net, data = nn.Linear(5, 3), batches_of()
    found = evaluate(net, data, ("accuracy", "top2", "nll", "ece", "loss"))
    x, y = torch.cat([b[0] for b in data]), torch.cat([b[1] for b in data])
    logits = net(x).detach()
    assert list(found) == ["accuracy", "top2", "nll", "ece", "loss"]
    assert found["accuracy"] == pytest.approx(accuracy(logits, y))
    assert found["top2"] == pytest.approx(accuracy(logits, y, 2))
    assert found["nll"] == pytest.approx(nll(logits, y), rel=1e-6)
    assert found["loss"] == pytest.approx(nll(logits, y), rel=1e-6)
    confidence, named = logits.softmax(1).max(1)
    assert found["ece"] == pytest.approx(ece(confidence, named == y), rel=1e-6)


def test_default_metrics_in_one_pass_over_an_iterator():
    assert set(evaluate(nn.Linear(5, 3), iter(batches_of()))) == {"accuracy", "nll", "ece"}


def test_training_flags_and_batch_norm_are_left_alone():
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.9))
    net[2].eval()
    before = net[1].running_mean.clone()
    data = batches_of()
    assert evaluate(net, data) == evaluate(net, data)
    assert [m.training for m in net.modules()] == [True, True, True, False]
    assert torch.equal(net[1].running_mean, before)


def test_dict_batches_with_labels():
    net = Words()
    ids, labels = torch.randint(0, 6, (4, 2)), torch.tensor([0, 1, 2, 0])
    found = evaluate(net, [{"input_ids": ids, "labels": labels}], ("accuracy", "nll", "loss"))
    logits = net.table(ids).mean(1)
    assert found["accuracy"] == accuracy(logits, labels)
    assert found["nll"] == pytest.approx(nll(logits, labels))
    assert found["loss"] == pytest.approx(nll(logits, labels))


def test_segmentation_has_classes_second():
    net, x, y = nn.Conv2d(1, 3, 1), torch.randn(2, 1, 4, 5), torch.randint(0, 3, (2, 4, 5))
    y[0, 0, :] = -100
    logits = net(x).movedim(1, -1).flatten(0, 2)
    counts = y.flatten() != -100
    expected = accuracy(logits[counts], y.flatten()[counts])
    assert evaluate(net, [(x, y)], ("accuracy",))["accuracy"] == pytest.approx(expected)


def test_token_labels_are_shifted_for_causal_models_only():
    ids = torch.randint(0, 5, (2, 6))
    batch = {"input_ids": ids, "labels": ids}
    net, causal = Bigram(), BigramLMHeadModel()
    causal.load_state_dict(net.state_dict())
    logits = net.table(ids)
    shifted, aligned = (
        nll(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
        nll(logits.flatten(0, 1), ids.flatten()),
    )
    assert evaluate(net, [batch], ("nll",))["nll"] == pytest.approx(aligned)
    assert evaluate(causal, [batch], ("nll",))["nll"] == pytest.approx(shifted)
    assert evaluate(causal, [batch], ("nll",), causal=False)["nll"] == pytest.approx(aligned)
    assert evaluate(net, [batch], ("nll",), causal=True)["nll"] == pytest.approx(shifted)


def test_perplexity_weighs_tokens_and_not_batches():
    net = Bigram()
    long, short = torch.randint(0, 5, (1, 9)), torch.randint(0, 5, (1, 2))
    losses = [
        F.cross_entropy(net.table(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten(), reduction="sum").item()
        for row in (long, short)
    ]
    expected = math.exp(sum(losses) / (8 + 1))
    assert perplexity(net, [long, short]) == pytest.approx(expected, rel=1e-6)
    assert perplexity(net, [{"input_ids": long, "labels": long}, {"input_ids": short}]) == pytest.approx(
        expected, rel=1e-6
    )
    pairs = [(row[:, :-1], row[:, 1:]) for row in (long, short)]
    assert perplexity(net, pairs) == pytest.approx(expected, rel=1e-6)


def test_perplexity_of_an_even_guess_is_the_vocabulary():
    net = Bigram(7)
    nn.init.zeros_(net.table.weight)
    assert perplexity(net, [torch.randint(0, 7, (3, 4))]) == pytest.approx(7.0)


def test_padding_on_either_side_does_not_count():
    net, row = Bigram(), torch.tensor([[1, 2, 3]])
    expected = perplexity(net, [row])
    for ids, mask in (([[1, 2, 3, 0, 0]], [[1, 1, 1, 0, 0]]), ([[0, 0, 1, 2, 3]], [[0, 0, 1, 1, 1]])):
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        assert perplexity(net, [batch]) == pytest.approx(expected)


def test_labels_of_minus_100_do_not_count():
    net, ids = Bigram(), torch.tensor([[1, 2, 3, 4]])
    labels = torch.tensor([[-100, -100, 3, 4]])
    expected = math.exp(nll(net.table(torch.tensor([2, 3])), torch.tensor([3, 4])))
    assert perplexity(net, [{"input_ids": ids, "labels": labels}]) == pytest.approx(expected)


def test_a_perplexity_beyond_floats_is_infinite():
    net = Bigram(2)
    with torch.no_grad():
        net.table.weight.copy_(torch.tensor([[0.0, 1e4], [0.0, 1e4]]))
    assert perplexity(net, [torch.zeros(1, 3, dtype=torch.long)]) == math.inf


def test_half_precision_logits_are_summed_in_wide_floats():
    net, x = nn.Linear(5, 3).bfloat16(), torch.randn(2000, 5).bfloat16()
    y = torch.randint(0, 3, (2000,))
    exact = F.cross_entropy(net(x).double(), y).item()
    assert evaluate(net, [(x, y)], ("nll",))["nll"] == pytest.approx(exact, rel=1e-6)


def test_loss_may_be_given():
    found = evaluate(nn.Identity(), [(torch.ones(3, 2), None)], ("loss",), loss=lambda output, target: output.sum(1))
    assert found == {"loss": 2.0}


def test_regression_has_a_loss():
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]])
    assert evaluate(nn.Identity(), [(x, y)], ("loss",)) == {"loss": 2.5}


@pytest.mark.parametrize(
    ("data", "metrics", "message"),
    [
        ([], ("accuracy",), "the evaluation data is empty"),
        (torch.zeros(2, 5), ("accuracy",), "must be an iterable of batches, got one Tensor"),
        ([torch.zeros(2, 5)], ("accuracy",), "these metrics need labels"),
        (
            [(torch.zeros(2, 5), torch.zeros(3, dtype=torch.long))],
            ("nll",),
            r"labels of shape \(3,\) do not fit logits",
        ),
        ([(torch.zeros(2, 5), torch.tensor([-100, -100]))], ("accuracy",), "no label to take the accuracy of"),
        ([(torch.zeros(2, 5), torch.tensor([-100, -100]))], ("ece",), "no prediction to take the calibration error of"),
    ],
)
def test_data_that_cannot_be_scored(data, metrics, message):
    with pytest.raises(DataError, match=message):
        evaluate(nn.Linear(5, 3), data, metrics)


def test_one_token_has_no_perplexity():
    with pytest.raises(DataError, match="no label to take the perplexity of"):
        perplexity(Bigram(), [torch.zeros(3, 1, dtype=torch.long)])


def test_nan_is_an_error_that_names_the_batch():
    clean, broken = torch.zeros(1, 5), torch.full((1, 5), float("nan"))
    y = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ModelError, match="the output of Linear has NaN in batch 1"):
        evaluate(nn.Linear(5, 3), [(clean, y), (broken, y)])


def test_unknown_metric_lists_the_nearest():
    with pytest.raises(OptionError, match="unknown metric 'acuracy'; the nearest are accuracy"):
        evaluate(nn.Linear(5, 3), batches_of(), ("acuracy",))


def test_hugging_face_models():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    net = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 50, (3, 8))
    with torch.no_grad():
        loss = net(input_ids=ids, labels=ids).loss.item()
    batch = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    found = evaluate(net, [batch], ("nll", "perplexity", "loss"))
    assert found["nll"] == pytest.approx(loss, rel=1e-5)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
