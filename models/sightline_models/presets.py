"""Named model shapes, and checkpoint folders without weights made from them.

Knows files and numbers. Imports no torch: a client may ask where the demo model lies.
"""

from pathlib import Path


def demo_checkpoint() -> Path:
    """The folder of the bundled model."""
    return Path(__file__).parent / "demo" / "checkpoint"
