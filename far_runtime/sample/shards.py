"""Shards as files: WebDataset tars and parquet."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from far_runtime.errors import FarError, SettingName
from far_runtime.images.metadata import PictureMetadata


@dataclass(frozen=True)
class Sample:
    """A picture in a shard."""

    key: str
    """Its name."""

    png: bytes
    """Its PNG file, with the settings in it."""

    settings: PictureMetadata
    """What it was made with."""


def pack_shard(format: str, samples: Sequence[Sample]) -> bytes:
    """The content of a shard's file; the same samples make the same bytes.

    webdataset: a tar of KEY.png and KEY.json (the settings).
    parquet: a row per sample, with key, png, seed, label, text (the name of the class, or the prompt), settings (JSON).
    """
    return _pack_parquet(samples) if format == "parquet" else _pack_tar(samples)


def read_keys(format: str, path: Path) -> list[str] | None:
    """The keys of the samples in a shard's file; None if the file is missing or damaged."""
    try:
        if format == "parquet":
            table = import_parquet().read_table(path, columns=["key"], memory_map=True)
            return [str(key) for key in table.column("key").to_pylist()]
        with tarfile.open(path) as tar:
            names = tar.getnames()
    except (OSError, ValueError, EOFError, tarfile.TarError):
        return None
    keys = [name.removesuffix(".png") for name in names[::2]]
    return keys if names == [f"{key}.{suffix}" for key in keys for suffix in ("png", "json")] else None


def check_format(format: str) -> None:
    """Raise FarError if the library that writes this format is missing."""
    if format == "parquet":
        import_parquet()


def import_parquet() -> Any:
    """The module pyarrow.parquet; raises FarError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise FarError(
            SettingName("format"), " parquet needs pyarrow; install it with: pip install pyarrow, or use webdataset"
        ) from error
    return pyarrow.parquet


def _pack_tar(samples: Sequence[Sample]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for suffix, data in (("png", sample.png), ("json", json.dumps(sample.settings.to_dict()).encode())):
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def _pack_parquet(samples: Sequence[Sample]) -> bytes:
    parquet = import_parquet()
    import pyarrow

    metadata = [sample.settings for sample in samples]
    columns = {
        "key": pyarrow.array([sample.key for sample in samples], pyarrow.string()),
        "png": pyarrow.array([sample.png for sample in samples], pyarrow.binary()),
        "seed": pyarrow.array([settings.seed for settings in metadata], pyarrow.uint64()),
        "label": pyarrow.array([settings.label for settings in metadata], pyarrow.int32()),
        "text": pyarrow.array([settings.name for settings in metadata], pyarrow.string()),
        "settings": pyarrow.array([json.dumps(settings.to_dict()) for settings in metadata], pyarrow.string()),
    }
    file = pyarrow.BufferOutputStream()
    # PNG files do not become smaller.
    parquet.write_table(pyarrow.table(columns), file, compression={**dict.fromkeys(columns, "zstd"), "png": "none"})
    return file.getvalue().to_pybytes()  # type: ignore[no-any-return]
