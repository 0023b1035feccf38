# The commands of this project. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOP := $(VENV)/.installed-develop
DEMO := $(VENV)/.installed-demo
PEERS_VENV := .venv-peers
PEERS := $(PEERS_VENV)/.installed
# Where the packages of an environment lie.
PATHS := import sysconfig as s; print(*{s.get_path(name) for name in ("purelib", "platlib")}, sep="\n")
# The rooms that `make fast` leaves out: it tries the core, which is a promise.
NO_CORE := cli concepts evaluation formats hub interpret research serving space

.DEFAULT_GOAL := help
# Images for containers often set it. The tests start Python some hundred times, and each would compile all that it
# imports once more: a quarter of the time of `make fast`.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help install quickstart demo fast test coverage peers gpu quality docs copy format clean

# What pip has to say about its own version and about paths of scripts is nothing that a reader here can use.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_WARN_SCRIPT_LOCATION := 1
# The theme announces other products of its makers with every build.
export NO_MKDOCS_2_WARNING := 1

help:  ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(DEVELOP)  ## Make .venv and install the package with what tests and checks need

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV), once: a few minutes, most of it torch."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $(INSTALLED)

$(DEVELOP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV), once: a few minutes, most of it torch."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,quality,docs,interpreter]"
	touch $(INSTALLED) $(DEVELOP)

$(DEMO): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[space]"
	touch $(DEMO)

# What is in .venv is not installed again, torch above all: a path file shows it to the other environment, whose own
# packages come before it.
$(PEERS): $(DEVELOP)
	$(BIN)/python -m venv $(PEERS_VENV)
	$(BIN)/python -c '$(PATHS)' > "$$($(PEERS_VENV)/bin/python -c '$(PATHS)' | head -n 1)/main.pth"
	$(PEERS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test,peers]"
	# Its pins are older than ours; what the tests run works without them.
	$(PEERS_VENV)/bin/python -m pip install --quiet --no-deps sae-bench==0.6.0 tabulate
	# Comes along with them, often for another torch, and then breaks transformers; nothing here uses it.
	$(PEERS_VENV)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $(PEERS)

quickstart: $(INSTALLED)  ## Train an SAE of the story model, print its tree of concepts, steer a story (2 to 4 minutes, offline)
	$(BIN)/hf-msae quickstart

demo: $(DEMO)  ## Look inside it in the browser: steer, explore, walk the tree (offline)
	$(BIN)/hf-msae demo

fast: $(DEVELOP)  ## Run the tests of a minute: of the core rooms, those that start no process and no browser
	$(BIN)/python -m pytest -n auto -m "not slow" --durations=25 $(addprefix --ignore=tests/,$(NO_CORE))

test: $(DEVELOP)  ## Run all tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=25

# TESTS=tests/steering measures one room; a run of all takes several times as long as `make test`.
TESTS ?=
coverage: $(DEVELOP)  ## Measure which lines and branches the tests run; a page a file in build/coverage/html
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[coverage]"
	rm -rf build/coverage
	-COVERAGE_CORE=ctrace $(BIN)/python -m coverage run -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TESTS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage json --quiet
	$(BIN)/python -m coverage html --quiet
	$(BIN)/python -m coverage report --skip-covered --sort cover

peers: $(PEERS)  ## Test imports and exports against the other libraries themselves, in an environment of their own
	$(PEERS_VENV)/bin/python -m pytest -m peer tests/formats tests/research/test_synth_bench_peers.py

gpu: $(INSTALLED)  ## Check on this machine's GPU what is promised there, in ten minutes at most; writes benchmarks/results/
	$(BIN)/python benchmarks/gpu_check.py

quality: $(DEVELOP) copy  ## Lint, formatting, types, transformers' rules for Hub code, and links of the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/installed $(BIN)/mypy -p hf_msae
	$(BIN)/mlinter modeling/
	$(BIN)/mkdocs build --quiet --strict

docs: $(DEVELOP) copy  ## Build the documentation as a site, in build/site
	$(BIN)/mkdocs build --strict

# Neither mypy nor the reference's generator sees through an editable install's import hook: they read an ordinary one.
copy: $(DEVELOP)
	rm -rf build/installed
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/installed .

format: $(DEVELOP)  ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment, runs and caches
	rm -rf $(VENV) $(PEERS_VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
