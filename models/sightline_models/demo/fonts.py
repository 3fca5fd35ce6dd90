"""The typefaces that scenes are written in, split into those a model is trained on and those it never sees.

Knows font files that Python packages bring. Knows no pictures.
"""

import importlib.util
from functools import cache
from pathlib import Path

from PIL import ImageFont

AILERON = "aileron"
"""Pillow's own, which `ImageDraw.text` uses when no font is named."""

TRAINED = (
    AILERON,
    "matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf",
    "matplotlib/mpl-data/fonts/ttf/DejaVuSans-Bold.ttf",
    "matplotlib/mpl-data/fonts/ttf/DejaVuSansMono.ttf",
    "matplotlib/mpl-data/fonts/ttf/DejaVuSerif.ttf",
    "matplotlib/mpl-data/fonts/ttf/STIXGeneral.ttf",
    "matplotlib/mpl-data/fonts/ttf/STIXGeneralBol.ttf",
    "font_roboto/files/Roboto-Regular.ttf",
    "font_roboto/files/Roboto-Bold.ttf",
    "font_source_sans_pro/files/SourceSansPro-Regular.ttf",
    "font_source_sans_pro/files/SourceSansPro-Bold.ttf",
)
HELD_OUT = (
    "matplotlib/mpl-data/fonts/ttf/cmss10.ttf",
    "matplotlib/mpl-data/fonts/ttf/cmr10.ttf",
    "font_hanken_grotesk/files/HankenGrotesk-Regular.otf",
    "font_hanken_grotesk/files/HankenGrotesk-Bold.otf",
    "font_source_serif_pro/files/SourceSerifPro-Regular.ttf",
    "font_source_serif_pro/files/SourceSerifPro-Bold.ttf",
)
"""Other families than the trained ones, not only other weights."""


@cache
def load(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font by its name in the tuples above, ``size`` pixels an em.

    Raises ModuleNotFoundError, naming the fix, when the package that brings it isn't installed.
    """
    if name == AILERON:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font
    package, _, path = name.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"The fonts of {package} are not installed: pip install 'sightline[train]'")
    return ImageFont.truetype(Path(spec.submodule_search_locations[0], path), size)
