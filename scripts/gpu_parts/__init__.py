"""The parts of ``scripts/gpu_suite.py``. Each has ``measure(rows, settings)`` and runs in processes of its own."""
