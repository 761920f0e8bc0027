# Two commands for everybody: `make demo` and `make test`; each does its own set-up.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test check torture clean

install: .venv/.installed

# torch comes by its version alone: the same pin gives the CPU build or the CUDA build.
.venv/.installed: pyproject.toml .ci/requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'runner needs Python 3.11 or newer')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r .ci/requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: install
	$(BIN)/runner apply recipes/quickstart.yaml
	$(BIN)/runner chat recipes/quickstart.yaml --gguf q4_k_m --compare 3 --max-tokens 100

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

# Kills, faults and full disks at every moment that can be told apart; see CONTRIBUTING.md.
torture: install
	RUNNER_TORTURE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/torture -n 2 --dist worksteal

clean:
	rm -rf .venv artifacts
