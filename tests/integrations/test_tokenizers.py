"""Tokenizers of what is left of a vocabulary: their ids are those of the smaller model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import secateurs as sec
from secateurs.core.errors import OptionError
from secateurs.core.ids import renumbered
from secateurs.integrations.pretrained import export_pretrained
from secateurs.integrations.tokenizers import trim_tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "the", "[CLS]", "cat", "dog", "[SEP]", "sat", "ca", "##t", "##ts", "mat", "[MASK]"]
SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def wordpiece() -> Any:
    from tokenizers import models, pre_tokenizers, processors

    made = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 6)])
    made.enable_padding(pad_id=0, pad_token="[PAD]")
    return made


def wordlevel() -> Any:
    from tokenizers import models, pre_tokenizers, processors

    made = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 6), ("[CLS]", 3))
    return made


def unigram() -> Any:
    from tokenizers import models, pre_tokenizers

    made = tokenizers.Tokenizer(models.Unigram([(w, -float(len(w) < 3)) for w in WORDS], unk_id=1))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def bytepair() -> Any:
    from tokenizers import models

    return tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))


def saved(raw: Any, folder: Path) -> Any:
    special = {k: v for k, v in SPECIAL.items() if raw.token_to_id(v) is not None}
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    whole.save_pretrained(folder)
    return whole


@pytest.mark.parametrize("make", [wordpiece, wordlevel, unigram])
def test_what_is_left_has_the_new_ids(make: Any, tmp_path: Path) -> None:
    whole = saved(make(), tmp_path)
    kept = [0, 1, 3, 4, 5, 6, 7, 8, 9, 12]
    assert trim_tokenizer(tmp_path, kept)
    less = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(less) == len(kept)
    for text in ("cat sat dog", "dog [MASK] cat", "bird"):
        old, new = whole(text)["input_ids"], less(text)["input_ids"]
        assert new == renumbered(torch.tensor(old), torch.tensor(kept)).tolist()
        assert less.convert_ids_to_tokens(new) == whole.convert_ids_to_tokens(old)
    assert less.convert_tokens_to_ids("[MASK]") == kept.index(12)
    assert less.all_special_ids == [kept.index(i) for i in whole.all_special_ids]


def test_a_word_that_is_gone_is_cut_into_pieces(tmp_path: Path) -> None:
    saved(wordpiece(), tmp_path)
    trim_tokenizer(tmp_path, [0, 1, 3, 6, 8, 9, 12])
    less = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert less.tokenize("cat") == ["ca", "##t"]
    assert less.tokenize("dog") == ["[UNK]"]


@pytest.mark.parametrize("make", [wordpiece, unigram])
def test_the_unknown_token_must_stay(make: Any, tmp_path: Path) -> None:
    saved(make(), tmp_path)
    with pytest.raises(OptionError, match=r"needs '\[UNK\]', and it was removed"):
        trim_tokenizer(tmp_path, [0, 3, 4, 6])


def test_tokens_round_a_text_must_stay(tmp_path: Path) -> None:
    saved(wordlevel(), tmp_path)
    with pytest.raises(OptionError, match=r"needs '\[CLS\]', and it was removed"):
        trim_tokenizer(tmp_path, [0, 1, 4, 6])


def test_byte_pairs_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    assert not trim_tokenizer(tmp_path, [0])
    saved(bytepair(), tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    assert not trim_tokenizer(tmp_path, [0, 1])
    assert (tmp_path / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize(("make", "written"), [(wordpiece, True), (bytepair, False)])
def test_an_exported_folder_has_a_tokenizer_that_fits_or_none(make: Any, written: bool, tmp_path: Path) -> None:
    whole = saved(make(), tmp_path / "old")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertForMaskedLM(config).eval()
    ids = {"input_ids": torch.tensor([[3, 4, 7, 6]])}
    made = sec.prune(
        model, ids, "sparsity=30%", granularity="embedding", keep_ids=whole.all_special_ids, measure=False
    )  # fmt: skip
    kept = {"words": made.plan.kept_ids()}
    export_pretrained(made.model, made.plan.recode(ids), tmp_path / "hf", tokenizer=str(tmp_path / "old"), kept=kept)
    assert json.loads((tmp_path / "hf" / "kept_ids.json").read_text()) == {"words": kept["words"].tolist()}
    assert (tmp_path / "hf" / "tokenizer.json").is_file() == written
    if written:
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert (
            again("cat sat", return_tensors="pt")["input_ids"].tolist() == made.plan.recode(ids)["input_ids"].tolist()
        )
