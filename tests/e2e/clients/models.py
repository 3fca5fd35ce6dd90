"""The list of models, and one of them."""

from common import IMAGE_TOKENS, MODEL, client

api = client()
listed = list(api.models.list())
assert [model.id for model in listed] == [MODEL]
model = api.models.retrieve(MODEL)
assert (model.object, type(model.created), model.owned_by != "") == ("model", int, True)
extra = model.model_extra
assert extra["max_model_len"] == extra["context_length"] == 2048
assert extra["image_tokens"] == IMAGE_TOKENS
assert extra["architecture"]["input_modalities"] == ["text", "image"]
# The demo model's generation_config asks for greedy decoding.
assert extra["default_sampling"]["temperature"] == 0
assert extra["dtype"]
print("ok")
