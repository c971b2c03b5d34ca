# Everything lives in .venv; `make demo` and `make test` set it up by themselves.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Where pip is told to look for wheels, uv is told too; else uv takes torch's CPU build by itself.
TORCH := $(if $(PIP_FIND_LINKS),$(PIP_FIND_LINKS:%=--find-links %),--torch-backend cpu)

.PHONY: setup demo test chaos lint format pins clean

setup: $(INSTALLED)

$(INSTALLED): requirements/cpu.txt requirements/overrides.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("c2f_ray needs Python 3.11 or later") if sys.version_info < (3, 11) else None'
	@echo "installing about 5 GB into .venv: some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==0.13.8
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode $(TORCH) \
		--override requirements/overrides.txt -r requirements/cpu.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: $(INSTALLED)
	$(BIN)/c2f-ray demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Every role killed in every phase, a seeded soak of twenty kills, a node taken away: half an hour on 2 busy cores.
chaos: $(INSTALLED)
	$(BIN)/python -m pytest tests/chaos -s

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the pins anew from pyproject.toml.
pins: $(INSTALLED)
	$(BIN)/uv pip compile --quiet --upgrade --no-annotate --no-header --extra cpu --extra tasks --extra dev $(TORCH) \
		--override requirements/overrides.txt --output-file requirements/cpu.txt pyproject.toml
	$(BIN)/uv pip compile --quiet --upgrade --no-annotate --no-header --extra gpu \
		--output-file requirements/gpu.txt pyproject.toml

clean:
	rm -rf .venv .cache runs
