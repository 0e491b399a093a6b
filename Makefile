# Two commands do everything on a fresh machine with Python 3.11+, git and make:
#   make quickstart   meta-train an optimizer on real digits and compare it with tuned ordinary ones
#   make test         tests, doctests, lint, types
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart pretrained test lint types recipes comparison benchmarks clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
		(echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..." && false)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $(READY)

quickstart: $(READY)
	$(BIN)/lightning-metaopt run recipes/quickstart/digits.yaml --output outputs/quickstart --overwrite

# The meta-trained rules that ship with the package, made anew (half a minute each for the first two, about ten for the third, on a quiet core).
pretrained: $(READY)
	$(BIN)/lightning-metaopt meta-train recipes/quickstart/digits.yaml --output lightning_metaopt/pretrained/metamd-digits.safetensors --overwrite
	$(BIN)/lightning-metaopt meta-train recipes/m_l2o/lasso_rule.yaml --output lightning_metaopt/pretrained/ml2o-lasso.safetensors --overwrite
	$(BIN)/lightning-metaopt meta-train recipes/m_l2o/rnnprop_small.yaml --output lightning_metaopt/pretrained/rnnprop-small.safetensors --overwrite

test: $(READY) lint types
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# Everything that the tables in recipes/quickstart and recipes/dco report (about fifteen minutes on two cores).
recipes: $(READY)
	for recipe in recipes/quickstart/*.yaml recipes/dco/*.yaml; do \
		$(BIN)/lightning-metaopt run $$recipe --output outputs/$$(basename $$recipe .yaml) --overwrite || exit 1; \
	done

# What docs/results reports (an estimated hour on two cores); fetches sentence pairs from a Debian package. Stopped, it goes on where it was.
comparison: $(READY)
	$(BIN)/lightning-metaopt data prepare photo_crops
	$(BIN)/python tools/prepare_package_data.py ding_en_de
	$(BIN)/lightning-metaopt run recipes/comparison/small.yaml --output outputs/small --workers 2

benchmarks: $(READY)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) outputs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
