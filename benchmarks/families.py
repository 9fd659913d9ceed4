"""Hugging Face families, each as a small model built from its config: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["FAMILIES", "Case", "family"]

Case = Callable[[], tuple[nn.Module, Any]]

# Sizes under the names that most configs share; a config takes those that it knows.
_TEXT: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_IMAGE: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "num_labels": 10,
}  # fmt: skip


def _ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(0))


def _text() -> dict[str, torch.Tensor]:
    return {"input_ids": _ids()}


def _both() -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(2, 7)}


def _pixels(size: int = 32) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}


def _sound(length: int = 2000) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, length, generator=torch.Generator().manual_seed(0))}


def _mel(bins: int = 16, frames: int = 40) -> dict[str, torch.Tensor]:
    features = torch.randn(2, bins, frames, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": _ids(2, 7)}


def _pair(size: int = 32) -> dict[str, torch.Tensor]:
    return {**_pixels(size), "input_ids": _ids()}


def family(kind: str, head: str, inputs: Callable[[], Any], base: dict[str, Any], **sizes: Any) -> Case:
    """A case: the model class `head` (an `AutoModel…`) from the config of model type `kind`."""

    def make() -> tuple[nn.Module, Any]:
        import transformers

        config = transformers.AutoConfig.for_model(kind, **{**base, **sizes})
        return getattr(transformers, head).from_config(config).eval(), inputs()

    return make


def _causal(kind: str, **sizes: Any) -> Case:
    return family(kind, "AutoModelForCausalLM", _text, _TEXT, **sizes)


def _encoder(kind: str, **sizes: Any) -> Case:
    return family(kind, "AutoModelForSequenceClassification", _text, _TEXT, **{"num_labels": 3, **sizes})


def _seq2seq(kind: str, **sizes: Any) -> Case:
    return family(kind, "AutoModelForSeq2SeqLM", _both, _TEXT, **sizes)


def _image(kind: str, head: str = "AutoModelForImageClassification", size: int = 32, **sizes: Any) -> Case:
    return family(kind, head, lambda: _pixels(size), _IMAGE, **sizes)


def _staged(kind: str, **sizes: Any) -> Case:
    """A classifier whose config has a width, a depth or a number of heads for each stage, under names of its own."""
    return family(kind, "AutoModelForImageClassification", _pixels, {"image_size": 32, "num_labels": 10}, **sizes)


_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_BART = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MOE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
_STAGES = {"depths": [2, 2], "num_channels": 3}
_SWIN = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 4}
_WAVE = {
    "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_labels": 4, "mask_time_prob": 0.0,
}  # fmt: skip
_TOWERS = {
    "text_config": {k: v for k, v in _TEXT.items() if not k.endswith("_token_id")},
    "vision_config": {k: v for k, v in _IMAGE.items() if k != "num_labels"},
}

# fmt: off
FAMILIES: dict[str, Case] = {
    "BERT": _encoder("bert"),
    "RoBERTa": _encoder("roberta"),
    "ALBERT": _encoder("albert", embedding_size=32),
    "DistilBERT": _encoder("distilbert", dim=64, hidden_dim=128, n_layers=2, n_heads=4),
    "ELECTRA": _encoder("electra", embedding_size=32),
    "DeBERTa-v2": _encoder("deberta-v2"),
    "DeBERTa": _encoder("deberta"),
    "MPNet": _encoder("mpnet"),
    "XLM-R": _encoder("xlm-roberta"),
    "CamemBERT": _encoder("camembert"),
    "ConvBERT": _encoder("convbert", embedding_size=64),
    "SqueezeBERT": _encoder("squeezebert", embedding_size=64),
    "MobileBERT": _encoder("mobilebert", embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32),
    "FNet": _encoder("fnet", tpu_short_seq_length=12),
    "ModernBERT": _encoder("modernbert"),
    "GPT-2": _causal("gpt2", **_GPT),
    "GPT-Neo": _causal("gpt_neo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    "GPT-NeoX": _causal("gpt_neox"),
    "GPT-J": _causal("gptj", **_GPT, rotary_dim=8),
    "OPT": _causal("opt", ffn_dim=128, word_embed_proj_dim=64),
    "BLOOM": _causal("bloom", n_layer=2, n_head=4),
    "Llama": _causal("llama", num_key_value_heads=2),
    "Mistral": _causal("mistral", num_key_value_heads=2, head_dim=16),
    "Mixtral": _causal("mixtral", num_key_value_heads=2, num_local_experts=4, head_dim=16),
    "Qwen2": _causal("qwen2", num_key_value_heads=2),
    "Qwen2-MoE": _causal("qwen2_moe", num_key_value_heads=2, **_MOE, shared_expert_intermediate_size=64),
    "Qwen3": _causal("qwen3", **_GROUPED),
    "Qwen3-MoE": _causal("qwen3_moe", **_GROUPED, **_MOE),
    "Gemma": _causal("gemma", num_key_value_heads=1, head_dim=16),
    "Gemma-2": _causal("gemma2", **_GROUPED, sliding_window=8),
    "Gemma-3": _causal("gemma3_text", **_GROUPED, sliding_window=8),
    "Phi": _causal("phi"),
    "Phi-3": _causal("phi3", num_key_value_heads=2),
    "Falcon": _causal("falcon", num_kv_heads=2, new_decoder_architecture=True),
    "StableLM": _causal("stablelm", num_key_value_heads=2),
    "StarCoder2": _causal("starcoder2", num_key_value_heads=2),
    "OLMo": _causal("olmo", num_key_value_heads=2),
    "OLMo-2": _causal("olmo2", num_key_value_heads=2),
    "Cohere": _causal("cohere", num_key_value_heads=2),
    "MPT": _causal("mpt", d_model=64, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64),
    "Granite": _causal("granite", num_key_value_heads=2),
    "DeepSeek-V3": _causal(
        "deepseek_v3", num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16,
        v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=64,
        first_k_dense_replace=1, n_shared_experts=1,
    ),
    "Mamba": _causal("mamba", state_size=8),
    "Mamba-2": _causal("mamba2", state_size=8, num_heads=8, head_dim=16, n_groups=1, expand=2, chunk_size=8),
    "RWKV": _causal("rwkv", attention_hidden_size=64, intermediate_size=256, context_length=64),
    "T5": _seq2seq("t5", **_T5),
    "Flan-T5 (gated)": _seq2seq("t5", **_T5, feed_forward_proj="gated-gelu"),
    "BART": _seq2seq("bart", **_BART),
    "Marian": _seq2seq("marian", **_BART),
    "Pegasus": _seq2seq("pegasus", **_BART),
    "Whisper": family(
        "whisper", "AutoModelForSpeechSeq2Seq", _mel, _TEXT, **_BART, num_mel_bins=16, max_source_positions=20,
        max_target_positions=32,
    ),
    "wav2vec 2.0": family("wav2vec2", "AutoModelForAudioClassification", _sound, _TEXT, **_WAVE),
    "HuBERT": family("hubert", "AutoModelForAudioClassification", _sound, _TEXT, **_WAVE),
    "AST": family(
        "audio-spectrogram-transformer", "AutoModelForAudioClassification",
        lambda: {"input_values": torch.randn(2, 32, 16)}, _IMAGE, num_mel_bins=16, max_length=32, frequency_stride=8,
        time_stride=8,
    ),
    "ViT": _image("vit"),
    "DeiT": _image("deit", architectures=["DeiTForImageClassification"]),
    "BEiT": _image("beit"),
    "DINOv2": _image("dinov2"),
    "DINOv2 (gated)": _image("dinov2", use_swiglu_ffn=True),
    "ViTMAE": _image("vit_mae", "AutoModelForPreTraining", decoder_hidden_size=32, decoder_num_hidden_layers=2,
                     decoder_num_attention_heads=4, decoder_intermediate_size=64, mask_ratio=0.0),
    "YOLOS": _image("yolos", "AutoModelForObjectDetection", image_size=[32, 32], num_detection_tokens=5),
    "Swin": _staged("swin", **_SWIN),
    "Swin-V2": _staged("swinv2", **_SWIN),
    "ConvNeXt": _image("convnext", hidden_sizes=[32, 64], **_STAGES, num_stages=2, patch_size=4),
    "ConvNeXt-V2": _image("convnextv2", hidden_sizes=[32, 64], **_STAGES, num_stages=2, patch_size=4),
    "ResNet": _image("resnet", hidden_sizes=[32, 64], embedding_size=32, **_STAGES),
    "RegNet": _staged("regnet", hidden_sizes=[32, 64], embedding_size=32, **_STAGES, groups_width=16),
    "MobileNetV2": _image("mobilenet_v2"),
    "PVT-v2": _image("pvt_v2", hidden_sizes=[32, 64, 64, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 2],
                     sr_ratios=[4, 2, 1, 1], mlp_ratios=[2, 2, 2, 2]),
    "SegFormer": _image(
        "segformer", "AutoModelForSemanticSegmentation", 64, hidden_sizes=[32, 64, 64, 64], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2], sr_ratios=[4, 2, 1, 1], decoder_hidden_size=32,
    ),
    "CLIP": family("clip", "AutoModel", _pair, _TOWERS, projection_dim=32),
    "SigLIP": family("siglip", "AutoModel", _pair, _TOWERS),
}
# fmt: on
