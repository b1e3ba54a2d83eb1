# The only list of developer commands. Everything happens in .venv, which they make.
# Needs Python 3.11 or newer and make. PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VENV ?= .venv
REPORT ?= report
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PLUGINS = -e backends/torch -e backends/flax -e plugins/numpy -e plugins/tiny -e plugins/transformers -e conformance_tests
STORY = tiny "Once upon a time" --dtype float32 --temperature 0.6 --top-p 0.9 --seed 7 --max-new-tokens 80

.PHONY: demo test lint bench full-size clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@mkdir -p $(REPORT)
	$(VENV)/bin/gemma-hub generate $(STORY) --backend torch > $(REPORT)/story.torch.txt
	$(VENV)/bin/gemma-hub generate $(STORY) --backend flax > $(REPORT)/story.flax.txt
	@cat $(REPORT)/story.torch.txt
	@cmp $(REPORT)/story.torch.txt $(REPORT)/story.flax.txt && echo "torch and flax wrote the same story."
	$(VENV)/bin/gemma-hub parity tiny --backends torch,flax --html $(REPORT)/parity.html --json $(REPORT)/parity.json
	@echo "Open $(REPORT)/parity.html in a browser."

# In two processes, which take about as long: the suite's own tests with those of the documents, and
# all others. With one thread each for matrices: threads that wait for one another on busy cores take
# many times as long.
test: export OMP_NUM_THREADS = 1
test: export OPENBLAS_NUM_THREADS = 1
test: $(VENV)/.installed-tests
	@mkdir -p $(REPORT)
	@$(VENV)/bin/python -m pytest -q conformance_tests docs > $(REPORT)/conformance_tests.txt 2>&1 & suite=$$!; \
	trap "kill $$suite" INT TERM; \
	$(VENV)/bin/python -m pytest -q tests backends plugins; rest=$$?; \
	wait $$suite; suite=$$?; \
	cat $(REPORT)/conformance_tests.txt; \
	exit $$((suite | rest))

lint: $(VENV)/.installed-tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Ours, Transformers and the limits of this machine; BENCH="--shape 2b --peer llama.cpp" adds to it.
bench: $(VENV)/.installed-tests
	@mkdir -p $(REPORT)
	$(VENV)/bin/gemma-hub bench --dtype bfloat16 --dtype float32 --peer transformers $(BENCH) \
		--json $(REPORT)/bench.json --markdown $(REPORT)/bench.md --plot $(REPORT)/bench.svg

# A model of the size of gemma-2b converted there and back: 16 GB of disk, some minutes.
full-size: $(VENV)/.installed-tests
	$(VENV)/bin/python bench/convert_full_size.py $(REPORT)/full-size

clean:
	rm -rf $(VENV) $(REPORT)

PROJECTS = pyproject.toml constraints.txt $(wildcard backends/*/pyproject.toml plugins/*/pyproject.toml conformance_tests/pyproject.toml)

$(VENV)/.installed: $(PROJECTS)
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("gemma_hub needs Python 3.11 or newer; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); a few minutes the first time."
	$(PIP) -e . $(PLUGINS)
	@touch $@

$(VENV)/.installed-tests: $(VENV)/.installed
	$(PIP) -e ".[test,lint]" $(PLUGINS)
	@touch $@
