"""The Hugging Face Trainer runs the loop; weights are those of a loop of our own, and of one that was interrupted."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateurs.core.errors import FileError, MissingExtraError, OptionError, PlanError
from secateurs.core.state import read_state, write_state
from tests.support.loops import BUILDS, STEPS, adam, batches, net, plain_run, zeros

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from secateurs.integrations.trainer import FILE, PruningCallback  # noqa: E402


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No log lines of the libraries, and no progress bars."""
    logging.disable(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
    logging.disable(logging.NOTSET)


class Classifier(nn.Module):
    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        self.net = net(seed)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


def rows(count: int) -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": y} for one in batches(count) for x, y in zip(*one, strict=True)]


def made(folder: Path, model: nn.Module, callback: Any, accumulate: int = 1, **options: Any) -> Any:
    """A trainer of batches in their order."""
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 16, "use_cpu": True,
        "gradient_accumulation_steps": accumulate, "max_grad_norm": 0.0, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "logging_strategy": "no", "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**settings | options),
        train_dataset=rows(STEPS * accumulate),
        eval_dataset=rows(1),
        optimizers=(adam(model), None),
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def pruning(name: str, **options: Any) -> PruningCallback:
    return PruningCallback(lambda model, optimizer: BUILDS[name](model.net, optimizer), **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", BUILDS)
def test_weights_are_those_of_a_loop_of_our_own(name: str, tmp_path: Path) -> None:
    model, callback = Classifier(), pruning(name)
    made(tmp_path, model, callback).train()
    assert callback.pruner.steps == STEPS
    assert zeros(model.net) == 180
    assert same(model.net, plain_run(name))


@pytest.mark.parametrize("name", ["gradual", "granet", "pdp"])
def test_accumulated_gradients_are_one_step(name: str, tmp_path: Path) -> None:
    model, callback = Classifier(), pruning(name)
    made(tmp_path, model, callback, accumulate=3).train()
    assert callback.pruner.steps == STEPS
    for ours, theirs in zip(plain_run(name, accumulate=3).parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def saved(folder: Path, name: str) -> tuple[nn.Module, PruningCallback]:
    """A training with a checkpoint at step 5."""
    model, callback = Classifier(), pruning(name)
    made(folder, model, callback, save_strategy="steps", save_steps=5).train()
    return model, callback


@pytest.mark.parametrize("name", BUILDS)
def test_resumed_equals_uninterrupted_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, callback = saved(tmp_path, name)
    again, resumed = Classifier(seed=8), pruning(name)
    made(tmp_path, again, resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.pruner.steps == STEPS
    assert same(whole, again)
    for weight, mask in callback.pruner.masks.items():
        assert torch.equal(mask, resumed.pruner.masks[weight])


def test_resumed_from_a_folder_elsewhere(tmp_path: Path) -> None:
    whole, _ = saved(tmp_path / "a", "gradual")
    folder = tmp_path / "a" / "checkpoint-5"
    with pytest.raises(FileError, match=r"there is no .*checkpoint-5.*: give the checkpoint's folder as resume_from="):
        made(tmp_path / "b", Classifier(8), pruning("gradual")).train(resume_from_checkpoint=str(folder))
    again = Classifier(seed=8)
    made(tmp_path / "b", again, pruning("gradual", resume_from=folder)).train(resume_from_checkpoint=str(folder))
    assert same(whole, again)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    saved(tmp_path, "gradual")
    path = tmp_path / "checkpoint-5" / FILE
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(FileError, match=rf"{FILE} cannot be read as pruner state .*truncated or damaged"):
        made(tmp_path, Classifier(8), pruning("gradual")).train(resume_from_checkpoint=str(path.parent))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FileError, match=r"was changed since it was written: its checksum does not match"):
        made(tmp_path, Classifier(8), pruning("gradual")).train(resume_from_checkpoint=str(path.parent))


def test_a_state_of_another_step_or_checkpoint_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "gradual")
    path = tmp_path / "checkpoint-5" / FILE
    stored = read_state(path, "pruner state")
    write_state(path, stored | {"step": 4}, "pruner state")
    with pytest.raises(
        FileError, match=r"is of step 4, training resumes at step 5: give the folder of that checkpoint"
    ):
        made(tmp_path, Classifier(8), pruning("gradual")).train(resume_from_checkpoint=str(path.parent))
    kept = stored["pruner"]["masks"]["kept/0.weight"]
    kept.copy_(kept.flip(0))
    write_state(path, stored, "pruner state")
    with pytest.raises(PlanError, match=r"of another checkpoint than the model's weights: it changes net.0.weight"):
        made(tmp_path, Classifier(8), pruning("gradual")).train(resume_from_checkpoint=str(path.parent))


def test_a_state_of_another_pruner_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "gradual")
    model = Classifier(8)
    with pytest.raises(PlanError, match=r"the stored state is not of this pruner's kind"):
        made(tmp_path, model, pruning("pdp")).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert not model.net[0].weight._backward_hooks
    assert not model.net[0].weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("name", ["gradual", "pdp"])
def test_the_best_model_keeps_its_own_masks(name: str, tmp_path: Path) -> None:
    """An evaluation that gets worse all the time makes the first checkpoint the best one."""
    model, callback = Classifier(), pruning(name)
    trainer = made(
        tmp_path, model, callback, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3,
        load_best_model_at_end=True, metric_for_best_model="worse", greater_is_better=False,
    )  # fmt: skip
    trainer.evaluate = lambda *_, **__: {"eval_worse": trainer.state.global_step}
    with pytest.warns(UserWarning, match=r"training ended at step 3, before step"):
        trainer.train()
    stored = read_state(tmp_path / "checkpoint-3" / FILE, "pruner state")["pruner"]
    reference = Classifier()
    pruner = BUILDS[name](reference.net, adam(reference))
    reference.load_state_dict(load_file(tmp_path / "checkpoint-3" / "model.safetensors"))
    pruner.load_state_dict(stored)
    with pytest.warns(UserWarning, match=r"training ended"):
        masks = pruner.finalize()
    for weight, mask in masks.items():
        assert torch.equal(model.net.get_parameter(weight), reference.net.get_parameter(weight))
        assert torch.equal(model.net.get_parameter(weight) != 0, mask)


def test_each_training_builds_a_pruner_of_its_own(tmp_path: Path) -> None:
    model, callback = Classifier(), pruning("gradual")
    trainer = made(tmp_path, model, callback)
    trainer.train()
    first = callback.pruner
    trainer.train()
    assert callback.pruner is not first
    assert callback.pruner.steps == STEPS
    assert zeros(model.net) == 180
    with pytest.raises(OptionError, match=r"has been finalized"):
        first.step()


def test_finalized_once_and_no_hook_stays(tmp_path: Path) -> None:
    model, callback = Classifier(), pruning("gradual")
    trainer = made(tmp_path, model, callback)
    trainer.train()
    inner = trainer.optimizer.optimizer
    assert not model.net[0].weight._post_accumulate_grad_hooks
    assert not inner._optimizer_step_post_hooks
    assert not inner._optimizer_step_pre_hooks
    with torch.no_grad():
        model.net[0].weight.fill_(1.0)
    callback.on_train_end(trainer.args, trainer.state, trainer.control, model=model, optimizer=trainer.optimizer)
    assert not (model.net[0].weight == 0).any()


def test_the_sparsity_is_logged(tmp_path: Path) -> None:
    trainer = made(tmp_path, Classifier(), pruning("gradual"), logging_strategy="steps", logging_steps=4)
    trainer.train()
    seen = [round(record["sparsity"], 4) for record in trainer.state.log_history]
    assert seen[0] > 0.2
    assert seen[-1] == 0.75
    assert seen == sorted(seen)
    trainer = made(tmp_path, Classifier(), pruning("gradual", log=None), logging_strategy="steps", logging_steps=4)
    trainer.train()
    assert trainer.state.log_history
    assert not any("sparsity" in record for record in trainer.state.log_history)


@pytest.mark.parametrize("way", ["fsdp", "deepspeed", "accelerate"])
def test_sharding_is_refused(way: str, tmp_path: Path) -> None:
    trainer = made(tmp_path, Classifier(), callback := pruning("gradual"))
    args: Any = trainer.args
    if way == "accelerate":
        args = type("Arguments", (), {"distributed_state": type("State", (), {"distributed_type": "X.FSDP"})})()
    else:
        setattr(args, way, "full_shard")
    with pytest.raises(OptionError, match=r"(?i)(fsdp|deepspeed) shards parameters, and masks need whole ones"):
        callback.on_train_begin(args, trainer.state, trainer.control, model=trainer.model, optimizer=trainer.optimizer)


def test_nothing_is_written_without_a_pruner(tmp_path: Path) -> None:
    callback = pruning("gradual")
    trainer = made(tmp_path, Classifier(), callback)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.on_save(trainer.args, trainer.state, trainer.control)
        callback.on_train_end(trainer.args, trainer.state, trainer.control)
    assert not list(tmp_path.rglob(FILE))
    assert callback.pruner is None


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_without_the_packages_the_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, PruningCallback.__module__)
    with pytest.raises(MissingExtraError, match=rf"{package} is needed here; .* 'secateurs\[language\]'"):
        importlib.import_module(PruningCallback.__module__)


def test_a_language_model_with_tied_weights_in_bfloat16(tmp_path: Path) -> None:
    """Saved by `save_pretrained`, resumed, and equal to the run that was not interrupted."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    text = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (4 * STEPS, 8))]

    def trained(seed: int, **options: Any) -> tuple[Any, PruningCallback]:
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        callback = PruningCallback(lambda m, o: BUILDS["pdp"](m, o))
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True, bf16=True, report_to="none",
            save_strategy="steps", save_steps=5, disable_tqdm=True, logging_strategy="no", learning_rate=0.01,
        )  # fmt: skip
        trainer = transformers.Trainer(model, args, train_dataset=text, callbacks=[callback])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(**options)
        return model, callback

    whole, callback = trained(3)
    again, _ = trained(8, resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same(whole, again)
    masks = callback.pruner.masks
    assert all(torch.equal(whole.get_parameter(name) != 0, mask) for name, mask in masks.items())
    assert sum(int(m.sum()) for m in masks.values()) * 4 == sum(m.numel() for m in masks.values())
