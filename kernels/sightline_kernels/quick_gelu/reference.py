"""The activation of CLIP's towers, in plain torch: a sigmoid that stands in for the normal distribution's.

From Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415. Shapes are the caller's.
"""

from torch import Tensor


def quick_gelu(x: Tensor) -> Tensor:
    """Return ``x * sigmoid(1.702 * x)``, of the shape of ``x``."""
    return (x * 1.702).sigmoid_().mul_(x)
