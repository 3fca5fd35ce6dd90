"""What ``/v1/models`` answers: OpenAI's four keys, and beside them what a client may want to know of the model."""

from typing import Literal

from pydantic import BaseModel


class Architecture(BaseModel):
    name: str
    """The checkpoint's own name of its class."""
    modality: str
    input_modalities: list[str]
    output_modalities: list[str]


class DefaultSampling(BaseModel):
    """What a request gets that sets none of these."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float


class Pace(BaseModel):
    """Measured before the server took requests: one request at a time, in the engine alone."""

    weight_bytes: int
    prompt_tokens_per_s: float
    decode_tokens_per_s: float


class Verification(BaseModel):
    """What ``--verify`` found."""

    outcome: Literal["compared", "nothing_to_compare", "failed"]
    message: str
    """One sentence: the figures, or why there are none."""
    quantization: str
    num_answers: int
    num_positions: int
    mean_kl: float | None
    """Nats a token of the unquantized model's greedy answers."""
    worst_kl: float | None
    top1_agreement: float | None
    """Share of those tokens at which both models find the same one the likeliest."""
    served: Pace | None
    unquantized: Pace | None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    """Prompt and answer together, in tokens."""
    context_length: int
    """The same number, under the name other clients look for."""
    architecture: Architecture
    image_tokens: int
    """Prompt tokens one picture takes."""
    dtype: str | None
    """Null until the engine has loaded."""
    quantization: str | None
    verification: Verification | None
    """Null without ``--verify``."""
    aliases: list[str]
    default_sampling: DefaultSampling


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
