"""Sample what the streams of a converted model do while it trains."""

from mhc_compile.probes.probes import Probes
from mhc_compile.probes.sample import Sample, read_samples

__all__ = ["Probes", "Sample", "read_samples"]
