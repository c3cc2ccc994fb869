"""Text encoders from Hugging Face folders: BERT and its relatives, and Qwen2 (Qwen2-VL's language model)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from far_models.checkpoint.load import check_finite, check_tensors
from far_models.text.bert import Bert, BertConfig
from far_models.text.folder import read_config, read_tensors, setting, without_prefix
from far_models.text.qwen2 import Qwen2, Qwen2Config
from far_models.text.tokens import QWEN_SYSTEM_PROMPT, text_settings
from far_runtime.errors import FarError
from far_runtime.model_info import TextSettings


@dataclass(frozen=True)
class TextEncoder:
    """A loaded text encoder."""

    folder: Path
    """The Hugging Face folder."""
    network: nn.Module
    """Token ids and mask [B, n] -> last hidden states [B, n, width], in evaluation mode."""
    settings: TextSettings
    """How prompts become tokens, as `text_settings` returns it."""

    @property
    def width(self) -> int:
        """Width of the features."""
        width: int = self.network.config.width
        return width

    @property
    def features(self) -> TextFeatures:
        """The network that returns the features of the prompt alone."""
        return TextFeatures(self.network, len(self.settings.prefix)).eval()


class TextFeatures(nn.Module):
    """Token ids and mask [B, prefix + T] -> features [B, T, width]: the last hidden states without the system prompt's.

    The features of padding stay, as in the official code: FAR-T2I attends to all T of them.
    """

    def __init__(self, network: nn.Module, prefix: int) -> None:
        super().__init__()
        self.network = network
        self.prefix = prefix

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.network(ids, mask)[:, self.prefix :]
        return out


@dataclass(frozen=True)
class Architecture:
    """A type of text encoder."""

    build: Callable[[Mapping[str, Any], Path], nn.Module]
    """Builds the network from the entries of config.json; the folder is for messages."""
    marker: str
    """A tensor that every such network has."""
    ignored: tuple[str, ...]
    """Beginnings of the names of tensors beside the network."""
    system_prompt: str = ""
    """Text before every prompt."""


def load_text_encoder(folder: str | Path, tokens: int) -> TextEncoder:
    """Load the text encoder of a Hugging Face folder in float32, for prompts of `tokens` tokens.

    Raises FarError for a folder without config.json, weights or tokenizer.json, for another type of network, for
    tensors that are missing, of another shape or not finite, and for a network that takes fewer tokens.
    """
    path = Path(folder)
    config = read_config(path)
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None:
        raise FarError(
            f"{path}: model_type {config.get('model_type')!r}; text encoders that are known: {', '.join(ARCHITECTURES)}"
        )
    with torch.device("meta"):
        network = architecture.build(config, path)
    settings = text_settings(path, config, network.config.vocabulary, tokens, architecture.system_prompt)
    length = len(settings.prefix) + tokens
    if length > network.config.positions:
        raise FarError(
            f"{path}: the checkpoint reads {tokens} text tokens, with the system prompt {length}; this text encoder "
            f"takes {network.config.positions}: use the one that the checkpoint was trained with"
        )
    tensors = without_prefix(path, read_tensors(path), architecture.marker, architecture.ignored)
    tensors = {_current_name(name): tensor for name, tensor in tensors.items()}
    check_tensors(path, {name: p.shape for name, p in network.state_dict().items()}, tensors)
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    check_finite(path, floats)
    network.load_state_dict(floats, assign=True)
    return TextEncoder(path, network.eval().requires_grad_(False), settings)


def _current_name(name: str) -> str:
    """The name of a tensor in Hugging Face's present code; old files call the weights of norms "gamma" and "beta"."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _expect(config: Mapping[str, Any], path: Path, name: str, allowed: tuple[Any, ...]) -> None:
    """FarError where a setting of config.json is none of the allowed values; a missing one is the first."""
    if config.get(name, allowed[0]) not in allowed:
        raise FarError(f"{path / 'config.json'}: {name} {config[name]!r}; this project knows {allowed[0]!r} only")


def _bert(config: Mapping[str, Any], path: Path) -> nn.Module:
    _expect(config, path, "hidden_act", ("gelu",))
    _expect(config, path, "position_embedding_type", ("absolute",))
    sizes = BertConfig(
        vocabulary=setting(config, path, "vocab_size", int),
        width=setting(config, path, "hidden_size", int),
        depth=setting(config, path, "num_hidden_layers", int),
        heads=setting(config, path, "num_attention_heads", int),
        hidden=setting(config, path, "intermediate_size", int),
        positions=setting(config, path, "max_position_embeddings", int),
        types=setting(config, path, "type_vocab_size", int, 2),
        eps=setting(config, path, "layer_norm_eps", float, 1e-12),
    )
    _divides(path, sizes.heads, sizes.width)
    return Bert(sizes)


def _qwen2(config: Mapping[str, Any], path: Path) -> nn.Module:
    _expect(config, path, "hidden_act", ("silu",))
    _expect(config, path, "use_sliding_window", (False,))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _expect(rope, path, "rope_type" if "rope_type" in rope else "type", ("default", "mrope"))
    width, heads = setting(config, path, "hidden_size", int), setting(config, path, "num_attention_heads", int)
    _divides(path, heads, width)
    sizes = Qwen2Config(
        vocabulary=setting(config, path, "vocab_size", int),
        width=width,
        depth=setting(config, path, "num_hidden_layers", int),
        heads=heads,
        groups=setting(config, path, "num_key_value_heads", int, heads),
        head_dim=setting(config, path, "head_dim", int, width // heads),
        hidden=setting(config, path, "intermediate_size", int),
        positions=setting(config, path, "max_position_embeddings", int, 32768),
        theta=setting({**config, **rope}, path, "rope_theta", float, 10000.0),
        eps=setting(config, path, "rms_norm_eps", float, 1e-6),
    )
    _divides(path, sizes.groups, heads)
    return Qwen2(sizes)


def _divides(path: Path, heads: int, width: int) -> None:
    if width % heads:
        raise FarError(f"{path / 'config.json'}: {heads} attention heads do not divide {width}")


_QWEN2 = Architecture(_qwen2, "embed_tokens.weight", ("lm_head.", "visual."), QWEN_SYSTEM_PROMPT)
ARCHITECTURES = {
    "bert": Architecture(_bert, "embeddings.word_embeddings.weight", ("pooler.", "cls.", "embeddings.position_ids")),
    "qwen2": _QWEN2,
    "qwen2_vl": _QWEN2,
    "qwen2_vl_text": _QWEN2,
}
"""Text encoders by the model_type of config.json."""
