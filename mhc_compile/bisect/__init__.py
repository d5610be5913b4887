"""Find the first pass and the first site at which a model's results leave the tolerance."""

from mhc_compile.bisect.bisection import Bisection, Checked, Finding
from mhc_compile.bisect.find import bisect

__all__ = ["Bisection", "Checked", "Finding", "bisect"]
