"""Samples as TensorBoard's scalars and histograms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mhc_compile.probes.sample import Sample


def add(writer: Any, sample: Sample) -> None:
    """Add one sample to a `torch.utils.tensorboard.SummaryWriter`; mean matrices are left to files and plots."""
    for quantity, values in sample.values.items():
        if quantity == "gates":
            _gates(writer, sample, values)
        elif quantity != "mix":
            for site, found in zip(sample.sites, values, strict=True):
                tag = f"{quantity}/{f'{sample.owner}.{site}'.strip('.')}"
                for name, figure in ((tag, found),) if found.ndim == 0 else _each(tag, found):
                    writer.add_scalar(name, float(figure), sample.step)


def _each(tag: str, values: Tensor) -> list[tuple[str, Tensor]]:
    return [(f"{tag}/{i}", value) for i, value in enumerate(values)]


def _gates(writer: Any, sample: Sample, counts: Tensor) -> None:
    bins = counts.shape[-1]
    middles = [(i + 0.5) / bins for i in range(bins)]
    for layer, streams in zip(sample.layers, counts.tolist(), strict=True):
        for i, held in enumerate(streams):
            writer.add_histogram_raw(
                f"gates/{f'{sample.owner}.{layer}'.strip('.')}/{i}",
                min=0.0, max=1.0, num=sum(held),
                sum=sum(c * m for c, m in zip(held, middles, strict=True)),
                sum_squares=sum(c * m * m for c, m in zip(held, middles, strict=True)),
                bucket_limits=[(k + 1) / bins for k in range(bins)],
                bucket_counts=held,
                global_step=sample.step,
            )  # fmt: skip
