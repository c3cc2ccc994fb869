"""`far build` for engines that compile when they load a graph and keep what they compiled."""

from __future__ import annotations

from collections.abc import Callable

from far_runtime.bundle import Bundle
from far_runtime.engines import open_engine
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.cache.entry import CachedEngine
from far_runtime.errors import FarError, SettingName


def compile_ahead(bundle: Bundle, name: str, options: EngineOptions, report: Callable[[str], None]) -> None:
    """Compile every graph of a bundle into the engine cache, by the engine's method `compile(report)`.

    report: called with a line of text for every graph, and one at the end. FarError for an engine without a cache.
    """
    engine = open_engine(bundle, name, options)
    try:
        compile_all = getattr(engine, "compile", None)
        if compile_all is None:
            raise FarError(
                SettingName("engine"), f" {name}: keeps nothing that was compiled, so there is nothing to build ahead"
            )
        cached: CachedEngine = compile_all(report)
        report(f"{cached.path}: {cached.size / 1e6:.1f} MB, built in {cached.seconds:.1f} s")
    finally:
        engine.close()
