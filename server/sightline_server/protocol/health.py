"""What ``/health`` and ``/ready`` answer."""

from typing import Literal

from pydantic import BaseModel


class Status(BaseModel):
    status: Literal["ok", "ready", "starting", "restarting", "draining"]
