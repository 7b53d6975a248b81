"""What is asked of the machine."""

import os

import jax
import pytest

from jeagle.devices import MEMORY_SHARE
from jeagle.host import take_memory

NEW, OLD = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.mark.parametrize("given", [{}, {NEW: "0.5"}, {OLD: "0.5"}])
def test_jax_starts_with_most_of_the_memory_unless_told(monkeypatch, given):
    """And never with both names, of which JAX takes one alone; child processes inherit nothing."""
    for name in (NEW, OLD):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before, started = dict(os.environ), []
    monkeypatch.setattr(jax, "devices", lambda: started.append(dict(os.environ)))
    take_memory()
    assert started == ([] if given else [before | {NEW: str(MEMORY_SHARE)}]) and dict(os.environ) == before
