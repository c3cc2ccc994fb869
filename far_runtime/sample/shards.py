"""Shards as files: WebDataset tars and parquet."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from far_runtime.errors import FarError
from far_runtime.images.metadata import PictureMetadata


@dataclass(frozen=True)
class Sample:
    """A picture in a shard: its key, its PNG file (with the settings in it) and its settings."""

    key: str
    png: bytes
    settings: PictureMetadata


def packed(format: str, samples: Sequence[Sample]) -> bytes:
    """The file of a shard. The same samples make the same bytes.

    webdataset: a tar of KEY.png and KEY.json (the settings). parquet: a row a sample: key, png, seed, label, text (the
    class's name, or the prompt), settings (JSON).
    """
    return _parquet(samples) if format == "parquet" else _tar(samples)


def found_keys(format: str, path: Path) -> list[str] | None:
    """The keys of the samples in a shard's file; None where there is no file, or a damaged one."""
    try:
        if format == "parquet":
            table = pyarrow_parquet().read_table(path, columns=["key"], memory_map=True)
            return [str(key) for key in table.column("key").to_pylist()]
        with tarfile.open(path) as tar:
            names = tar.getnames()
    except (OSError, ValueError, EOFError, tarfile.TarError):
        return None
    keys = [name.removesuffix(".png") for name in names[::2]]
    return keys if names == [f"{key}.{kind}" for key in keys for kind in ("png", "json")] else None


def check_format(format: str) -> None:
    """FarError where its library is missing."""
    if format == "parquet":
        pyarrow_parquet()


def pyarrow_parquet() -> Any:
    """The module; FarError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise FarError(
            "--format parquet needs pyarrow; install it with: pip install pyarrow, or use webdataset"
        ) from error
    return pyarrow.parquet


def _tar(samples: Sequence[Sample]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for kind, data in (("png", sample.png), ("json", json.dumps(sample.settings.to_dict()).encode())):
                member = tarfile.TarInfo(f"{sample.key}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def _parquet(samples: Sequence[Sample]) -> bytes:
    parquet = pyarrow_parquet()
    import pyarrow

    settings = [sample.settings for sample in samples]
    columns = {
        "key": pyarrow.array([sample.key for sample in samples], pyarrow.string()),
        "png": pyarrow.array([sample.png for sample in samples], pyarrow.binary()),
        "seed": pyarrow.array([one.seed for one in settings], pyarrow.uint64()),
        "label": pyarrow.array([one.label for one in settings], pyarrow.int32()),
        "text": pyarrow.array([one.name for one in settings], pyarrow.string()),
        "settings": pyarrow.array([json.dumps(one.to_dict()) for one in settings], pyarrow.string()),
    }
    file = pyarrow.BufferOutputStream()
    # The pictures are packed already.
    parquet.write_table(pyarrow.table(columns), file, compression={**dict.fromkeys(columns, "zstd"), "png": "none"})
    return file.getvalue().to_pybytes()  # type: ignore[no-any-return]
