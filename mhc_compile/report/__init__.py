"""Show what the compiler sees in a model: its streams and sites, what each pass did, where a stream was lost."""

from mhc_compile.report.examine import inspect
from mhc_compile.report.report import Report

__all__ = ["Report", "inspect"]
