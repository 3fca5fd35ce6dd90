"""A decode step of the whole decoder as one program, made by torch's compiler for this CPU and these weights.

Run operation by operation, a step of a small model is mostly the setting out of hundreds of operations. Here they are
one call, in two programs: for a single row, whose products are sums that read each weight once, and for more, whose
products are oneDNN's. Keys and values are read where they lie in the paged cache, and the next tokens are drawn.
Needs a C++ compiler on the machine. Knows weights, the cache and where rows lie in it. Knows no sequence, no picture.

Suffixes: B rows, N blocks a row, M cache blocks, P slots a block, H query heads, G key/value heads, R query heads that
share a key head, X query and key and value heads (of noise: places), D head dim, W model width, F feed-forward width,
I input width, V vocabulary.
"""

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from sightline_kernels.int8_linear import compilable as int8
from sightline_kernels.int8_linear.on_cpu import unpack
from sightline_kernels.layout import PagedLayout
from sightline_kernels.sample import compilable
from sightline_models.decoder import Decoder
from sightline_models.kv import KvPool
from sightline_models.layers import Linear, RmsNorm
from sightline_models.quantize import Int8Linear

MOST_PARAMETERS = 2**29
"""A larger model's operations take so long that setting them out doesn't show, and compiling it takes very long."""
_MOST_KEYS = 12_288
"""Rows times slots of the longest, padded to blocks: beyond, attention by matrix products is faster than by sums."""
# A compiler that knows a size to be 1 makes a program for 1 alone.
_LEAST_BLOCKS = _LEAST_ROWS = 2

Program = Callable[..., list[Tensor]]


class CompileError(RuntimeError):
    """No program could be made; the sentence says why."""


class CompiledDecoder:
    """Takes the steps in which every sequence has one token, and isn't slower for having many keys."""

    def __init__(self, single: Program, several: Program, kv: KvPool, most_rows: int, vocab_size: int) -> None:
        self.num_places = compilable.num_places(vocab_size)
        """How many numbers of noise a row's draw takes."""
        self._single = single
        self._several = several
        self._most_rows = most_rows
        self._caches = list(kv.k_LNPGD.unbind(0)), list(kv.v_LNPGD.unbind(0))

    def takes(self, layout: PagedLayout) -> bool:
        """Whether ``step`` may be asked for this layout."""
        rows = len(layout.query_lens)
        if layout.num_decodes < rows or rows > self._most_rows or layout.row_invariant:
            return False
        return rows * layout.block_table_BN.shape[1] * layout.block_size <= _MOST_KEYS

    def step(
        self,
        token_ids_B: Tensor,
        positions_B: Tensor,
        layout: PagedLayout,
        temperature_B: Tensor,
        noise_BX: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next tokens [B], the largest number that each is drawn from [B], and float32 logits_BV.

        The rows' keys and values are stored at ``layout.slots_T``. ``temperature_B`` and ``noise_BX`` are what
        ``compilable.draw`` takes.
        """
        table_BN = layout.block_table_BN.long()
        if table_BN.shape[1] < _LEAST_BLOCKS:
            table_BN = F.pad(table_BN, (0, _LEAST_BLOCKS - table_BN.shape[1]))
        program = self._single if len(token_ids_B) == 1 else self._several
        drawn_B, largest_B, logits_BV = program(
            token_ids_B,
            positions_B,
            table_BN,
            layout.slots_T,
            layout.context_len_B,
            temperature_B,
            noise_BX,
            *self._caches,
        )
        return drawn_B, largest_B, logits_BV


def refusal(decoder: Decoder) -> str | None:
    """Why this decoder can't be compiled; None when it can."""
    products = [decoder.get_submodule(name) for name in _products(decoder.config.num_layers)]
    if not all(isinstance(product, Linear | Int8Linear) for product in products):
        return "its weights are in NF4, or in int8 that this checkpoint keeps apart"
    if any(isinstance(product, Int8Linear) and product.scales is None for product in products):
        return "its weights are in int8, which this processor doesn't multiply (it has no VNNI)"
    parameters = sum(weight.numel() for product in products for weight in product.state_dict().values())
    if parameters > MOST_PARAMETERS:
        return f"it has {parameters / 1e9:.1f} billion parameters, and is too large to gain anything"
    return None


def compile_decoder(decoder: Decoder, kv: KvPool, folder: Path, *, most_rows: int, most_len: int) -> CompiledDecoder:
    """Make the programs for up to ``most_rows`` rows of up to ``most_len`` tokens.

    ``folder`` holds what the compiler writes, and nothing of use when this returns. Takes tens of seconds. While it
    runs, no other thread may use the environment. Raises CompileError where there is no compiler, or it fails.
    """
    assert refusal(decoder) is None, refusal(decoder)
    most_blocks = max(_LEAST_BLOCKS + 1, -(-most_len // kv.k_LNPGD.shape[2]))
    most_rows = max(_LEAST_ROWS + 1, most_rows)
    # Outside of inference mode, whose tensors can't be traced.
    with _quietly_in(folder), torch.inference_mode(False), torch.no_grad():
        step = _DecodeStep(decoder, kv.k_LNPGD.shape[2])
        single, several = (_program(step, kv, folder, rows, most_rows, most_blocks) for rows in (1, _LEAST_ROWS + 1))
    return CompiledDecoder(single, several, kv, most_rows, decoder.config.vocab_size)


def _program(step: "_DecodeStep", kv: KvPool, folder: Path, rows: int, most_rows: int, most_blocks: int) -> Program:
    by_row = {} if rows == 1 else {0: Dim("rows", min=_LEAST_ROWS, max=most_rows)}
    by_block = {1: Dim("blocks", min=_LEAST_BLOCKS, max=most_blocks)}
    by_layer: list[dict[int, Any]] = [{} for _ in kv.k_LNPGD]
    # Each a tensor of its own: one that is given twice is taken for one input.
    token_ids_B, positions_B, slots_B = (torch.zeros(rows, dtype=torch.int64) for _ in range(3))
    table_BN = torch.zeros(rows, _LEAST_BLOCKS + 1, dtype=torch.int64)
    context_len_B = torch.ones(rows, dtype=torch.int32)
    temperature_B = torch.ones(rows)
    noise_BX = torch.zeros(rows, compilable.num_places(step.config.vocab_size))
    caches = list(kv.k_LNPGD.unbind(0)), list(kv.v_LNPGD.unbind(0))
    examples = (token_ids_B, positions_B, table_BN, slots_B, context_len_B, temperature_B, noise_BX, *caches)
    options = {
        # Weights are put in oneDNN's order, once.
        "freezing": rows > 1,
        # They would be kept for the next time, and hashed by a program that a machine may lack.
        "aot_inductor.precompile_headers": False,
        # No pool of processes that outlives this.
        "compile_threads": 1,
        # The engine changes its threads from step to step.
        "cpp.dynamic_threads": True,
        "cpp.enable_floating_point_contract_flag": "fast",
    }
    shapes = (by_row, by_row, by_row | by_block, *[by_row] * 4, by_layer, by_layer)
    try:
        exported = torch.export.export(step, examples, dynamic_shapes=shapes, strict=False)
        package = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(folder / f"{rows}.pt2"), inductor_configs=options
        )
        program: Program = torch._inductor.aoti_load_package(package)
    except Exception as error:
        raise CompileError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    return program


@contextlib.contextmanager
def _quietly_in(folder: Path) -> Iterator[None]:
    """Have the compiler keep its files, and torch unpack programs, in ``folder``, and tell the log errors alone.

    A program that runs needs no file any more.
    """
    changed = {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    before = os.environ.copy()
    told = logging.getLogger("torch")
    level, temporary = told.level, tempfile.tempdir
    os.environ.update(changed)
    # Python has asked for TMPDIR before, and doesn't ask again.
    tempfile.tempdir = str(folder)
    told.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        told.setLevel(level)
        tempfile.tempdir = temporary
        for name in changed:
            os.environ.pop(name)
        os.environ.update(before)


class _DecodeStep(nn.Module):
    """The decoder over rows of one token each, written for a compiler: run as it stands, it would be slow.

    The number of rows is never asked for by ``len``, which would make it a constant.
    """

    def __init__(self, decoder: Decoder, block_size: int) -> None:
        super().__init__()
        self.config = decoder.config
        self.block_size = block_size
        self._keep("embed_tokens", decoder.embed_tokens.weight)
        self._keep("cos", decoder.cos_MD)
        self._keep("sin", decoder.sin_MD)
        for name, module in decoder.named_modules():
            if isinstance(module, Int8Linear) and module.scales is not None:
                self._keep(name, unpack(module.codes_OI))
                self._keep(f"{name}.scale", module.scales.float32_O)
            if isinstance(module, Linear | RmsNorm):
                self._keep(name, module.weight)
            if isinstance(module, Linear | Int8Linear) and module.bias is not None:
                self._keep(f"{name}.bias", module.bias)

    def forward(
        self,
        token_ids_B: Tensor,
        positions_B: Tensor,
        table_BN: Tensor,
        slots_B: Tensor,
        context_len_B: Tensor,
        temperature_B: Tensor,
        noise_BX: Tensor,
        k_caches: list[Tensor],
        v_caches: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what ``CompiledDecoder.step`` does. All integers are int64 but for int32 ``context_len_B``."""
        config = self.config
        turning, half = config.num_heads + config.num_kv_heads, config.head_dim // 2
        keys_NP = torch.arange(table_BN.shape[1] * self.block_size, dtype=torch.int32).view(-1, self.block_size)
        seen_BNP = keys_NP < context_len_B[:, None, None]
        where = (slots_B // self.block_size, slots_B % self.block_size)
        cos_B1D, sin_B1D = (self._kept(name)[positions_B][:, None].float() for name in ("cos", "sin"))
        x_BW = F.embedding(token_ids_B, self._kept("embed_tokens"))
        for index, (k_MPGD, v_MPGD) in enumerate(zip(k_caches, v_caches, strict=True)):
            layer = f"layers.{index}"
            heads_BW = self._multiply(self._norm(x_BW, f"{layer}.input_norm"), f"{layer}.attention.qkv")
            heads_BXD = heads_BW.view(x_BW.shape[0], -1, config.head_dim)
            low, high = heads_BXD[:, :turning, :half].float(), heads_BXD[:, :turning, half:].float()
            turned = (
                low * cos_B1D[..., :half] + high * sin_B1D[..., :half],
                high * cos_B1D[..., half:] + low * sin_B1D[..., half:],
            )
            turned_BXD = _written(torch.cat([part.to(x_BW.dtype) for part in turned], -1))
            # By two indices into the cache as it lies: through a view, the compiler would copy the whole of it.
            k_MPGD.index_put_(where, turned_BXD[:, config.num_heads :])
            v_MPGD.index_put_(where, heads_BXD[:, turning:])
            out_BW = _attend(turned_BXD[:, : config.num_heads], k_MPGD, v_MPGD, table_BN, seen_BNP)
            x_BW = x_BW + self._multiply(out_BW, f"{layer}.attention.o")
            gate_up_BF = self._multiply(self._norm(x_BW, f"{layer}.post_norm"), f"{layer}.feed_forward.gate_up")
            gate_BF, up_BF = gate_up_BF.chunk(2, -1)
            x_BW = x_BW + self._multiply(F.silu(gate_BF) * up_BF, f"{layer}.feed_forward.down")
        logits_BV = self._multiply(self._norm(x_BW, "norm"), "lm_head").float()
        return *compilable.draw(logits_BV, temperature_B, noise_BX), logits_BV

    def _norm(self, x_BW: Tensor, name: str) -> Tensor:
        wide_BW = x_BW.float()
        scale_B1 = torch.rsqrt(wide_BW.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (wide_BW * scale_B1 * self._kept(name).float()).to(x_BW.dtype)

    def _multiply(self, x_BI: Tensor, name: str) -> Tensor:
        weight_OI = self._kept(name)
        bias_O = self._kept(f"{name}.bias") if _key(f"{name}.bias") in self._buffers else None
        several, is_int8 = x_BI.shape[0] > 1, weight_OI.dtype == torch.int8
        if several and not is_int8:
            return F.linear(x_BI, weight_OI, bias_O)
        if is_int8:
            multiply = int8.multiply if several else int8.multiply_row
            y_BO = multiply(_written(x_BI), weight_OI, self._kept(f"{name}.scale"))
        else:
            y_BO = (weight_OI.float() * _written(x_BI).float()).sum(-1)[None]
        return (y_BO if bias_O is None else y_BO + bias_O.float()).to(x_BI.dtype)

    def _keep(self, name: str, tensor: Tensor) -> None:
        # What is packed for oneDNN can't be traced.
        self.register_buffer(
            _key(name), tensor.detach().to_dense(tensor.dtype) if tensor.is_mkldnn else tensor.detach()
        )

    def _kept(self, name: str) -> Tensor:
        return self.get_buffer(_key(name))


def _products(num_layers: int) -> list[str]:
    """The decoder's modules that multiply by a matrix."""
    of_a_layer = ("attention.qkv", "attention.o", "feed_forward.gate_up", "feed_forward.down")
    return [*(f"layers.{index}.{name}" for index in range(num_layers) for name in of_a_layer), "lm_head"]


def _key(name: str) -> str:
    """A module's name as that of a buffer, which has no dots."""
    return name.replace(".", "_")


def _attend(q_BHD: Tensor, k_MPGD: Tensor, v_MPGD: Tensor, table_BN: Tensor, seen_BNP: Tensor) -> Tensor:
    """Return out_BW. Slots past a row's context may hold anything, even NaN."""
    rows, num_heads, head_dim = q_BHD.shape
    num_kv_heads = k_MPGD.shape[2]
    q_BGRD = _written(q_BHD.view(rows, num_kv_heads, num_heads // num_kv_heads, head_dim).float() * head_dim**-0.5)
    # Heads that share keys are set out one by one: the compiler puts them into one loop, which reads a key once.
    shares: list[Tensor] = []
    for q_BGD in q_BGRD.unbind(2):
        scores_BGNP = (q_BGD[:, :, None, None] * _blocks(k_MPGD, table_BN).float()).sum(-1)
        scores_BGNP = torch.where(seen_BNP[:, None], scores_BGNP, -torch.inf)
        shares.append((scores_BGNP - scores_BGNP.amax((-1, -2), keepdim=True)).exp())
    v_BGNPD = torch.where(seen_BNP[:, None, ..., None], _blocks(v_MPGD, table_BN).float(), 0.0)
    out_BGRD = torch.stack(
        [(each_BGNP[..., None] * v_BGNPD).sum((2, 3)) / each_BGNP.sum((2, 3))[..., None] for each_BGNP in shares], 2
    )
    return out_BGRD.to(q_BHD.dtype).reshape(rows, -1)


def _blocks(cache_MPGD: Tensor, table_BN: Tensor) -> Tensor:
    """A row's blocks of the cache [B, G, N, P, D], where they lie."""
    # The engine's own block numbers need no check at every key.
    blocks_BNPGD: Tensor = torch.ops.aten._unsafe_index.Tensor(cache_MPGD, [table_BN])
    return blocks_BNPGD.permute(0, 3, 1, 2, 4)


def _written(x: Tensor) -> Tensor:
    """``x``, which the compiler writes out here: it would compute it again wherever it is read."""
    return torch.as_strided(x, x.shape, x.stride())
