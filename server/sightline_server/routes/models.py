"""``/v1/models``: the served model, with what a client may want to know before it asks."""

import msgspec
from fastapi import APIRouter, Depends, Request

from sightline_server.engine import types as engine
from sightline_server.protocol.errors import ErrorBody
from sightline_server.protocol.models import Architecture, DefaultSampling, ModelCard, ModelList, Verification
from sightline_server.routes.access import ANY_KEY
from sightline_server.routes.context import Context, context_of, record_of, refuse_when_draining

router = APIRouter(
    prefix="/v1",
    tags=["models"],
    dependencies=[Depends(ANY_KEY), Depends(refuse_when_draining)],
    responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
)


@router.get("/models", summary="The model, under each of its names")
async def list_models(request: Request) -> ModelList:
    record_of(request).endpoint = "models"
    context = context_of(request)
    return ModelList(data=[model_card(context, name) for name in context.model.names])


# A path, since names may hold slashes, which clients send as %2F.
@router.get("/models/{model:path}", summary="One model")
async def one_model(request: Request, model: str) -> ModelCard:
    """404 ``model_not_found`` for any name but the served ones."""
    record_of(request).endpoint = "models"
    context = context_of(request)
    context.model.check_name(model)
    return model_card(context, model)


def model_card(context: Context, name: str) -> ModelCard:
    """The model under one of its names."""
    model, info = context.model, context.engine.info
    return ModelCard(
        id=name,
        created=model.created,
        owned_by="sightline",
        max_model_len=context.context_length,
        context_length=context.context_length,
        architecture=Architecture(
            name=model.config.architecture,
            modality="text+image->text",
            input_modalities=["text", "image"],
            output_modalities=["text"],
        ),
        image_tokens=model.config.num_image_tokens,
        dtype=info.dtype if info else None,
        quantization=info.quantization if info else None,
        verification=_verification(info.verification) if info and info.verification else None,
        aliases=[other for other in model.names if other != name],
        default_sampling=DefaultSampling(
            temperature=model.generation.temperature,
            top_p=model.generation.top_p,
            top_k=model.generation.top_k,
            repetition_penalty=model.generation.repetition_penalty,
        ),
    )


def _verification(found: engine.Verification) -> Verification:
    return Verification.model_validate(msgspec.to_builtins(found))
