"""Which kernels a model gets, by mode, device, dtype and shape, and what is said about it."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sightline_kernels.dispatch import (
    OPERATIONS,
    REFERENCES,
    FusedRefusedError,
    Workload,
    capability_of,
    choose,
    explain,
)

H200 = Workload(
    device=torch.device("cuda:0"),
    capability=(9, 0),
    dtype=torch.bfloat16,
    hidden_size=4096,
    intermediate_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    row_invariant=False,
)
CPU = replace(H200, device=torch.device("cpu"), capability=(0, 0))


def test_auto_on_a_cpu_is_the_references_themselves() -> None:
    assert choose("auto", CPU) is REFERENCES
    assert {choice.reason for choice in explain("auto", CPU)} == {"a CPU runs the references"}


def test_auto_on_a_cpu_imports_no_fused_kernel() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "from sightline_kernels.dispatch import Workload, choose\n"
        "choose('auto', Workload(torch.device('cpu'), (0, 0), torch.float32, 8, 8, 2, 1, 4, False))\n"
        "print({'triton', 'sightline_kernels.launch'} & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_reference_is_the_references_anywhere() -> None:
    assert choose("reference", H200) is REFERENCES
    assert not any(choice.fused for choice in explain("reference", H200))


@pytest.mark.parametrize("mode", ["auto", "fused"])
def test_a_gpu_gets_every_twin(mode: str) -> None:
    kernels, choices = choose(mode, H200), explain(mode, H200)
    assert [choice.operation for choice in choices] == list(OPERATIONS)
    for choice in choices:
        twin, reference = getattr(kernels, choice.operation), getattr(REFERENCES, choice.operation)
        assert choice.fused
        assert twin is not reference


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": torch.float64}, "computes in float32, bfloat16, float16, not in float64"),
        ({"capability": (7, 5)}, "compute capability 7.5, and 8.0 is the least"),
        ({"row_invariant": True}, "--deterministic"),
        ({"can_build": False}, "install gcc and python3-dev"),
        ({"device": torch.device("meta")}, "this is meta"),
    ],
)
def test_what_no_twin_takes_is_left_to_all_references_or_refused(changes: dict[str, object], said: str) -> None:
    workload = replace(H200, **changes)
    assert choose("auto", workload) is REFERENCES
    assert all(said in choice.reason for choice in explain("auto", workload))
    with pytest.raises(FusedRefusedError, match=said):
        choose("fused", workload)


@pytest.mark.parametrize(
    ("changes", "operation", "said"),
    [
        ({"hidden_size": 20000}, "add_rms_norm", "rows of 20000 numbers"),
        ({"intermediate_size": 10**8}, "silu_mul", "100000000"),
        ({"head_dim": 5}, "rotary_store_kv", "heads of 5 numbers"),
        ({"head_dim": 512}, "paged_attention", "heads of 512 numbers"),
        ({"num_kv_heads": 5}, "paged_attention", "can't share 5 key heads"),
    ],
)
def test_one_refusal_is_that_operations_own(changes: dict[str, object], operation: str, said: str) -> None:
    workload = replace(H200, **changes)
    kernels = choose("auto", workload)
    refused = [choice for choice in explain("auto", workload) if not choice.fused]
    assert [choice.operation for choice in refused] == [operation]
    assert said in refused[0].reason
    assert getattr(kernels, operation) is getattr(REFERENCES, operation)
    assert kernels.store_kv is not REFERENCES.store_kv
    with pytest.raises(FusedRefusedError, match=f"The fused {operation} can't be used: .*{said}"):
        choose("fused", workload)


def test_a_cpu_refuses_fused_kernels_by_name() -> None:
    with pytest.raises(FusedRefusedError, match="Triton runs on CUDA GPUs, and this is a CPU"):
        choose("fused", CPU)


def test_without_triton_the_references_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sightline_kernels.launch", None)
    assert choose("auto", H200) is REFERENCES
    with pytest.raises(FusedRefusedError, match="pip install triton"):
        choose("fused", H200)


def test_a_cpu_has_no_compute_capability() -> None:
    assert capability_of(torch.device("cpu")) == (0, 0)
