"""Several processes, on one host or on many, that run one program together.

Every process runs the same script: it joins with ``connect`` before JAX is used for anything else, makes the same
``LLM`` over the devices of all of them and gives it the same prompts. All get the same results.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["HEARTBEAT_SECONDS", "DeviceMemoryError", "PeerError", "connect", "explained", "of_first_process"]

# A process that says nothing for so long is taken for dead, and the others are ended: JAX's default of 100 s would
# leave a service that many hang for minutes.
HEARTBEAT_SECONDS = 30


class PeerError(ConnectionError):
    """Another process of this program failed, said in one sentence."""


class DeviceMemoryError(MemoryError, ValueError):
    """A device has no room for weights, caches or what a round computes, said in one sentence."""


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    patience_seconds: int = 300,
) -> None:
    """Join the other processes. Must come before any array is made.

    Args:
      coordinator: host:port of process 0; the port must be free there. num_processes, process_id: how many, and which
        (0, 1, ..) this one is. All three None: what SLURM, Open MPI or Kubernetes say, as JAX detects it.
      heartbeat_seconds: a process silent for so long is dead, and the others end with a message that says so.
      patience_seconds: how long to wait for the others to join.

    Raises ValueError for settings that do not fit together, PeerError when the others do not come.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"{', '.join(given)} belong together: give {' and '.join(missing)} too, or none of them")
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"num_processes must be at least 1, got {num_processes}")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"process_id must lie in 0..{num_processes - 1}, got {process_id}")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=heartbeat_seconds,
            initialization_timeout=patience_seconds,
        )
    except ValueError as error:  # nothing was given, and no cluster was found
        raise ValueError(
            f"no cluster was detected ({str(error).splitlines()[0]}); give coordinator, num_processes and process_id"
        ) from error
    except RuntimeError as error:
        if "before any JAX" in str(error):
            raise ValueError("connect() must come before JAX is used; call it first in the script") from error
        if "only be called once" in str(error):
            raise ValueError("connect() was called before in this process; call it once") from error
        reason = str(error).splitlines()[0]
        raise PeerError(f"the other processes did not join within {patience_seconds} s ({reason})") from error


def of_first_process(numbers: Any) -> np.ndarray:
    """Process 0's numbers on every process: what a clock, a measurement or chance says, all must take alike."""
    if jax.process_count() == 1:
        return np.asarray(numbers)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(numbers)))


FEWER_ROWS = (
    "lower max_batch_size or max_model_len, halve the caches with kv_cache_dtype='fp8', or split the model with "
    "tensor_parallel_size: `jeagle plan` says what fits"
)


@contextlib.contextmanager
def explained(mend: str = FEWER_ROWS) -> Iterator[None]:
    """Turn what the runtime says when memory is full (mend: what helps then) or a peer is gone into one sentence. Other
    errors of this process's own pass as they are: all where it is alone, those of arguments and resources in any case.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        if re.match("RESOURCE_EXHAUSTED: .*(out of memory|allocat)", reason, re.IGNORECASE):
            raise DeviceMemoryError(f"a device's memory is full ({reason.partition(': ')[2]}); {mend}") from error
        if jax.process_count() == 1 or reason.startswith(("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")):
            raise
        raise PeerError(
            f"process {jax.process_index()} of {jax.process_count()} lost another process ({reason}); see what that "
            "one said, then start all of them again"
        ) from error
