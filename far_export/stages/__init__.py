"""The systems that can be exported: which stages a model has, and what the loop is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from far_export.stages import far, far_t2i, mar, vae, var, var_editing
from far_export.stages.stage import Stage
from far_runtime.model_info import FarInfo, FarT2iInfo, MarInfo, ModelInfo
from far_runtime.sampling import far_t2i as far_t2i_loop
from far_runtime.sampling.far import plan


@dataclass(frozen=True)
class System:
    """How the models of one system are exported."""

    name: str
    """The name in the manifest, and the key in SYSTEMS."""

    vae: str
    """The system of the VAE's checkpoint: "klvae" or "vqvae"."""

    stages: Callable[[nn.Module, nn.Module, Any, Mapping[str, Any] | None], list[Stage]]
    """stages(model, vae, info, settings): those that a picture is drawn with. With resolved sampling settings, a system
    with levels gets one transformer graph per step, with the step's constants folded in."""

    editing: Callable[[nn.Module, nn.Module, Any], list[Stage]]
    """editing(model, vae, info): the stages that only `far edit` needs."""

    info: Callable[[nn.Module, nn.Module], ModelInfo]
    """info(model, vae): the manifest's `model`."""

    draws_tokens: bool = False
    """Whether the loop draws from a vocabulary, so that a small error may change what is drawn."""


def _far_stages(model: nn.Module, decoder: nn.Module, info: Any, settings: Mapping[str, Any] | None) -> list[Stage]:
    steps = None if settings is None else plan(info, settings)
    return [*far.stages(model, steps), _decode(model, decoder)]


def _far_editing(model: nn.Module, decoder: nn.Module, info: Any) -> list[Stage]:
    return [far.place_stage(model.config), *_encode(model, decoder, info)]


def _encode(model: nn.Module, decoder: nn.Module, info: Any) -> list[Stage]:
    return [vae.encode_stage(decoder, model.config.grid, model.config.latent_scale)]


def _decode(model: nn.Module, decoder: nn.Module) -> Stage:
    return vae.decode_stage(decoder, model.config.grid, model.config.latent_scale)


def _far_t2i_stages(model: nn.Module, decoder: nn.Module, info: Any, settings: Mapping[str, Any] | None) -> list[Stage]:
    steps = None if settings is None else far_t2i_loop.plan(info, settings)
    return [*far_t2i.stages(model, steps), _decode(model, decoder)]


def _mar_stages(model: nn.Module, decoder: nn.Module, info: Any, settings: Mapping[str, Any] | None) -> list[Stage]:
    return [*mar.stages(model), _decode(model, decoder)]


def _var_stages(model: nn.Module, decoder: nn.Module, info: Any, settings: Mapping[str, Any] | None) -> list[Stage]:
    return var.stages(model, decoder)


def _var_editing(model: nn.Module, decoder: nn.Module, info: Any) -> list[Stage]:
    return var_editing.editing_stages(model, decoder)


def _info(info_type: type[ModelInfo], condition: str = "labels") -> Callable[[nn.Module, nn.Module], ModelInfo]:
    """What the manifest says of a model with a KL-VAE."""

    def info(model: nn.Module, decoder: nn.Module) -> ModelInfo:
        config = model.config
        image_size = config.grid * decoder.config.stride
        record = {"condition": condition, "image_size": image_size, "vae": asdict(decoder.config)}
        return info_type.read({**asdict(config), **record}, "the checkpoint")

    return info


SYSTEMS = {
    system.name: system
    for system in (
        System(name="far", vae="klvae", stages=_far_stages, editing=_far_editing, info=_info(FarInfo)),
        System(
            name="far_t2i", vae="klvae", stages=_far_t2i_stages, editing=_far_editing, info=_info(FarT2iInfo, "text")
        ),
        System(name="mar", vae="klvae", stages=_mar_stages, editing=_encode, info=_info(MarInfo)),
        System(name="var", vae="vqvae", stages=_var_stages, editing=_var_editing, info=var.var_info, draws_tokens=True),
    )
}
