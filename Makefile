# Targets never change name. Two that matter: `make serve` runs Baton, `make test` proves it.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PROTO_VENV := .venv-protos
PIP := -q --disable-pip-version-check

.PHONY: help setup serve fmt check check-protos test protos lines bench-engine bench-transfer bench-handover simulate ray-up-test clean

serve: $(VENV)/.runtime            ## create the environment, install, serve the demo model (ARGS="..." goes to `baton serve`)
	@exec $(BIN)/baton serve $(ARGS)

help:                              ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-15s %s\n", $$1, $$2 }' Makefile | sort

test: $(VENV)/.dev                 ## unit, contract, integration and Ray tests
	$(BIN)/python -m pytest $(ARGS)

setup: $(VENV)/.dev                ## everything a developer needs

fmt: $(VENV)/.dev                  ## mend what ruff can mend
	$(BIN)/ruff check -q --fix . || true
	$(BIN)/ruff format -q .

check: $(VENV)/.dev check-protos   ## lint, format, types, import directions, stubs up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

protos: $(PROTO_VENV)/.done        ## regenerate the committed stubs
	protos/generate.sh $(PROTO_VENV)/bin/python

check-protos: $(PROTO_VENV)/.done  ## are the committed stubs what their .proto generates?
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && protos/generate.sh $(PROTO_VENV)/bin/python "$$out" && \
	for file in protos/*_pb2*; do \
	  cmp -s "$$file" "$$out/$$file" || { echo "$$file is not what its .proto generates: run make protos"; exit 1; }; \
	done

bench-transfer: $(VENV)/.dev       ## KV transfer beside a bare copy and a bare TCP loop; status 1 where a target is missed
	@$(BIN)/python -m bench.transfer --check $(ARGS)

bench-handover: $(VENV)/.dev       ## P7 in a real 1P1D cluster: exposed transfer and hand-over of every request; status 1 as above
	@$(BIN)/python -m bench.handover --check $(ARGS)

lines:                             ## sizes per file, largest first
	@git ls-files '*.py' | grep -v _pb2 | xargs wc -l | sort -rn | head -60

bench-engine: $(VENV)/.dev         ## the engine beside vLLM CPU and llama.cpp, where their Pythons are given (ARGS="--help")
	@$(BIN)/python -m bench.engine $(ARGS)

clean:                             ## remove environments and caches
	rm -rf $(VENV) $(PROTO_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install $(PIP) -e .
	$(BIN)/python -m engine.kernels.build && $(BIN)/python -m kvtransfer.native.library
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install $(PIP) -e '.[dev]'
	$(BIN)/python -m engine.kernels.build && $(BIN)/python -m kvtransfer.native.library
	@touch $@ $(VENV)/.runtime

$(PROTO_VENV)/.done: Makefile
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install $(PIP) 'grpcio-tools==1.76.0' 'setuptools<81'
	@touch $@

ray-up-test: $(VENV)/.dev          ## a real `ray up` on hosts made of namespaces (root; Debian's openssh-server, iproute2, rsync)
	BATON_RAY_UP=long $(BIN)/python -m pytest -s -q tests/ray/test_ray_up.py $(ARGS)

simulate: $(VENV)/.dev             ## SEEDS=n simulated runs (MODE=safety or liveness), or one SEED=s; status 1 on a violation
	@$(BIN)/python -m tests.simulation.run $(if $(SEED),--seed $(SEED)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(MODE),--mode $(MODE)) $(ARGS)
