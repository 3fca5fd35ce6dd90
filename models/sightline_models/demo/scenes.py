"""Pictures drawn by dice: coloured shapes, numbers, words and receipts, with the truth about them.

Knows pictures and what is on them. Knows no questions (`questions.py`), no labels a model trains on (`labels.py`) and
no torch.

A scene is drawn from a seed alone. All positions are fractions of the picture's width and height, so they hold whatever
size and aspect ratio the picture has and however it is resized.
"""

import io
import math
import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sightline_models.demo import fonts as font_files
from sightline_models.demo import words as word_lists

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond")

RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as fractions of the picture's width and height."""

COLORS: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 20, 40), (200, 30, 30), (235, 50, 40)),
    "green": ((0, 128, 0), (0, 200, 0), (34, 139, 34), (0, 255, 0), (60, 180, 75)),
    "blue": ((0, 0, 255), (30, 80, 220), (20, 40, 170), (40, 100, 240)),
    "yellow": ((255, 255, 0), (250, 215, 30), (255, 235, 60)),
    "orange": ((255, 165, 0), (255, 120, 0), (240, 135, 25)),
    "purple": ((128, 0, 128), (140, 40, 180), (105, 30, 165)),
    "pink": ((255, 192, 203), (255, 105, 180), (255, 150, 190)),
    "cyan": ((0, 255, 255), (0, 205, 215), (70, 225, 235)),
    "brown": ((139, 69, 19), (120, 72, 35), (150, 90, 50)),
    "black": ((0, 0, 0), (30, 30, 30)),
    "white": ((255, 255, 255), (240, 240, 240)),
    "gray": ((128, 128, 128), (155, 155, 155), (105, 105, 105)),
}
"""What each name looks like. Shades in between are drawn by adding a little noise."""


@dataclass(frozen=True)
class Thing:
    """One shape on a picture."""

    color: str
    shape: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Text:
    """One run of characters: a number, a word, or one column of a receipt's row."""

    text: str
    row: int
    """From the top."""
    boxes: tuple[Box, ...]
    """One a character."""


@dataclass(frozen=True)
class Scene:
    """What is on a picture."""

    kind: str
    """One of ``KINDS``."""
    background: str
    things: tuple[Thing, ...] = ()
    texts: tuple[Text, ...] = ()
    """In reading order."""
    ink: str = ""
    aspect: float = 1.0
    """Width over height."""


KINDS = ("shapes", "number", "numbers", "word", "receipt")


@dataclass(frozen=True)
class Look:
    """How pictures may look: what is varied, and what is held out."""

    fonts: tuple[str, ...] = font_files.TRAINED
    words: tuple[str, ...] = word_lists.TRAINED
    items: tuple[str, ...] = word_lists.ITEMS
    colors: tuple[str, ...] = tuple(COLORS)
    made_up_words: float = 0.4
    """Share of words that are letters thrown together."""
    odd_items: float = 0.25
    """Share of a receipt's items that are any word, made-up ones among them."""
    square: float = 0.5
    """Share of pictures that are square; the others are up to twice as wide as high, or as high as wide."""
    effects: bool = True
    """Light, shadows, outlines, blur, noise, slight rotation, JPEG artefacts."""
    sides: tuple[int, int] = (176, 288)
    """Pixels of the shorter edge, from and to."""
    weights: tuple[float, ...] = field(default=(0.52, 0.1, 0.14, 0.12, 0.12))
    """Shares of ``KINDS``."""


TRAINED = Look()
FULL = Look(sides=(240, 640), made_up_words=0, odd_items=0)
"""What a model is judged on: as trained, in the sizes that people's files have."""
PLAIN = Look(
    sides=(384, 384),
    square=1,
    effects=False,
    made_up_words=0,
    odd_items=0,
    colors=tuple(c for c in COLORS if c != "brown"),
)
"""Clean square pictures of 384 pixels."""


def draw(rng: random.Random, look: Look = TRAINED, kind: str | None = None) -> tuple[Image.Image, Scene]:
    """An RGB picture and the truth about it."""
    kind = kind or rng.choices(KINDS, look.weights)[0]
    short = rng.randint(*look.sides)
    aspect = 1.0 if rng.random() < look.square else math.exp(rng.uniform(-math.log(2), math.log(2)))
    size = (round(short * aspect), short) if aspect >= 1 else (short, round(short / aspect))
    names = list(look.colors)
    background = "white" if rng.random() < 0.4 else rng.choice(names)
    canvas = _Canvas(rng, size, background, look.effects)
    scene = _shapes(rng, canvas, look) if kind == "shapes" else _writing(rng, canvas, look, kind)
    return canvas.finished(), scene


class _Canvas:
    """A picture in the making, with the light and wear it will get."""

    def __init__(self, rng: random.Random, size: tuple[int, int], background: str, effects: bool) -> None:
        self.rng, self.size, self.background, self.effects = rng, size, background, effects
        self.paper = shade(rng, background)
        self.image = Image.new("RGB", size, self.paper)
        if effects and rng.random() < 0.3:
            self.image = _gradient(rng, size, self.paper)
        self.draw = ImageDraw.Draw(self.image)
        self.outlined = effects and rng.random() < 0.2
        self.shadowed = effects and rng.random() < 0.15
        self.glossy = effects and rng.random() < 0.2

    @property
    def aspect(self) -> float:
        return self.size[0] / self.size[1]

    def fraction(self, box: tuple[float, float, float, float]) -> Box:
        """A box in pixels as a box in fractions, cut to the picture."""
        w, h = self.size
        left, top, right, bottom = (box[0] / w, box[1] / h, box[2] / w, box[3] / h)
        return max(left, 0.0), max(top, 0.0), min(right, 1.0), min(bottom, 1.0)

    def finished(self) -> Image.Image:
        """The picture as a camera or a file format would leave it."""
        rng, image = self.rng, self.image
        if not self.effects:
            return image
        if rng.random() < 0.15:
            image = image.rotate(rng.uniform(-1, 1), Image.Resampling.BILINEAR, fillcolor=self.paper)
        if rng.random() < 0.15:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
        if rng.random() < 0.35:
            image = _light(rng, image)
        if rng.random() < 0.3:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=rng.randint(35, 92))
            image = Image.open(file).convert("RGB")
        return image


def shade(rng: random.Random, name: str) -> RGB:
    """One of the shades that go by a colour's name."""
    base = rng.choice(COLORS[name])
    spread = 4 if name in ("black", "white", "gray") else 14
    # Grays stay grey: their channels move together.
    moves = [rng.randint(-spread, spread)] * 3 if spread == 4 else [rng.randint(-spread, spread) for _ in range(3)]
    red, green, blue = (min(255, max(0, value + move)) for value, move in zip(base, moves, strict=True))
    return red, green, blue


def _gradient(rng: random.Random, size: tuple[int, int], color: RGB) -> Image.Image:
    corners = np.array([rng.uniform(0.88, 1.08) for _ in range(4)]).reshape(2, 2, 1)
    small = np.clip(corners * np.array(color), 0, 255).astype(np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)


def _light(rng: random.Random, image: Image.Image) -> Image.Image:
    """Uneven light, a slight cast of colour and the sensor's noise."""
    dice = np.random.default_rng(rng.getrandbits(32))
    pixels = np.asarray(image, np.float32)
    across = np.linspace(rng.uniform(0.85, 1.05), rng.uniform(0.85, 1.05), image.width, dtype=np.float32)
    down = np.linspace(rng.uniform(0.9, 1.05), rng.uniform(0.9, 1.05), image.height, dtype=np.float32)
    cast = np.array([rng.uniform(0.96, 1.04) for _ in range(3)], np.float32)
    noise = dice.standard_normal((image.height, image.width, 1), np.float32) * rng.uniform(0, 10)
    pixels = pixels * (across[None, :, None] * down[:, None, None] * cast) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


# ---- shapes -------------------------------------------------------------------------------------------------------


def _shapes(rng: random.Random, canvas: _Canvas, look: Look) -> Scene:
    count = rng.choices((1, 2, 3, 4, 5, 6), (0.16, 0.24, 0.24, 0.16, 0.11, 0.09))[0]
    names = [name for name in look.colors if distinct(name, canvas.background)]
    # Few colours and few shapes, now and then, so that things share one and only both together tell them apart.
    if rng.random() < 0.4:
        names = rng.sample(names, 2)
    shapes = rng.sample(SHAPES, 2) if rng.random() < 0.3 else list(SHAPES)
    things: list[Thing] = []
    taken: list[tuple[float, float, float, float]] = []
    largest = (0.4, 0.27, 0.24, 0.2, 0.17, 0.15)[count - 1]
    while len(things) < count:
        placed = _place(rng, canvas.size, taken, largest)
        if placed is None:
            largest *= 0.85
            continue
        x, y, radius = placed
        color, shape = rng.choice(names), rng.choice(shapes)
        box = _paint(rng, canvas, shape, shade(rng, color), x, y, radius)
        taken.append(box)
        things.append(Thing(color, shape, canvas.fraction(box)))
    things.sort(key=lambda thing: thing.center[0])
    return Scene("shapes", canvas.background, tuple(things), aspect=canvas.aspect)


def _place(
    rng: random.Random, size: tuple[int, int], taken: list[tuple[float, float, float, float]], largest: float
) -> tuple[float, float, float] | None:
    """A free place (x, y, radius in pixels), or None when a few throws found none."""
    width, height = size
    for _ in range(30):
        radius = rng.uniform(0.075, largest) * min(size) if largest > 0.075 else largest * min(size)
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        gap = 0.03 * min(size)
        if all(
            x + radius + gap < left or x - radius - gap > right or y + radius + gap < top or y - radius - gap > bottom
            for left, top, right, bottom in taken
        ):
            return x, y, radius
    return None


_Point = tuple[float, float]


def _polygon(rng: random.Random, shape: str) -> list[_Point]:
    """A shape's corners in a unit circle, before it is turned."""
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "diamond":
        narrow = rng.uniform(0.65, 1.0)
        return [(0, -1), (narrow, 0), (0, 1), (-narrow, 0)]
    if shape == "triangle":
        half = rng.uniform(0.8, 1.0)
        corners = [(0.0, -0.95), (half, 0.85), (-half, 0.85)]
        return [(x, -y) for x, y in corners] if rng.random() < 0.15 else corners
    if shape == "cross":
        arm = rng.uniform(0.25, 0.38)
        return [
            (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
            (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
        ]  # fmt: skip
    assert shape == "star"
    inner = rng.uniform(0.38, 0.5)
    angles = [math.pi * (index / 5 - 0.5) for index in range(10)]
    return [
        ((inner if index % 2 else 1) * math.cos(angle), (inner if index % 2 else 1) * math.sin(angle))
        for index, angle in enumerate(angles)
    ]


def _paint(
    rng: random.Random, canvas: _Canvas, shape: str, color: RGB, x: float, y: float, radius: float
) -> tuple[float, float, float, float]:
    """Draw one shape and return its box in pixels."""
    dark = (int(color[0] * 0.55), int(color[1] * 0.55), int(color[2] * 0.55))
    line = max(1, round(radius * 0.08)) if canvas.outlined else 0
    offset = radius * 0.12
    paper = canvas.paper
    shadow = (int(paper[0] * 0.75), int(paper[1] * 0.75), int(paper[2] * 0.75))
    if shape in ("circle", "ring"):
        box = (x - radius, y - radius, x + radius, y + radius)
        thick = round(radius * rng.uniform(0.28, 0.45)) if shape == "ring" else 0
        moved = (box[0] + offset, box[1] + offset, box[2] + offset, box[3] + offset)
        if shape == "ring":
            if canvas.shadowed:
                canvas.draw.ellipse(moved, outline=shadow, width=thick)
            canvas.draw.ellipse(box, outline=color, width=thick)
            return box
        if canvas.shadowed:
            canvas.draw.ellipse(moved, fill=shadow)
        canvas.draw.ellipse(box, fill=color, outline=dark if line else None, width=line or 1)
        if canvas.glossy:
            light = (color[0] // 2 + 127, color[1] // 2 + 127, color[2] // 2 + 127)
            spot, at = radius * 0.18, radius * 0.35
            canvas.draw.ellipse((x - at - spot, y - at - spot, x - at + spot, y - at + spot), fill=light)
        return box
    turn = math.radians(rng.uniform(-12, 12)) if rng.random() < 0.4 else 0.0
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
    corners = [(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in _polygon(rng, shape)]
    if canvas.shadowed:
        canvas.draw.polygon([(px + offset, py + offset) for px, py in corners], fill=shadow)
    canvas.draw.polygon(corners, fill=color, outline=dark if line else None, width=line or 1)
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


_ALIKE = {
    frozenset(pair)
    for pair in (
        ("white", "yellow"), ("white", "pink"), ("white", "cyan"), ("black", "brown"), ("black", "purple"),
        ("black", "blue"), ("red", "brown"), ("orange", "brown"), ("orange", "yellow"), ("orange", "red"),
        ("blue", "purple"), ("gray", "brown"), ("gray", "green"), ("gray", "pink"), ("red", "pink"),
    )
}  # fmt: skip


def distinct(one: str, other: str) -> bool:
    """Whether people tell a thing of one colour on a ground of the other at a glance, whatever the shades."""
    return one != other and frozenset((one, other)) not in _ALIKE


# ---- writing ------------------------------------------------------------------------------------------------------


def _writing(rng: random.Random, canvas: _Canvas, look: Look, kind: str) -> Scene:
    inks = [name for name in look.colors if distinct(name, canvas.background)]
    ink = "black" if "black" in inks and rng.random() < 0.4 else rng.choice(inks)
    color, font = shade(rng, ink), rng.choice(look.fonts)
    if kind == "receipt":
        texts = _receipt(rng, canvas, look, font, color)
    else:
        if kind == "number":
            lines = [str(_number(rng, rng.choice((1, 2, 3, 3, 4, 4))))]
        elif kind == "word":
            lines = [_word(rng, look)]
        else:
            digits = (1, 2, 2) if rng.random() < 0.7 else (1, 1, 2)
            lines = [str(_number(rng, rng.choice(digits))) for _ in range(2 if rng.random() < 0.7 else 3)]
        texts = _lines(rng, canvas, font, color, lines)
    return Scene(kind, canvas.background, texts=tuple(texts), ink=ink, aspect=canvas.aspect)


def _number(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def _word(rng: random.Random, look: Look) -> str:
    if rng.random() < look.made_up_words:
        return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(2, 6)))
    return rng.choice(look.words)


def _lines(rng: random.Random, canvas: _Canvas, font: str, color: RGB, lines: list[str]) -> list[Text]:
    """Lines under one another, or two short ones side by side, as large as fits in a share thrown by dice."""
    width, height = canvas.size
    beside = len(lines) == 2 and rng.random() < 0.25
    columns, rows = (2, 1) if beside else (1, len(lines))
    cell_width, cell_height = width / columns, height / rows
    fill = rng.uniform(0.55, 0.92)
    size = min(_fitting(font, line, cell_width * fill, cell_height * 0.8) for line in lines)
    size = max(size, 8)
    texts = []
    for index, line in enumerate(lines):
        left, top = (index * cell_width, 0.0) if beside else (0.0, index * cell_height)
        room_x = cell_width - _extent(font, size, line)[0]
        room_y = cell_height - _extent(font, size, line)[1]
        x = left + room_x * rng.uniform(0.15, 0.85)
        y = top + room_y * rng.uniform(0.15, 0.85)
        texts.append(_write(canvas, font, size, color, line, x, y, 0 if beside else index))
    return texts


def _receipt(rng: random.Random, canvas: _Canvas, look: Look, font: str, color: RGB) -> list[Text]:
    """Rows of an item and a whole price, most often with their total below."""
    width, height = canvas.size
    items = rng.sample(look.items, rng.choice((2, 2, 3, 3, 4)))
    items = [_word(rng, look) if rng.random() < look.odd_items else item for item in items]
    items = list(dict.fromkeys(items))
    prices = [rng.randint(1, 9) if rng.random() < 0.6 else rng.randint(10, 19) for _ in items]
    if rng.random() < 0.75:
        items, prices = [*items, "TOTAL"], [*prices, sum(prices)]
    row = height / len(items)
    size = min(_fitting(font, f"{item} 00", width * 0.9, row * 0.72) for item in items)
    size = max(size, 8)
    left, right = width * rng.uniform(0.03, 0.06), width * rng.uniform(0.94, 0.97)
    texts = []
    for index, (item, price) in enumerate(zip(items, prices, strict=True)):
        y = row * index + (row - _extent(font, size, item)[1]) / 2
        texts.append(_write(canvas, font, size, color, item, left, y, index))
        x = right - _extent(font, size, str(price))[0]
        texts.append(_write(canvas, font, size, color, str(price), x, y, index))
    return texts


def _extent(font: str, size: int, line: str) -> tuple[float, float]:
    """Width and height in pixels of a line's ink, without the room fonts keep above and below."""
    left, top, right, bottom = font_files.load(font, size).getbbox(line, anchor="ls")
    return right - left, bottom - top


def _fitting(font: str, line: str, width: float, height: float) -> int:
    w, h = _extent(font, 100, line)
    return int(100 * min(width / w, height / h))


def _write(canvas: _Canvas, name: str, size: int, color: RGB, line: str, x: float, y: float, row: int) -> Text:
    """Write ``line`` with its ink's top left corner at (x, y) pixels."""
    font = font_files.load(name, size)
    left, top, _, bottom = font.getbbox(line, anchor="ls")
    x, base = x - left, y - top
    canvas.draw.text((x, base), line, fill=color, font=font, anchor="ls")
    boxes = []
    for index in range(len(line)):
        start, end = font.getlength(line[:index]), font.getlength(line[: index + 1])
        boxes.append(canvas.fraction((x + start, base + top, x + end, base + bottom)))
    return Text(line, row, tuple(boxes))
