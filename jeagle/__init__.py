"""jeagle: EAGLE speculative decoding for Llama in JAX.

The shape key, used as suffixes (``q_BTKGH``, ``parent_BT``) and in einsum strings everywhere:

    B rows (requests)      T new positions in this call      S cache positions     P path positions (max depth + 1)
    D model width          N query heads   K kv heads         G = N/K               H head width
    F MLP width            V target vocabulary               W draft vocabulary    C children kept per node
    L layers               E experts                          M pages per row       X width of a target feature
    U keys of the suffix (T, or more when a draft level sees the levels above)      O output slots per row
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jeagle.config import EagleConfig, LlamaConfig
    from jeagle.dispatch import Dispatch
    from jeagle.llm import LLM
    from jeagle.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from jeagle.sampling import SamplingParams

_HOME = {
    "Dispatch": "jeagle.dispatch",
    "EagleConfig": "jeagle.config",
    "LlamaConfig": "jeagle.config",
    "LLM": "jeagle.llm",
    "CompletionOutput": "jeagle.outputs",
    "Logprob": "jeagle.outputs",
    "RequestMetrics": "jeagle.outputs",
    "RequestOutput": "jeagle.outputs",
    "SamplingParams": "jeagle.sampling",
}
__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    # Lazy, so that `python -m convert` and `jeagle --help` do not import JAX models they never use.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'jeagle' has no attribute {name!r}")
