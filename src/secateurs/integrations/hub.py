"""Hugging Face models through transformers; importing this file imports it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from .models import ImageFormat, TextFormat

__all__ = ["images_of", "inputs_of", "model_of", "text_of"]

# Seconds of sound at the rate of 16 kHz that speech models are trained on.
_SOUND = 16_000


def model_of(spec: str, random_weights: bool, trust_remote_code: bool) -> Any:
    """The model of the class that its config names, with its weights or with random ones.

    Raises:
        OSError, ValueError: as transformers does, where the model is not found or is not allowed to run its code.
    """
    config = AutoConfig.from_pretrained(spec, trust_remote_code=trust_remote_code)
    wanted = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    kind = getattr(transformers, wanted, None)
    if kind is None:
        # A class from the hub: the config says through which Auto class it is found.
        automatic = [name for name in getattr(config, "auto_map", {}) if name.startswith("AutoModel")]
        kind = getattr(transformers, automatic[0] if automatic else "AutoModel")
    options = {"trust_remote_code": trust_remote_code} if kind.__name__.startswith("Auto") else {}
    if not random_weights:
        return kind.from_pretrained(spec, **options)
    return kind.from_config(config, **options) if hasattr(kind, "from_config") else kind(config)


def images_of(spec: str, config: Any) -> ImageFormat | None:
    """How the model wants its pictures, from its processor's file and its config; None for one that sees none."""
    vision = getattr(config, "vision_config", config)
    patch = getattr(vision, "image_size", None)
    if patch is None and not hasattr(vision, "num_channels"):
        return None
    processor = _processor(spec)
    height, width = _sides(processor.get("crop_size") or processor.get("size") or patch or 224, patch or 224)
    return ImageFormat(
        (height, width),
        getattr(vision, "num_channels", 3),
        tuple(processor.get("image_mean") or ()),
        tuple(processor.get("image_std") or ()),
        processor.get("crop_pct") or 1.0,
    )


def _processor(spec: str) -> dict[str, Any]:
    """The content of preprocessor_config.json; empty where the model has none."""
    path = Path(spec) / "preprocessor_config.json"
    if not Path(spec).is_dir():
        from transformers.utils.hub import cached_file

        found = cached_file(
            spec,
            path.name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        path = Path(found or "")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _sides(size: Any, fallback: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        if "height" in size and "width" in size:
            return size["height"], size["width"]
        size = size.get("shortest_edge", fallback)
    if isinstance(size, (tuple, list)):
        return size[0], size[-1]
    return size, size


def text_of(spec: str, model: nn.Module, trust_remote_code: bool) -> TextFormat | None:
    """How the model wants its text; None for one that reads none."""
    length = _length(model.config)
    if length is None:
        return None
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return TextFormat(spec, length, causal, trust_remote_code)


def inputs_of(model: nn.Module, batch: int, images: Tensor | None) -> dict[str, Tensor] | None:
    """Random example inputs under the names that the model's forward has for them; None where they are not known."""
    main = getattr(model, "main_input_name", "input_ids")
    config = model.config
    length = _length(config)
    ids = None if length is None else torch.randint(0, _vocabulary(config), (batch, length))
    known: dict[str, Tensor | None] = {
        "input_ids": ids,
        "pixel_values": images,
        "input_values": torch.randn(batch, _SOUND),
    }
    bands = getattr(config, "num_mel_bins", None)
    if bands is not None:
        known["input_features"] = torch.randn(batch, bands, 2 * getattr(config, "max_source_positions", 1500))
    chosen = known.get(main)
    if chosen is None:
        return None
    inputs = {main: chosen}
    if getattr(config, "is_encoder_decoder", False) and ids is not None:
        inputs["decoder_input_ids"] = ids[:, : min(ids.shape[1], 8)]
    return inputs


def _vocabulary(config: Any) -> int:
    return int(getattr(config.get_text_config(), "vocab_size", 1000))


def _length(config: Any) -> int | None:
    """At most 128 tokens, which show every width at a small cost; None for a model without vocabulary."""
    text = config.get_text_config()
    if not getattr(text, "vocab_size", None):
        return None
    return min(128, int(getattr(text, "max_position_embeddings", None) or 128))
