"""Systems that can be exported: which stages a model has and what its manifest says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from far_export.stages import far, far_t2i, mar, vae, var
from far_export.stages.stage import Stage
from far_runtime.model_info import FarInfo, FarT2iInfo, MarInfo, ModelInfo
from far_runtime.sampling import far_t2i as far_t2i_loop
from far_runtime.sampling.far import plan


@dataclass(frozen=True)
class System:
    """One system's part of the exporter.

    vae: the system of the checkpoint that makes pictures of what it draws. stages(model, vae, info, settings): its
    stages; with resolved sampling settings, the graphs that may have a step's constants folded in do. info(model, vae):
    the manifest's `model`. editing: the stages that `far edit` needs beside. draws_tokens: whether the loop draws from
    a vocabulary, so that a small error may change what is drawn.
    """

    name: str
    vae: str
    stages: Callable[[nn.Module, nn.Module, Any, Mapping[str, Any] | None], list[Stage]]
    editing: Callable[[nn.Module, nn.Module, Any], list[Stage]]
    info: Callable[[nn.Module, nn.Module], ModelInfo]
    draws_tokens: bool = False


def _far_stages(model: nn.Module, decoder: nn.Module, info: Any, settings: Mapping[str, Any] | None) -> list[Stage]:
    steps = None if settings is None else plan(info, settings)
    return [*far.stages(model, steps), vae.decode_stage(decoder, model.config.grid, model.config.latent_scale)]


def _far_editing(model: nn.Module, decoder: nn.Module, info: Any) -> list[Stage]:
    return [far.place_stage(model.config), *_encode(model, decoder, info)]


def _encode(model: nn.Module, decoder: nn.Module, info: Any) -> list[Stage]:
    return [vae.encode_stage(decoder, model.config.grid, model.config.latent_scale)]


def _far_t2i_stages(model: nn.Module, decoder: nn.Module, info: Any, settings: Mapping[str, Any] | None) -> list[Stage]:
    steps = None if settings is None else far_t2i_loop.plan(info, settings)
    return [*far_t2i.stages(model, steps), vae.decode_stage(decoder, model.config.grid, model.config.latent_scale)]


def _mar_stages(model: nn.Module, decoder: nn.Module, info: Any, settings: Mapping[str, Any] | None) -> list[Stage]:
    return [*mar.stages(model), vae.decode_stage(decoder, model.config.grid, model.config.latent_scale)]


def _var_stages(model: nn.Module, decoder: nn.Module, info: Any, settings: Mapping[str, Any] | None) -> list[Stage]:
    return var.stages(model, decoder)


def _var_editing(model: nn.Module, decoder: nn.Module, info: Any) -> list[Stage]:
    return var.editing_stages(model, decoder)


def _info(kind: type[ModelInfo], condition: str = "labels") -> Callable[[nn.Module, nn.Module], ModelInfo]:
    """What the manifest says of a model with a KL-VAE."""

    def info(model: nn.Module, decoder: nn.Module) -> ModelInfo:
        config = model.config
        image_size = config.grid * decoder.config.stride
        record = {"condition": condition, "image_size": image_size, "vae": asdict(decoder.config)}
        return kind.read({**asdict(config), **record}, "the checkpoint")

    return info


SYSTEMS = {
    "far": System("far", "klvae", _far_stages, _far_editing, _info(FarInfo)),
    "far_t2i": System("far_t2i", "klvae", _far_t2i_stages, _far_editing, _info(FarT2iInfo, "text")),
    "mar": System("mar", "klvae", _mar_stages, _encode, _info(MarInfo)),
    "var": System("var", "vqvae", _var_stages, _var_editing, var.var_info, draws_tokens=True),
}
