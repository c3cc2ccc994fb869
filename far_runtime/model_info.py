"""What a manifest says of its network: the sizes that the sampling loops need, as one frozen dataclass per system."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar, get_type_hints

from far_runtime.errors import FarError

AGAIN = "export the bundle again"

Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the manifest says of a network, whatever its system."""

    grid: int
    """Cells of the latents along a side."""
    channels: int
    """Channels of the latents."""
    image_size: int
    """Pixels of a picture along a side."""
    condition: str = "labels"
    """What pictures are drawn from: "labels" or "text"."""
    classes: int = 0
    """Number of class labels; the null class, which stands for no class, is the next number. 0 with text."""
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The whole JSON object of the manifest, with what no loop reads: widths, depths, the VAE's settings."""

    @classmethod
    def read(cls: type[Record], record: Mapping[str, Any], source: str) -> Record:
        """From the JSON object `model` of the file `source`; FarError, naming file and key, for a missing or wrong
        value."""
        return _read(cls, record, f"{source}: model")

    @property
    def tokens(self) -> int:
        """Tokens of a picture, one for each cell of the latents."""
        return self.grid * self.grid

    @property
    def takes_text(self) -> bool:
        """Whether pictures are drawn from prompts, not from labels."""
        return self.condition == "text"

    def to_json(self) -> dict[str, Any]:
        """As it stands in manifest.json; entries that this version does not know are kept."""
        content = dict(self.record)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name != "record" and (entry.name in content or value != entry.default):
                content[entry.name] = _to_json(value, content.get(entry.name))
        return content


@dataclass(frozen=True, kw_only=True)
class DiffusionInfo(ModelInfo):
    """A network with a diffusion head."""

    prediction: str
    """What the head predicts: "epsilon" or "v"."""


@dataclass(frozen=True, kw_only=True)
class FarInfo(DiffusionInfo):
    """A FAR network."""

    masked: bool
    """Whether its encoder sees only some of the tokens."""


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How a text encoder's tokenizer turns prompts into rows of token ids."""

    tokens: int
    """Number of tokens that every prompt is padded or cut to."""
    prefix: tuple[int, ...]
    """Token ids of the system prompt, which stand before every prompt and whose features are dropped."""
    system_prompt: str = ""
    """The text whose token ids are `prefix`."""
    pad: int
    """Token id of the padding."""
    padding_side: str
    """Where the padding stands: "left" or "right" of the prompt."""


@dataclass(frozen=True, kw_only=True)
class FarT2iInfo(DiffusionInfo):
    """A FAR-T2I network."""

    masked: ClassVar[bool] = True
    """Its encoder always sees only some of the tokens."""
    context_tokens: int
    """Text tokens of every prompt."""
    context_width: int
    """Width of the text encoder's features."""
    text: TextSettings | None = None
    """How prompts become tokens; None in a bundle without a text encoder."""


@dataclass(frozen=True, kw_only=True)
class MarInfo(DiffusionInfo):
    """A MAR network."""


@dataclass(frozen=True, kw_only=True)
class VarInfo(ModelInfo):
    """A VAR network with the VQ-VAE whose codes it draws."""

    patch_nums: tuple[int, ...]
    """Side of every scale's token map in tokens, coarse to fine."""
    phis: int
    """Number of the VQ-VAE's convolutions that blend a scale's embeddings into the feature map."""
    vocabulary: int
    """Number of codes."""
    width: int
    """Width of the transformer."""
    depth: int
    """Number of its blocks."""
    heads: int
    """Attention heads of every block."""


MODEL_INFOS: dict[str, type[ModelInfo]] = {"far": FarInfo, "far_t2i": FarT2iInfo, "mar": MarInfo, "var": VarInfo}
"""What a system's loop is told of its network; `ModelInfo` for a system that is not named here."""


def model_info(system: str, record: Mapping[str, Any], source: str = "manifest.json") -> ModelInfo:
    """The network of a system from its JSON object; FarError as `ModelInfo.read` raises it."""
    return MODEL_INFOS.get(system, ModelInfo).read(record, source)


def _read(record_type: type[Record], record: Mapping[str, Any], where: str) -> Record:
    """A dataclass of this module from its JSON object; `where` names the object in errors."""
    if not isinstance(record, Mapping):
        raise FarError(f"{where} is {record!r}; expected an object; {AGAIN}")
    hints, values = get_type_hints(record_type), {}
    for entry in fields(record_type):  # type: ignore[arg-type]
        if entry.name == "record":
            values["record"] = dict(record)
        elif entry.name in record:
            values[entry.name] = _checked(hints[entry.name], record[entry.name], f"{where}.{entry.name}")
        elif entry.default is MISSING:
            raise FarError(f"{where} has no {entry.name!r}; {AGAIN}")
    return record_type(**values)


def _checked(hint: Any, value: Any, where: str) -> Any:
    """A value of the type `hint` from JSON; FarError for one of another type."""
    if hint == TextSettings | None:
        return None if value is None else _read(TextSettings, value, where)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if hint == tuple[int, ...] and isinstance(value, list | tuple) and all(type(number) is int for number in value):
        return tuple(value)
    names = {int: "a whole number", bool: "true or false", str: "a text", tuple[int, ...]: "a list of whole numbers"}
    raise FarError(f"{where} is {value!r}; expected {names[hint]}; {AGAIN}")


def _to_json(value: Any, before: Any) -> Any:
    """A value in JSON, in place of the value `before`: of an object, entries that this version does not know stay."""
    if isinstance(value, TextSettings):
        return {**(before or {}), **asdict(value), "prefix": list(value.prefix)}
    return list(value) if isinstance(value, tuple) else value
