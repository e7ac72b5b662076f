"""A static performance model for compiled NVIDIA kernels; no GPU needed.

It reads a cubin, decodes the schedule that ptxas wrote into every instruction, finds the hot loop, counts
what each pipe of an SM has to do in it, and simulates the resident warps. So it tells which pipe bounds a
loop, which of two kernels should be faster and why, and how far from the chip's peak a loop can get. How far
to trust it is said in docs/gpu-model.md; its absolute figures are too high and are only compared.
"""

from .chips import CHIPS, DEFAULT, occupancy
from .model import Analysis, analyse, notes, report
from .sass import Kernel, load

__all__ = ["CHIPS", "DEFAULT", "Analysis", "Kernel", "analyse", "load", "notes", "occupancy", "report"]
