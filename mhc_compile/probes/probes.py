"""`Probes`: sample what the streams of a converted model do while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mhc_compile.atomic_write import write_whole
from mhc_compile.diagnostics import MHCError, warn
from mhc_compile.parameters import owners, unwrapped
from mhc_compile.probes.plots import draw
from mhc_compile.probes.recording import Record
from mhc_compile.probes.sample import MATRICES, ROWS, Sample, sample_of


class Probes:
    """Samples every `every`-th step of a converted model, however it is compiled and called.

        probes = mhc_compile.Probes(model, every=50)
        for batch in data:
            with probes.step():
                loss(model(batch)).backward()
        probes.write("probes.jsonl")

    A sampled step runs graphs of its own, each compiled once, with the same kernels and results as those of other
    steps, which are not affected. Outputs, gradients, random states and checkpoints do not change. Sampling
    synchronises with the device once, at the end of the step.

    `model` may be wrapped (torch.compile, DDP), and may be converted by its first call. Under DDP every rank samples
    its own tokens. Raises MHC204 for `every` below 1.
    """

    def __init__(self, model: nn.Module, every: int = 50) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise MHCError("MHC204", f"every={every!r}", way_out="a number of steps, 1 or more")
        self.model = model
        self.every = every
        self.samples: list[Sample] = []
        """The samples so far, in order; a step has one for each stream owner."""
        self.steps = 0
        """The number of steps so far."""
        self._due = True
        self._shown = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enclose one step: all forward and backward passes up to the next optimizer step.

        If no converted part ran in a sampled step, the next one is sampled instead (also after a first call that
        converts the model). Raises MHC231 for a step inside of another one that samples the same model, and MHC410
        after a sampled step where the model is not converted.
        """
        self._due = self._due or self.steps % self.every == 0
        number, self.steps = self.steps, self.steps + 1
        if not self._due:
            yield
            return
        records = self._open()
        try:
            yield
        finally:
            for record in records:
                record.close()
        samples = [sample_of(record, number) for record in records if record.calls]
        self._due = not samples
        self.samples += samples
        if records and not samples:
            warn("MHC230", f"step {number}", stacklevel=4)
        if not records and not owners(unwrapped(self.model)):
            raise MHCError("MHC410", f"{type(unwrapped(self.model)).__name__} holds no stream parameters")

    def _open(self) -> list[Record]:
        distinct = {id(p): (path, p) for path, p in reversed(owners(unwrapped(self.model)).items())}
        records = [Record(path, p) for path, p in reversed(distinct.values())]
        for record in records:
            if record.parameters.probe_slot is not None:
                raise MHCError("MHC231", module=record.owner)
        for record in records:
            record.open()
        return records

    def write(self, path: str | Path) -> None:
        """Write all samples to `path`, one line of JSON for each: the whole file or, where that fails, nothing.

        Numbers have six digits; `mhc_compile.probes.read_samples` and `mhc-compile probe` read the file. Raises MHC413.
        """
        write_whole(Path(path), "".join(sample.line() + "\n" for sample in self.samples), code="MHC413")

    def to_tensorboard(self, writer: Any) -> None:
        """Add the samples since the last call to a `torch.utils.tensorboard.SummaryWriter`.

        Scalars `QUANTITY/OWNER.SITE` (of the streams' own quantities one for each stream) and `QUANTITY/OWNER.LOOK_UP`,
        and the gates as histograms `gates/OWNER.LAYER/STREAM`.
        """
        for sample in self.samples[self._shown :]:
            _add_to_tensorboard(writer, sample)
        self._shown = len(self.samples)

    def plot(self, folder: str | Path) -> list[Path]:
        """Draw the samples into PNG files in `folder` and return them. Raises MHC233 without matplotlib, MHC413.

        For each owner: heat maps of the mean H of every site, gains along the depth, the streams by layer, and the
        gates of memories; of the last sample, separation and gains over all samples too, and the rows that look-ups
        read. For owners in a depth form: the weights of every site's sources, what is read and written along the depth,
        and outputs over all samples.
        """
        return draw(self.samples, Path(folder))


def _add_to_tensorboard(writer: Any, sample: Sample) -> None:
    """Add one sample; mean matrices are only in files and plots."""
    for quantity, values in sample.values.items():
        if quantity == "gates":
            _add_gates(writer, sample, values)
        elif quantity not in MATRICES:
            names = sample.look_ups if quantity in ROWS else sample.sites
            for site, of_site in zip(names, values.tolist(), strict=True):
                tag = f"{quantity}/{f'{sample.owner}.{site}'.strip('.')}"
                figures = {f"{tag}/{i}": x for i, x in enumerate(of_site)} if values.ndim > 1 else {tag: of_site}
                for name, figure in figures.items():
                    writer.add_scalar(name, figure, sample.step)


def _add_gates(writer: Any, sample: Sample, counts: Tensor) -> None:
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
