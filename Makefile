# make demo   everything from nothing: .venv, install, build, start Triton, ask it about a photo, stop
# make serve  the same, and stays up until Ctrl-C
# make test   all tests
# make lint   ruff (lint and format) and mypy
# make clean  remove .venv and the built models

.DEFAULT_GOAL := demo
SHELL := /bin/sh
BIN := .venv/bin
INSTALLED := .venv/installed
INSTALLED_DEV := .venv/installed-dev
BUILT := models/build_report.json
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo serve test lint format clean

demo: $(BUILT)
	$(BIN)/python demo.py

serve: $(BUILT)
	@exec $(BIN)/vit-server --model-repository models

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy builder/vit_builder client/vit_client server/vit_server

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv models

$(INSTALLED): constraints.txt find-python.sh */pyproject.toml
	@python=$$(./find-python.sh) && echo "Making .venv with $$python" && "$$python" -m venv .venv
	@echo "Installing into .venv: a minute where torch comes without CUDA, else several GB …"
	$(PIP) install --quiet -c constraints.txt -e builder -e server -e 'client[all]'
	@touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements-dev.txt
	$(PIP) install --quiet -c constraints.txt -r requirements-dev.txt
	@touch $@

# Rebuilt when the builder or the template changes. Where the hub can't be reached, the model has
# random weights and the builder says so.
$(BUILT): $(INSTALLED) $(wildcard builder/vit_builder/*.py model_repository/*/config.pbtxt model_repository/*/1/*.py)
	$(BIN)/vit-builder --output models
	@touch $@
