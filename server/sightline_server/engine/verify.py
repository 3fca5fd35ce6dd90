"""The self-check of quantized weights: how far they answer from the unquantized ones that they were made of.

Of the two models there is only ever one: the unquantized one is loaded, asked and let go before the other is loaded.
Whatever goes wrong is a result with a sentence and never stops a start. Knows no scheme's numbers; how a
model is made it is told.
Suffixes: P positions of an answer, V vocabulary.
"""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sightline_models.config import CheckpointError, VlmConfig
from sightline_models.images import ImageError
from sightline_models.parameter_count import weight_bytes
from sightline_models.quantization_config import Quantization
from sightline_models.tokenizer import TokenizerError
from sightline_models.vlm import Vlm
from sightline_server.engine import cgroups, trial
from sightline_server.engine.gpu_memory import gib
from sightline_server.engine.trial import Answered
from sightline_server.engine.types import EngineConfig, Verification
from sightline_server.settings import SettingsError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be checked, and where."""

    folder: Path
    config: VlmConfig
    chat_template: str | None
    """Jinja text to use instead of the checkpoint's."""
    quantization: Quantization
    """As served."""
    dtype: torch.dtype
    device: torch.device
    limits: EngineConfig

    @property
    def why_alone(self) -> str | None:
        """Why there is no unquantized model to compare with; None when there is."""
        if self.quantization == "none":
            return "The weights aren't quantized, so there is nothing to compare with: add --quantize int8 or nf4."
        if self.config.quantization != "none":
            return (
                f"The checkpoint's weights are {self.quantization} on disk, so there is nothing to compare with; to "
                f"compare, take the unquantized checkpoint with --quantize {self.quantization}."
            )
        return None


@dataclass(frozen=True)
class Failure:
    """Why there is nothing of the unquantized model; a sentence."""

    message: str


def ask_unquantized(subject: Subject, make: Callable[[], Vlm]) -> Answered | Failure | None:
    """What the unquantized model answers, loaded by ``make`` and let go; None where there is none to ask."""
    if subject.why_alone is not None:
        return None
    on_cpu = subject.device.type == "cpu"
    needed = weight_bytes(subject.config, str(subject.dtype).removeprefix("torch."), on_cpu=on_cpu)
    if on_cpu and needed > (free := cgroups.memory_free()):
        # Tried all the same, it may end this process: a full machine has no exception to raise.
        return Failure(_too_large(needed, f"{gib(free)} are free"))
    result = _guarded(lambda: _ask(make(), subject, None), _too_large(needed, f"{subject.device} is too full"))
    _let_go(subject.device)
    return result


def verify(subject: Subject, model: Vlm, original: Answered | Failure | None) -> Verification:
    """Compare ``model``, as served, with what ``ask_unquantized`` returned."""
    scored = original.answers if isinstance(original, Answered) else None
    too_full = f"The check found no room beside the weights on {subject.device}: leave --verify out."
    asked = _guarded(lambda: _ask(model, subject, scored), too_full)
    _let_go(subject.device)
    if isinstance(original, Answered) and isinstance(asked, Answered):
        return compare(original, asked, subject.quantization)
    pace = asked.pace if isinstance(asked, Answered) else None
    for tried in (original, asked):
        if isinstance(tried, Failure):
            return Verification(outcome="failed", message=tried.message, quantization=subject.quantization, served=pace)
    assert subject.why_alone is not None, "an unquantized model was there and wasn't asked"
    return Verification(
        outcome="nothing_to_compare", message=subject.why_alone, quantization=subject.quantization, served=pace
    )


def compare(original: Answered, served: Answered, quantization: Quantization) -> Verification:
    """The figures of two models that scored the same answers."""
    pairs = list(zip(original.logits_PV, served.logits_PV, strict=True))
    for whose, answered in (("unquantized", original), ("quantized", served)):
        if not all(logits_PV.isfinite().all() for logits_PV in answered.logits_PV):
            return Verification(
                outcome="failed",
                message=f"The {whose} model's logits are not all finite: try another --dtype, or fetch the weights "
                "again.",
                quantization=quantization,
                served=served.pace,
                unquantized=original.pace,
            )
    kl_P = torch.cat([_divergence(original_PV, served_PV) for original_PV, served_PV in pairs])
    agrees_P = torch.cat([one_PV.argmax(-1) == other_PV.argmax(-1) for one_PV, other_PV in pairs])
    mean, worst = kl_P.mean().item(), kl_P.max().item()
    return Verification(
        outcome="compared",
        message=f"{quantization} against unquantized weights: KL divergence {mean:.2g} nats on average, {worst:.2g} at "
        f"worst, the same likeliest token at {int(agrees_P.sum())} of {len(kl_P)} positions of {len(pairs)} answers.",
        quantization=quantization,
        num_answers=len(pairs),
        num_positions=len(kl_P),
        mean_kl=mean,
        worst_kl=worst,
        top1_agreement=agrees_P.double().mean().item(),
        served=served.pace,
        unquantized=original.pace,
    )


def _divergence(original_PV: Tensor, served_PV: Tensor) -> Tensor:
    """KL(original || served) in nats at each position; in float64, so that equal logits give exactly nothing."""
    log_p_PV, log_q_PV = original_PV.double().log_softmax(-1), served_PV.double().log_softmax(-1)
    return (log_p_PV.exp() * (log_p_PV - log_q_PV)).sum(-1)


def _ask(model: Vlm, subject: Subject, scored: tuple[tuple[int, ...], ...] | None) -> Answered:
    longest = subject.config.decoder.max_position_embeddings
    cases = trial.draw_cases(subject.folder, subject.config, chat_template=subject.chat_template, longest=longest)
    if not cases:
        raise CheckpointError(f"a picture, a question and an answer don't fit {longest} positions: leave --verify out")
    end = trial.end_tokens(subject.folder, subject.config)
    return trial.answer(model, cases, subject.limits, subject.device, end=end, scored=scored)


def _guarded(ask: Callable[[], Answered], too_large: str) -> Answered | Failure:
    try:
        return ask()
    except torch.OutOfMemoryError:
        return Failure(too_large)
    except (CheckpointError, TokenizerError, ImageError, SettingsError) as error:
        return Failure(f"The check could not be made: {str(error).rstrip('.')}.")
    except Exception as error:
        log.exception("The check of the weights failed.")
        return Failure(
            f"The check failed with {type(error).__name__}: {error}. Leave --verify out to serve without it."
        )


def _too_large(needed: int, why: str) -> str:
    return (
        f"The unquantized model was not asked: its weights take {gib(needed)}, and {why}. Check on a machine with "
        "more memory, or leave --verify out."
    )


def _let_go(device: torch.device) -> None:
    """Give back what nobody holds any more, so that the next model finds it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
