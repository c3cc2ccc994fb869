"""Sources of the emoji pictures: pinned npm packages, their licences, and how their files name an emoji."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from far_runtime.errors import FarError


@dataclass(frozen=True)
class Package:
    """One npm package."""

    name: str
    version: str

    integrity: str
    """The registry's SHA-512 of the tarball, checked before anything is read."""

    licence: str

    credit: str
    """Credit line of its authors."""

    @property
    def tarball(self) -> str:
        """File name that `npm pack` gives the tarball."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "MIT",
    "Emojibase by Miles Johnson",
)

# Order is the style id that goes into styles.npy: append, never reorder.
STYLES: dict[str, Package] = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Noto Emoji by Google Inc",
    ),
    "noto-v1": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Noto Emoji (first drawings) by Google Inc",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twemoji, copyright Twitter, Inc and other contributors",
    ),
    "fluent-flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Fluent Emoji by Microsoft Corporation",
    ),
    "fluent-3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "MIT",
        "Fluent Emoji 3D by Microsoft Corporation, packed by LobeHub",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "Emoji One (EmojiTwo) by its contributors",
    ),
    "fxemoji": Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Apache-2.0",
        "FxEmojis by Mozilla",
    ),
}


def verify_integrity(path: Path, package: Package) -> None:
    """Raise FarError unless the file's sha512 is the pinned one."""
    found = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != package.integrity:
        raise FarError(
            f"{path} is not {package.name}@{package.version}: expected {package.integrity}, found {found}; "
            "delete the file and run again"
        )


def fetch(package: Package, cache: Path) -> Path:
    """Path of the package's tarball in `cache`, downloaded by `npm pack` if missing; its integrity is checked."""
    target = cache / package.tarball
    if not target.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise FarError(
                f"npm was not found and {target} is not there; install Node.js (npm), or put the file there "
                f"(npm pack {package.name}@{package.version})"
            )
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".npm-") as folder:
            done = subprocess.run(
                [npm, "pack", f"{package.name}@{package.version}", "--pack-destination", folder],
                capture_output=True,
                text=True,
            )
            fetched = Path(folder) / package.tarball
            if done.returncode or not fetched.exists():
                raise FarError(
                    f"npm pack {package.name}@{package.version} failed: {npm_reason(done.stderr)}; "
                    f"check the connection to the npm registry, or put the file at {target}"
                )
            verify_integrity(fetched, package)
            os.replace(fetched, target)
    verify_integrity(target, package)
    return target


def npm_reason(stderr: str) -> str:
    """The error lines of npm, without its warnings and the path of its log."""
    lines = [line.removeprefix("npm error").strip() for line in stderr.splitlines() if line.startswith("npm error")]
    return " ".join(line for line in lines if line and "complete log" not in line)[:300] or "no reason given"


def read_members(tarball: Path, names: Iterable[str] | None = None, suffix: str = "") -> dict[str, bytes]:
    """Files of a tarball by their path in the package, those named or with `suffix`; nothing is unpacked."""
    wanted = None if names is None else set(names)
    files: dict[str, bytes] = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            keep = name in wanted if wanted is not None else name.endswith(suffix)
            stream = archive.extractfile(member) if keep and member.isfile() else None
            if stream is not None:
                files[name] = stream.read()
    missing = sorted(wanted - files.keys()) if wanted is not None else []
    if missing:
        raise FarError(f"{tarball} lacks {', '.join(missing)}; delete the file and run again")
    return files


def hex_key(text: str) -> str:
    """One spelling of a hexcode: '2764-FE0F-200D-1F525' -> '2764-200d-1f525' (no leading zeros or variation signs)."""
    parts = [part.lower().lstrip("0") for part in text.split("-")]
    return "-".join(part for part in parts if part != "fe0f")


def slug(text: str) -> str:
    """Letters and digits of a name, e.g. 'Smiling Face with Heart-Eyes' -> 'smilingfacewithhearteyes'."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return "".join(letter for letter in plain if letter.isalnum())


def unicode_name(key: str) -> str | None:
    """Name of a single code point in the Unicode standard."""
    try:
        return unicodedata.name(chr(int(key, 16)))
    except ValueError:
        return None
