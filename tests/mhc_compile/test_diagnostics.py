"""Errors and warnings are the same in another process: ranks, workers of tests and of data loaders hand them on."""

from __future__ import annotations

import pickle
import warnings

import pytest

from mhc_compile.diagnostics import TABLE, MHCError, MHCWarning, warn


@pytest.mark.parametrize("code", ["MHC101", "MHC302"])
def test_an_error_can_be_pickled(code: str) -> None:
    error = MHCError(code, "the detail", node="%add", module="layers.0", source="model.py:3")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, MHCError)
    assert (str(again), again.code, again.detail) == (str(error), code, "the detail")


def test_a_warning_can_be_pickled_and_made_again_from_its_arguments() -> None:
    warning = MHCWarning("MHC302", "2 sites")
    for again in (pickle.loads(pickle.dumps(warning)), MHCWarning(*warning.args)):
        assert (str(again), again.code, again.detail) == (str(warning), "MHC302", "2 sites")


def test_a_warning_names_its_code_and_the_way_out() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("MHC302", "2 sites")
    assert str(caught[0].message).startswith(f"MHC302 {TABLE['MHC302'].title}: 2 sites")
    assert TABLE["MHC302"].way_out in str(caught[0].message)
