# make demo   everything from nothing: .venv, install, build, start Triton, ask it about a photo, stop;
#             then train, build and ask a small network, and draw what it answers: demo.png
# make serve  the full-size network, until Ctrl-C
# make test   all tests
# make containers  build and run the images in a real Docker engine: 10 minutes
# make lint   ruff (lint and format), mypy, and pip-audit where it can look advisories up
# make load   sweep the load with perf_analyzer: 15 minutes (ARGS=--help for the rest)
# make bench  the served model against a bare loop, the eager network and other servers: 10 minutes
# make soak   mixed traffic for 30 minutes, every answer checked (ARGS=--help for the rest)
# make fuzz   coverage-guided fuzzing of the image decoder for 5 minutes (ARGS=--help for the rest)
# make bench-host  what feeds a GPU: decoding, resizing and Triton, and bare loops of others: 8 minutes
# make bench-edge  what the edge (Envoy) adds to a call, and how it keeps tenants apart: 4 minutes
# make bench-gpu  the network on a GPU, bare and served, and the cores that feed it: 8 minutes
# make bench-gpu-kit  all of that in a folder, for a machine with a GPU and without a network
# make clean  remove what all of these have made

.DEFAULT_GOAL := demo
SHELL := /bin/sh
BIN := .venv/bin
INSTALLED := .venv/installed
INSTALLED_DEV := .venv/installed-dev
INSTALLED_BENCH := .venv-bench/installed
INSTALLED_BENCH_HOST := .venv-bench/installed-host
BUILT := models/build_report.json
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo serve test containers lint load bench soak fuzz format clean bench-edge bench-gpu bench-gpu-kit bench-host

demo: $(BUILT)
	$(BIN)/python tools/demo.py

serve: $(BUILT)
	@exec $(BIN)/vit-server --model-repository models

# Three files at a time: most of a test is waiting for a server. JOBS=0 takes one after the other.
JOBS := 3
test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not alone"
	$(BIN)/python -m pytest -m alone

# Not part of `test`: it wants a Docker engine, or root and Debian's to start one. `-s` shows progress.
containers: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -v -s tests/containers

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy builder/vit_builder client/vit_client server/vit_server
	$(BIN)/python tools/audit.py

# Nothing is built for a server that is elsewhere.
load: $(if $(findstring --url,$(ARGS)),,$(BUILT)) $(INSTALLED_DEV)
	$(BIN)/python -m bench.load $(ARGS)

bench: $(BUILT) $(INSTALLED_DEV) $(INSTALLED_BENCH)
	$(BIN)/python -m bench $(ARGS)

bench-host: $(INSTALLED_DEV) $(INSTALLED_BENCH_HOST)
	$(BIN)/python -m bench.host $(ARGS)

bench-edge: $(INSTALLED_DEV)
	$(BIN)/python -m bench.edge $(ARGS)

bench-gpu: $(INSTALLED_DEV)
	$(BIN)/python -m bench.gpu $(ARGS)

bench-gpu-kit: $(INSTALLED_DEV)
	$(BIN)/python -m bench.gpu.kit $(or $(ARGS),gpu-kit)

soak: $(INSTALLED_DEV)
	$(BIN)/python -m tests.reliability.soak $(ARGS)

fuzz: $(INSTALLED_DEV)
	$(BIN)/python -m tests.reliability.fuzz $(ARGS)

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-bench models my-models digits demo.png gpu-kit sbom embedding.f32 request.json \
		request.bin answer.json sheet.png

# Modules are compiled when they are first imported: the demo needs few, and starts half a minute earlier.
$(INSTALLED): constraints.txt tools/find-python.sh */pyproject.toml examples/requirements.txt
	@python=$$(tools/find-python.sh) && echo "Making .venv with $$python" && "$$python" -m venv .venv
	@echo "Installing into .venv: a minute where torch comes without CUDA, else several GB …"
	$(PIP) install --quiet --no-compile -c constraints.txt -e builder -e 'server[embedded]' \
		-e 'client[all]' -r examples/requirements.txt
	@touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements-dev.txt bench/load/requirements.txt
	$(PIP) install --quiet --no-compile -c constraints.txt -r requirements-dev.txt
	@# All of it here: where tests import it, what a compiler warns of would be an error.
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	@touch $@

# The servers that a user would pick instead, apart from .venv.
$(INSTALLED_BENCH): $(INSTALLED) bench/peers/requirements.txt
	@echo "Installing the peers into .venv-bench …"
	$(BIN)/python -m venv .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt \
		-r bench/peers/requirements.txt -e builder
	@touch $@

$(INSTALLED_BENCH_HOST): $(INSTALLED_BENCH) bench/host/requirements.txt
	@echo "Installing OpenCV and NVIDIA DALI into .venv-bench (0.5 GB) …"
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt \
		-r bench/host/requirements.txt
	@touch $@

# Rebuilt when the builder or the template changes. Where the hub can't be reached, the model has
# random weights and the builder says so.
$(BUILT): $(INSTALLED) $(wildcard builder/vit_builder/*.py model_repository/*/config.pbtxt model_repository/*/1/*.py)
	$(BIN)/vit-builder --output models
	@touch $@
