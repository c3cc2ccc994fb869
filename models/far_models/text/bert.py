"""BERT's encoder with Hugging Face's parameter names; MiniLM and most sentence-transformers are such networks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from far_models.text.qwen2 import attend_allowed


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT."""

    vocabulary: int
    """Token ids."""
    width: int
    depth: int
    heads: int
    hidden: int
    """Hidden width of the MLPs."""
    positions: int
    """The largest number of tokens of a text."""
    types: int = 2
    """Rows of the token type embedding, of which the first is used."""
    eps: float = 1e-12
    """Of the norms."""


class BertEmbeddings(nn.Module):
    """Token ids [B, n] -> [B, n, width]: the norm of word, position and type embeddings; all types are 0."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary, config.width)
        self.position_embeddings = nn.Embedding(config.positions, config.width)
        self.token_type_embeddings = nn.Embedding(config.types, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: ids.shape[1]] + self.token_type_embeddings.weight[0]
        out: Tensor = self.LayerNorm(self.word_embeddings(ids) + positions)
        return out


class BertLayer(nn.Module):
    """Post-norm transformer layer over x [B, n, width] with the attention mask `allowed` [B, 1, 1, n]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, hidden, eps = config.width, config.hidden, config.eps
        self.heads = config.heads
        projections = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(projections), "output": output(width, width, eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = output(hidden, width, eps)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        attention, projections = self.attention["output"], self.attention["self"]
        q, k, v = (
            projections[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
        )
        attended = attend_allowed(q, k, v, allowed).transpose(1, 2).flatten(2)
        x = attention["LayerNorm"](x + attention["dense"](attended))
        hidden = nn.functional.gelu(self.intermediate["dense"](x))
        out: Tensor = self.output["LayerNorm"](x + self.output["dense"](hidden))
        return out


def output(width_in: int, width: int, eps: float) -> nn.ModuleDict:
    """The projection and the norm at the end of each half of a layer."""
    return nn.ModuleDict({"dense": nn.Linear(width_in, width), "LayerNorm": nn.LayerNorm(width, eps=eps)})


class Bert(nn.Module):
    """Token ids and mask [B, n] -> last hidden states [B, n, width]; no token attends to those whose mask is 0."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(config) for _ in range(config.depth))})

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x: Tensor = self.embeddings(ids)
        allowed = (mask != 0)[:, None, None, :]
        for layer in self.encoder["layer"]:
            x = layer(x, allowed)
        return x
