"""`python -m sightline_models.device_probe`: what torch sees on this machine, as one line of JSON.

Run as a process of its own by commands that import no torch themselves, so that a torch that can't be imported, or
that crashes, is something to report instead of an end.
"""

import json
import sys
import warnings
from typing import Any


def probe() -> dict[str, Any]:
    """``torch`` and ``cuda_build`` versions, ``gpus`` torch can use, and why none where there are none.

    ``error`` stands alone when torch can't be imported.
    """
    try:
        import torch
    except Exception as error:
        return {"error": _sentence(error)}
    reason = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 and torch.version.cuda is not None:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except Exception as error:
            reason = _sentence(error)
        if caught:
            reason = _sentence(caught[0].message)
    return {
        "torch": torch.__version__,
        "cuda_build": torch.version.cuda,
        "reason": reason,
        "gpus": [_gpu(torch, index) for index in range(count)],
    }


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    found = {
        "index": index,
        "name": properties.name,
        "total_bytes": properties.total_memory,
        "free_bytes": None,
        "capability": f"{properties.major}.{properties.minor}",
        "bfloat16": properties.major >= 8,
        "error": None,
    }
    try:
        # Making a context is part of the question: it fails on a GPU that is full, broken or reserved.
        found["free_bytes"] = torch.cuda.mem_get_info(index)[0]
    except Exception as error:
        found["error"] = _sentence(error)
    return found


def _sentence(error: object) -> str:
    """The first line of an error: what follows is advice for developers."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe()) + "\n")
