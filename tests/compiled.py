"""Compiles a launch for a GPU that isn't here and reads the machine code for faults that only speed would show.

Triton's wheel brings the assembler and the disassembler. Knows launches and cards. Knows no operation.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sightline_kernels.launch import Launch

SHARED_BYTES = {80: 163 * 2**10, 86: 99 * 2**10, 89: 99 * 2**10, 90: 227 * 2**10, 120: 99 * 2**10}
"""Shared memory that one program may have, by compute capability."""

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Compiled:
    sass: str
    stack_bytes: int
    shared_bytes: int

    @property
    def wide_loads(self) -> int:
        """128-bit loads in the code, to registers or to shared memory."""
        return len(re.findall(r"\b(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128\b", self.sass))


def compile_for(launch: Launch, capability: int, *, aligned: bool = True) -> Compiled:
    """Compile as Triton would at this launch: types, and what of its arguments is divisible by 16, are theirs.

    Without ``aligned`` the compiler isn't told of the latter.
    """
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        assert value is not None, f"{name} is None"
        whole = None
        if isinstance(value, Tensor):
            signature[name], whole = _POINTERS[value.dtype], value.data_ptr()
        elif isinstance(value, int):
            plain = launch.kernel.params[index].do_not_specialize
            assert plain or value != 1, f"{name} is 1, which Triton would compile in as a constant"
            signature[name], whole = "i32" if abs(value) < 2**31 else "i64", None if plain else value
        else:
            signature[name] = "fp32"
        if aligned and whole is not None and whole % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, dict(launch.constants), attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = _run_cuobjdump("-res-usage", "-sass", file.name)
    stack = re.search(r"STACK:(\d+)", told)
    assert stack, f"cuobjdump tells no stack: {told[:500]}"
    return Compiled(told, int(stack[1]), made.metadata.shared)


def instructions_a_weight(compiled: Compiled, launch: Launch, weights: int) -> float:
    """Instructions of all threads for one weight, in the loop that multiplies ``weights`` of them a turn."""
    lines = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", compiled.sass)]
    loops = []
    for at, line in lines:
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
        if back and int(back[1], 16) < at:
            body = [each for where, each in lines if int(back[1], 16) <= where <= at]
            if any(re.search(r"\bH?G?MMA\b", each) for each in body):
                loops.append(len(body))
    assert loops, "no loop with a matrix instruction"
    return max(loops) * 32 * launch.num_warps / weights


def faults(compiled: Compiled, capability: int, *, wide_loads: int = 0) -> list[str]:
    """What is wrong with the machine code: registers spilled to memory, too much shared memory, narrow accesses.

    With ``wide_loads`` at least so many must be there, and the rest, of single rows and tables, may be narrow.
    """
    found = []
    if compiled.stack_bytes or re.search(r"\b(LDL|STL)\b", compiled.sass):
        found.append(f"registers spill, {compiled.stack_bytes} bytes of stack")
    if compiled.shared_bytes > SHARED_BYTES[capability]:
        found.append(f"{compiled.shared_bytes} bytes of shared memory, {SHARED_BYTES[capability]} are there")
    if wide_loads:
        if compiled.wide_loads < wide_loads:
            found.append(f"{compiled.wide_loads} 128-bit loads, {wide_loads} are wanted")
        return found
    for kind, instruction in (("loads", "LDG|LDGSTS"), ("stores", "STG")):
        if not re.search(rf"\b({instruction})\.E\.(\w+\.)*128\b", compiled.sass):
            found.append(f"no 128-bit {kind}")
    if re.search(r"\b(LDG|STG)\.E\.(\w+\.)*[US]?(8|16)\b", compiled.sass):
        found.append("numbers loaded or stored one by one")
    return found


def _run_cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout
