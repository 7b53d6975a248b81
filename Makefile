# jeagle: every target is complete on a fresh machine with Python 3.12 or newer.
#
#   make demo               SmolLM2-135M-Instruct with and without speculation (fetches 93 MB once)
#   make test               ruff, mypy and pytest on the pinned versions of constraints.txt
#   make test JAX=newest    pytest on the newest JAX and Flax that pyproject.toml allows
#   make test-h100-compile  compile kernels, decode loops and a training step for H100s, without one (fetches 142 MB once)
#   make test-triton        run the Triton kernels in Triton's interpreter (fetches 198 MB once); from then on
#                           test-h100-compile compiles them too
#   make lint               ruff and mypy alone
#   make clean              remove environments and caches (models/ stays)
#
# PYTHON=/path/to/python chooses the interpreter that the environment is made from.

JAX ?= pinned
ifeq ($(JAX),pinned)
VENV := .venv
PINS := constraints.txt
else ifeq ($(JAX),newest)
VENV := .venv-newest
PINS := $(VENV)/constraints.txt
else
$(error JAX must be "pinned" (the default) or "newest", not "$(JAX)")
endif

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --no-input
INSTALLED := $(VENV)/.installed

H100 := .h100
TRITON := .triton

.PHONY: demo test test-h100-compile test-triton lint clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/jeagle demo

# On the newest JAX only the tests run: its annotations are not what mypy was pinned against. Two processes, a file of
# tests each: most of the time is XLA compiling, on one core. Of the files below it is nearly all, as each of their many
# programs runs for milliseconds: those are compiled without LLVM's optimisations, in a third less time.
COMPILING := $(patsubst %,tests/test_%.py,bench_generate bench_peers bench_queue bench_train costs disaggregated dispatch distributed drafting \
	exactness fp8_weights grouped_mlp llama4 llm loop serving sharding switching synthetic train_head training \
	training_faults training_moe tree_table unroll)
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

test: $(INSTALLED) $(if $(filter pinned,$(JAX)),lint)
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0" $(PYTEST) $(COMPILING)
	$(PYTEST) $(addprefix --ignore=,$(COMPILING))

# JAX's CUDA plugin in a folder of its own: in the environment it would look for a GPU whenever JAX starts. Where it
# cannot be fetched the tests say so and are skipped.
test-h100-compile: $(INSTALLED)
	@test -d $(H100)/jax_plugins || { \
		version=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)'); \
		echo "Fetching jax-cuda13-plugin $$version into $(H100) ..."; \
		$(PIP) install --no-deps --target $(H100) jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version || rm -rf $(H100); }
	JEAGLE_H100_PLUGIN=$(H100) PYTHONPATH=$(abspath $(TRITON)) $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/test_h100_compile.py tests/test_mesh_compile.py

# In a folder of their own too, as the wheels are larger than all that jeagle needs. The versions are those tested.
test-triton: $(INSTALLED)
	@test -d $(TRITON)/triton || { \
		echo "Fetching triton and jax-triton into $(TRITON) ..."; \
		$(PIP) install --no-deps --target $(TRITON) triton==3.7.1 jax-triton==0.4.1 || { \
			rm -rf $(TRITON); echo "Triton could not be fetched (there are wheels for Linux alone): nothing was tested." >&2; exit 1; }; }
	PYTHONPATH=$(abspath $(TRITON)) $(BIN)/python -m pytest -q tests/test_attention_triton.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-newest .h100 .triton build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt $(BIN)/python
	@echo "Installing jeagle and what it needs into $(VENV) (about a minute) ..."
	$(if $(filter newest,$(JAX)),@grep -vE '^(jax|jaxlib|flax)==' constraints.txt > $(PINS))
	@$(PIP) install $(if $(filter newest,$(JAX)),--upgrade) --constraint $(PINS) --editable '.[dev]'
	@$(BIN)/python -c 'import sys, jax, flax; print(f"Python {sys.version.split()[0]}, jax {jax.__version__}, flax {flax.__version__}")'
	@touch $@

# A command that exists may still not run (pyenv shims), so every candidate is tried. 3.12 first: the pins are its.
$(BIN)/python:
	@for candidate in "$(PYTHON)" python3.12 python3.13 python3.14 python3 python; do \
		test -n "$$candidate" || continue; \
		"$$candidate" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 || continue; \
		echo "Creating $(VENV) with $$("$$candidate" --version)"; \
		rm -rf $(VENV); \
		exec "$$candidate" -m venv $(VENV); \
	done; \
	echo "jeagle needs Python 3.12 or newer (with its venv module: python3-venv on Debian), and none was found." >&2; \
	echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	exit 1
