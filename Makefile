# Everything lives in .venv; `make demo` and `make test` set it up by themselves.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Where pip is told to look for wheels, uv is told too; else uv takes torch's CPU build by itself.
TORCH := $(if $(PIP_FIND_LINKS),$(PIP_FIND_LINKS:%=--find-links %),--torch-backend cpu)

.PHONY: setup demo test unit world chaos lint format docs pins clean

setup: $(INSTALLED)

$(INSTALLED): requirements/cpu.txt requirements/overrides.txt requirements/install.sh pyproject.toml
	@bash requirements/install.sh $(PYTHON) $(TORCH)

# Settings go behind it: make demo ARGS="run.folder=/tmp/runs run.seed=2"
demo: $(INSTALLED)
	@$(BIN)/c2f-ray demo $(ARGS)

test: lint
	$(BIN)/python -m pytest -n 2

# The target for every day: no Ray, no engine.
unit: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 tests/unit

# Trains the tiny world anew; to ship it, move it to c2f_ray/tiny/data.
world: $(INSTALLED)
	$(BIN)/python -m c2f_ray.tiny.train .cache/world

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

# Writes docs/configuration.md and configs/recipe.schema.json anew from the models in c2f_ray/recipe/.
docs: $(INSTALLED)
	$(BIN)/python -m c2f_ray.recipe.document

# Writes the pins anew from pyproject.toml.
pins: $(INSTALLED)
	$(BIN)/uv pip compile --quiet --upgrade --no-annotate --no-header --extra cpu --extra tasks --extra dev $(TORCH) \
		--override requirements/overrides.txt --output-file requirements/cpu.txt pyproject.toml
	$(BIN)/uv pip compile --quiet --upgrade --no-annotate --no-header --extra gpu \
		--output-file requirements/gpu.txt pyproject.toml

clean:
	rm -rf .venv .cache runs
