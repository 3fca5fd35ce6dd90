"""What is asked: seeded prompts and pictures, made before the clock starts.

Knows words, pixels and request bodies. Knows nothing of sockets or clocks. The same seed makes the same workload.
"""

import base64
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

ImageUse = Literal["own", "same", "none"]
ImageFormat = Literal["jpeg", "png"]

_COMMON = """
able about above across after again air all along also always animal answer area ask away back bad ball bank base
beach bear begin behind best big bird black blue board boat body book both box boy bread bring brother build busy call
car care carry cat center change child city class clear close cloud cold color come common corner cost count country
cover cross cup dark day deep desk door down draw dream drive dry each ear early earth east easy edge eight end enough
even ever every eye face fact fall family far farm fast father feel few field fill final find fine fire first fish
five floor flower fly food foot forest form four free friend from front full game garden gave girl give glass gold
good grass great green ground group grow hair half hand happy hard head hear heart heavy help here high hill hold home
horse hot hour house idea inch island keep kind king know land large last late laugh lead learn leave left letter
level life light line list little live long look low machine main make many map mark market may mean measure meet
middle milk mind minute moon more morning most mother mountain mouth move much music name near need never new next
night nine north note nothing number ocean off office often old one open orange order other over page paper park part
pass pattern people person picture piece place plain plan plane plant play point poor power press problem pull purple
push put quick quiet rain reach read ready real red remember rest rich ride right ring river road rock room round rule
run sand school sea second see seven shape sharp ship short side silver sing six size sky sleep slow small snow soft
some song sound south space spoke spring square stand star start stay step still stone stop store story street strong
summer sun sure table tail take talk tall teach tell ten thing think three time together top town travel tree true
turn two under up use valley very view voice wait walk wall want warm watch water wave way week west wheel white whole
wide wind window winter wish wood word work world write yard year yellow young
"""
WORDS = tuple(_COMMON.split())


@dataclass(frozen=True, kw_only=True)
class WorkloadSpec:
    """One kind of load; every measured request is drawn from it."""

    seed: int
    num_prompts: int
    input_len: int
    """Text tokens of the user's message, the chat template and the picture not counted."""
    output_len: int
    images: ImageUse = "own"
    image_size: tuple[int, int] = (336, 336)
    """Width and height in pixels."""
    image_format: ImageFormat = "jpeg"
    temperature: float = 1.0
    ignore_eos: bool = True


def draw_words(seed: int, index: int, count: int) -> str:
    """``count`` common words, drawn by ``seed`` and ``index``: prompts that share no beginning worth caching."""
    return " ".join(random.Random(f"{seed}/{index}").choices(WORDS, k=count))


def draw_image(seed: int, index: int, size: tuple[int, int], image_format: ImageFormat) -> bytes:
    """An encoded picture of smooth random noise: no two alike, and as compressible as a photograph, not as a blank."""
    noise = np.random.default_rng([seed, index])
    coarse = Image.fromarray(noise.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    grain = noise.integers(-6, 7, pixels.shape, dtype=np.int16)
    image = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
    out = io.BytesIO()
    if image_format == "jpeg":
        image.save(out, "JPEG", quality=90)
    else:
        image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def make_body(
    spec: WorkloadSpec, *, model: str, text: str, image: bytes | None, max_tokens: int, stream: bool = True
) -> bytes:
    """The JSON body of one chat completion."""
    content: list[dict[str, Any]] = []
    if image is not None:
        url = f"data:image/{spec.image_format};base64,{base64.b64encode(image).decode('ascii')}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": text})
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": spec.temperature,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    if spec.ignore_eos:
        body["ignore_eos"] = True
    return json.dumps(body).encode()


def make_bodies(spec: WorkloadSpec, *, model: str, tokens_per_word: float, warmup: int = 0) -> Iterator[bytes]:
    """``warmup`` bodies that share nothing with the rest, then ``spec.num_prompts`` measured ones."""
    words = max(1, round(spec.input_len / tokens_per_word))
    measured = range(1, 1 + spec.num_prompts)
    warming = range(1 + spec.num_prompts, 1 + spec.num_prompts + warmup)
    shared = draw_image(spec.seed, 0, spec.image_size, spec.image_format) if spec.images == "same" else None
    for number in (*warming, *measured):
        image = shared if number in measured else None
        if image is None and spec.images != "none":
            image = draw_image(spec.seed, number, spec.image_size, spec.image_format)
        yield make_body(
            spec, model=model, text=draw_words(spec.seed, number, words), image=image, max_tokens=spec.output_len
        )
