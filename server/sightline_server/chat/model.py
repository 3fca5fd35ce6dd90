"""The model being served, as the API sees it: its names, its text side, its limits. Knows no weights and no torch."""

from dataclasses import dataclass
from pathlib import Path

from sightline_models.config import (
    CheckpointError,
    GenerationDefaults,
    VlmConfig,
    read_config,
    read_generation_defaults,
)
from sightline_models.images import PreprocessConfig, read_preprocess_config
from sightline_models.presets import demo_checkpoint
from sightline_models.quantization_config import choose_quantization
from sightline_models.tokenizer import ChatTokenizer, Message, TextPart, TokenizerError, read_chat_template
from sightline_server.confined.template_renderer import TemplateRenderer
from sightline_server.errors import ModelNotFound
from sightline_server.settings import Settings, SettingsError

DEMO_NAME = "sightline-demo"
_MAX_SHOWN_NAME = 100


@dataclass(frozen=True)
class ServedModel:
    names: tuple[str, ...]
    """What clients may call it; the first is the one reported."""
    folder: Path
    config: VlmConfig
    tokenizer: ChatTokenizer
    preprocess: PreprocessConfig
    generation: GenerationDefaults
    created: int
    """Unix seconds."""
    max_model_len: int
    """Most tokens of prompt and answer together that the checkpoint and the settings allow."""

    @classmethod
    def load(cls, folder: Path, settings: Settings) -> "ServedModel":
        """Read everything but the weights. Raises CheckpointError, TokenizerError, ImageError or SettingsError."""
        config = read_config(folder)
        # Refused here, before an engine is started.
        choose_quantization(config.quantization, settings.quantize, vision=settings.quantize_vision)
        longest = config.decoder.max_position_embeddings
        if settings.max_model_len > longest:
            raise SettingsError(
                f"--max-model-len {settings.max_model_len} is more than the {longest} positions of this checkpoint."
            )
        template = read_chat_template(settings.chat_template)
        tokenizer = ChatTokenizer.load(folder, config, chat_template=template, make_template=TemplateRenderer)
        _refuse_too_short(settings, tokenizer)
        if tokenizer.vocab_size > config.decoder.vocab_size:
            raise CheckpointError(
                f"{folder.name}: tokenizer.json knows {tokenizer.vocab_size} tokens, the model's vocab_size is "
                f"{config.decoder.vocab_size}: they are not of the same checkpoint."
            )
        return cls(
            names=settings.served_model_name or (_default_name(folder, settings),),
            folder=folder,
            config=config,
            tokenizer=tokenizer,
            preprocess=read_preprocess_config(folder, config),
            generation=read_generation_defaults(folder, config),
            created=int((folder / "config.json").stat().st_mtime),
            max_model_len=settings.max_model_len or longest,
        )

    @property
    def name(self) -> str:
        return self.names[0]

    def check_name(self, name: str, *, param: str | None = "model") -> None:
        """Raises ModelNotFound for any name but this model's own."""
        if name not in self.names:
            known = " or ".join(repr(own) for own in self.names)
            raise ModelNotFound(
                f"The model {name[:_MAX_SHOWN_NAME]!r} does not exist. This server serves {known}.", param=param
            )


def _refuse_too_short(settings: Settings, tokenizer: ChatTokenizer) -> None:
    """Raises SettingsError for a context that the shortest question doesn't fit into with a token of an answer."""
    if not settings.max_model_len:
        return
    try:
        needed = len(tokenizer.encode_chat([Message("user", (TextPart("?"),))], []).token_ids) + 1
    except TokenizerError:
        # A template that wants more than a question; requests will tell.
        needed = 2
    if settings.max_model_len < needed:
        raise SettingsError(
            f"--max-model-len {settings.max_model_len} leaves no room for a chat: the shortest question and one token "
            f"of an answer take {needed}. Give more, or leave it out."
        )


def _default_name(folder: Path, settings: Settings) -> str:
    if settings.random:
        return f"random-{settings.random}"
    return DEMO_NAME if folder.resolve() == demo_checkpoint().resolve() else folder.resolve().name
