"""What NVIDIA's Xid numbers mean for a run."""

from __future__ import annotations

import dataclasses

_OF_A_PROGRAM = frozenset({13, 31, 43, 45, 68, 69, 94, 109})
"""The program that ran dies or has died, the device goes on."""
_WARNINGS = frozenset({63, 92})
"""The device goes on, and so does what runs on it."""

_MEANING = {
    48: "double-bit memory error: reset the GPU",
    61: "micro-controller breakpoint: reset the GPU, update its driver",
    62: "micro-controller halt: reset the GPU, update its driver",
    63: "memory row remapping recorded: reset the GPU soon",
    64: "memory row remapping failed: replace the GPU",
    74: "NVLink error: check the link or bridge, reset the GPU",
    79: "the GPU has fallen off the bus: check its power, slot and temperature, then reboot",
    92: "many single-bit memory errors: reset the GPU soon",
    95: "uncontained memory error: reset the GPU",
    119: "the GPU's system processor timed out: reset the GPU",
    120: "the GPU's system processor failed: reset the GPU",
    140: "unrecovered memory error: reset the GPU",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Xid:
    """An error that the driver reported for a device."""

    uuid: str
    number: int

    @property
    def loses_device(self) -> bool:
        """Whether nothing can run on it any more; unknown errors are taken for that."""
        return self.number not in _OF_A_PROGRAM | _WARNINGS

    def __str__(self) -> str:
        return f"Xid {self.number}, {self.meaning}"

    @property
    def meaning(self) -> str:
        if self.number in _OF_A_PROGRAM:
            return "an error of the program that ran on it"
        return _MEANING.get(self.number, "see NVIDIA's list of Xid errors")
