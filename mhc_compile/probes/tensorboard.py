"""Samples as TensorBoard's scalars and histograms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mhc_compile.probes.sample import Sample


def add(writer: Any, sample: Sample) -> None:
    """Add one sample to a `torch.utils.tensorboard.SummaryWriter`; mean matrices are only in files and plots."""
    for quantity, values in sample.values.items():
        if quantity == "gates":
            _gates(writer, sample, values)
        elif quantity != "mix":
            for site, of_site in zip(sample.sites, values.tolist(), strict=True):
                tag = f"{quantity}/{f'{sample.owner}.{site}'.strip('.')}"
                figures = {f"{tag}/{i}": x for i, x in enumerate(of_site)} if values.ndim > 1 else {tag: of_site}
                for name, figure in figures.items():
                    writer.add_scalar(name, figure, sample.step)


def _gates(writer: Any, sample: Sample, counts: Tensor) -> None:
    bins = counts.shape[-1]
    middles = [(i + 0.5) / bins for i in range(bins)]
    for layer, streams in zip(sample.layers, counts.tolist(), strict=True):
        for i, of_stream in enumerate(streams):
            writer.add_histogram_raw(
                f"gates/{f'{sample.owner}.{layer}'.strip('.')}/{i}",
                min=0.0, max=1.0, num=sum(of_stream),
                sum=sum(c * m for c, m in zip(of_stream, middles, strict=True)),
                sum_squares=sum(c * m * m for c, m in zip(of_stream, middles, strict=True)),
                bucket_limits=[(k + 1) / bins for k in range(bins)],
                bucket_counts=of_stream,
                global_step=sample.step,
            )  # fmt: skip
