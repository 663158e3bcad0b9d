# Needs Python 3.11 or newer, git, gcc and make. Nothing is installed outside .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.lctrain-installed

.PHONY: install demo test check

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lctrain needs Python 3.11 or newer, found " + sys.version.split()[0] + ": name one with make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	@test ! -e runs/demo || mv -v runs/demo runs/demo.$$(date +%Y%m%d-%H%M%S)
	$(BIN)/lctrain train experiment=demo run_dir=runs/demo

test: export OMP_NUM_THREADS = 1
test: install
	@status=0; \
	$(BIN)/python -m pytest tests/slurm || status=1; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/slurm || status=1; \
	exit $$status

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run slurm/*.sbatch slurm/*.sh tests/slurm/node-init
