"""Fresh memory is poisoned in these tests, so that a kernel that reads what nobody wrote can't pass by luck."""

import torch


def test_fresh_tensors_hold_nothing_useful() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3, dtype=torch.bfloat16)).isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
