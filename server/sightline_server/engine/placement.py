"""How many engines a server has, and what each is told: its device, its share of the cores and of the cache.

Pure functions of settings. Knows no process, and no GPU but by name.
"""

from sightline_server import settings as settings_table
from sightline_server.engine.types import EngineInfo
from sightline_server.settings import Settings


def count_engines(settings: Settings) -> int:
    """Left open, one for each GPU that ``--device`` names: whether weights fit a machine twice is for people to say."""
    return settings.engines or len(settings.devices)


def settings_of(settings: Settings, engine: int, *, cores: int, first: EngineInfo | None = None) -> Settings:
    """What engine number ``engine`` (from 0) is loaded with.

    ``cores`` are those that all engines share. ``first`` is what the first engine found: with ``--device auto`` it
    decides for the others, which need it.
    """
    engines = count_engines(settings)
    if engines == 1:
        return settings
    return settings_table.replace(
        settings,
        engines=1,
        device=_device(settings, engine, first),
        # Deterministic engines choose for themselves: one thread.
        threads=settings.threads or (0 if settings.deterministic else max(1, cores // engines)),
        cpu_cache_gb=settings.cpu_cache_gb / engines,
        # All load the same weights.
        verify=settings.verify and engine == 0,
    )


def _device(settings: Settings, engine: int, first: EngineInfo | None) -> str:
    named = settings.devices
    if len(named) > 1:
        return named[engine]
    if named[0] == "auto" and engine:
        assert first is not None, "with --device auto the first engine says what there is"
        return f"cuda:{engine}" if first.on_gpu else "cpu"
    return f"cuda:{engine}" if named[0] == "cuda" else named[0]
