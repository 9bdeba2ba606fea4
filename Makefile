# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
MGIPT = $(VENV)/bin/mgipt
LABEL_VENV ?= .venv-label
# label/ has a stand-in for torchvision
LABEL_RUN = PYTHONPATH=label $(LABEL_VENV)/bin/python -W ignore
LABEL_APP = build/label/monaibundle

.PHONY: demo benchmark bench bench-volumes label label-test test attack docs lint types format clean

# three cameras the source network has never seen, without and with adaptation: table and picture
demo: $(VENV)/.installed
	$(MGIPT) demo --folder build/demo

# every method over two rounds of the demo's photographs: build/benchmark/report.html
benchmark: $(VENV)/.installed
	$(RUN) -m mgipt_monai.data.demo.stream --folder build/benchmark_sites --count 10 \
	  --cameras low_contrast,warm_vignetted,cold_noisy
	$(MGIPT) benchmark build/benchmark_sites build/benchmark --rounds 2

# seconds and memory per image, as published and as here, on a small network; all of them, in up to an hour:
# make bench BENCH="--networks resunet34,unet,unet3d --repeats 2"
bench: $(VENV)/.installed
	$(RUN) benchmarks/speed.py $(BENCH)

# the same of volumes in sliding windows: make bench-volumes BENCH="--networks unet,segresnet --sizes 256,512x512x200"
bench-volumes: $(VENV)/.installed
	$(RUN) benchmarks/volumes.py $(BENCH)

# a MONAI Label server with the bundle and photographs of one camera: http://127.0.0.1:8000 (Python 3.11, about 3 GB)
label: $(LABEL_VENV)/.installed
	[ -d $(LABEL_APP) ] || $(LABEL_RUN) -m monailabel.main apps --download --name monaibundle --output build/label
	$(LABEL_RUN) -m mgipt_monai label-app --app $(LABEL_APP)
	$(LABEL_RUN) -m mgipt_monai.data.demo.stream --folder build/label/photographs --cameras warm_vignetted --count 16
	$(LABEL_RUN) -m monailabel.main start_server --app $(LABEL_APP) \
	  --studies build/label/photographs/warm_vignetted/images --host 127.0.0.1 --port 8000 \
	  --conf models mgipt_segmentation --conf skip_trainers true --conf zoo_source local

# such a server, asked through HTTP
label-test: $(LABEL_VENV)/.installed
	$(LABEL_RUN) label/check_server.py

# all tests; those on real images run where MGIPT_TEST_DATA names their folder
test: $(VENV)/.installed
	$(RUN) -m pytest -n 2 --dist worksteal

# the attack suite in full: kills at every few lines, bombs, damaged files, races, anything in any file (tests/attack)
attack: $(VENV)/.installed
	MGIPT_ATTACK=full $(RUN) -m pytest -n 2 tests/attack tests/stream

# the documentation as a site: build/docs/index.html
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

$(VENV)/.docs-installed: $(VENV)/.installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.installed
	$(RUN) -m mypy mgipt_monai

format: $(VENV)/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf build $(VENV) $(LABEL_VENV)

$(VENV)/.installed: setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[demo,test]"
	touch $@

$(LABEL_VENV)/.installed: label/requirements.txt setup.cfg
	$(PYTHON) -m venv $(LABEL_VENV)
	$(LABEL_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(LABEL_VENV)/bin/python -m pip install --quiet --no-deps --requirement label/requirements.txt --editable .
	touch $@
