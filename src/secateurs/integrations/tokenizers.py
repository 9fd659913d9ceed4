"""Tokenizers of vocabularies of which a part was removed: what they make of text are ids of the model that is left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import OptionError

__all__ = ["trim_tokenizer"]

_FILE = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
# Files of the same vocabulary in other forms, which would be read in its place.
_OTHERS = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "added_tokens.json")
# Whose tokens do not depend on one another, as those that merges build do.
_KINDS = ("WordLevel", "WordPiece", "Unigram")


def trim_tokenizer(folder: str | Path, kept: list[int]) -> bool:
    """Whether the tokenizer in a folder of `save_pretrained` could be trimmed, in place, to the tokens that were kept.

    Those of WordLevel, WordPiece and Unigram vocabularies can: text with a token that is gone is cut into others, or is
    unknown. In byte-pair vocabularies each token is built from others, so that they are left alone.

    Args:
        kept: the ids that were kept, ascending.

    Raises:
        OptionError: the token for unknown text was removed, or one that is put round a text.
    """
    place = Path(folder)
    if not (place / _FILE).is_file():
        return False
    told = json.loads((place / _FILE).read_text(encoding="utf-8"))
    if told["model"].get("type") not in _KINDS:
        return False
    new = {old: number for number, old in enumerate(kept)}
    told["model"] = _model(told["model"], new)
    told["added_tokens"] = [{**t, "id": new[t["id"]]} for t in told.get("added_tokens", ()) if t["id"] in new]
    told["post_processor"] = _processor(told.get("post_processor"), new)
    if told.get("padding"):
        told["padding"]["pad_id"] = new.get(told["padding"]["pad_id"], 0)
    (place / _FILE).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    _renumber_settings(place / _SETTINGS, new)
    for name in _OTHERS:
        (place / name).unlink(missing_ok=True)
    return True


def _model(model: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    if model["type"] == "Unigram":
        pieces = [piece for old, piece in enumerate(model["vocab"]) if old in new]
        unknown = model.get("unk_id")
        if unknown is not None and unknown not in new:
            raise _needed(model["vocab"][unknown][0])
        return {**model, "vocab": pieces, "unk_id": None if unknown is None else new[unknown]}
    vocabulary = {token: new[old] for token, old in model["vocab"].items() if old in new}
    unknown = model.get("unk_token") or ""
    if unknown in model["vocab"] and unknown not in vocabulary:
        raise _needed(unknown)
    return {**model, "vocab": vocabulary}


def _needed(token: str) -> OptionError:
    return OptionError(
        f"the tokenizer needs {token!r}, and it was removed: plan again with keep_ids=tokenizer.all_special_ids."
    )


def _processor(processor: Any, new: Mapping[int, int]) -> Any:
    """What puts special tokens round a text, with their new numbers."""
    if not isinstance(processor, dict):
        return processor
    made = dict(processor)
    for name in ("sep", "cls"):
        if isinstance(made.get(name), list):
            made[name] = [made[name][0], _numbered(made[name][0], made[name][1], new)]
    if isinstance(made.get("special_tokens"), dict):
        tokens = made["special_tokens"].items()
        made["special_tokens"] = {name: {**t, "ids": [_numbered(name, i, new) for i in t["ids"]]} for name, t in tokens}
    if isinstance(made.get("processors"), list):
        made["processors"] = [_processor(one, new) for one in made["processors"]]
    return made


def _numbered(token: str, old: int, new: Mapping[int, int]) -> int:
    if old not in new:
        raise _needed(token)
    return new[old]


def _renumber_settings(path: Path, new: Mapping[int, int]) -> None:
    if not path.is_file():
        return
    told = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(added := told.get("added_tokens_decoder"), dict):
        told["added_tokens_decoder"] = {str(new[int(i)]): token for i, token in added.items() if int(i) in new}
        path.write_text(json.dumps(told, ensure_ascii=False, indent=2), encoding="utf-8")
