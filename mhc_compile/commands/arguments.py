"""Arguments that several commands take, as types."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from mhc_compile.overrides import CompileOverrides, StreamOverrides

Model = Annotated[str, Parameter(help="A checkpoint folder, a config.json, or the id of a Hub repository.")]
Streams = Annotated[StreamOverrides | None, Parameter(name="*")]
Compiling = Annotated[CompileOverrides | None, Parameter(name="*")]
Passes = Annotated[str | None, Parameter(help="The passes to use in place of the usual ones: docs/options.md.")]
Positive = Annotated[int, Parameter(validator=Number(gte=1))]
