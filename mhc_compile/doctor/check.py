"""One line of the doctor's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is well, what was seen, and what to do where it is not."""

    name: str
    state: State
    detail: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{self.state:<4}  {self.name:<16}  {self.detail}" + (f"\n{'':24}do: {self.todo}" if self.todo else "")
