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
    aliases: list[str]
    default_sampling: DefaultSampling


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
