# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo benchmark test lint format clean

# three cameras the source network has never seen, without and with adaptation: table and picture
demo: $(VENV)/.installed
	$(RUN) -m mgipt_monai.demo --bundle bundle --folder build/demo

# every method over two rounds of the demo's photographs: build/benchmark/report.html
benchmark: $(VENV)/.installed
	$(RUN) -m mgipt_monai.data.demo_stream --folder build/benchmark_sites --count 10 \
	  --cameras low_contrast,warm_vignetted,cold_noisy
	$(RUN) -m monai.bundle run --config_file "['bundle/configs/inference.yaml','bundle/configs/evaluate.yaml',\
	'bundle/configs/benchmark.yaml']" --bundle_root bundle --dataset_dir build/benchmark_sites --rounds 2 \
	  --output_dir build/benchmark

# all tests; those on real images run where MGIPT_TEST_DATA names their folder
test: $(VENV)/.installed
	$(RUN) -m pytest -n 2

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf build $(VENV)

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[demo,test]"
	touch $@
