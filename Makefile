# Two commands on a fresh machine: `make demo` and `make test`. Each sets itself up (a few minutes, once).
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/demo
# On Linux without an NVIDIA GPU, PyTorch's own CPU builds save gigabytes:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
PROFILE ?= laptop
REPORT ?= runs/report-$(PROFILE)
# What `make stick` fills, and for which other systems:  make stick TARGETS="windows-3.12 macos-3.12"
STICK ?= runs/stick
TARGETS ?=
# More parameters of lesson 07 for `make report`:  make report PROFILE=report ARGS="-p data /data/SEN12MS"
ARGS ?=

BIN = $(VENV)/bin
NEEDS = settings.ini setup.py constraints.txt

.PHONY: demo report stick test test-all browser notebooks lab site pretrained export readme clean

# a core for each thread of a training: on two cores, with another program busy, a step takes .2 s instead of up to 9
demo pretrained: export OMP_PROC_BIND = true

## main job: train on the built-in Sentinel-2 sample for ten minutes and paint patches
demo: $(VENV)/class.done
	mkdir -p $(RUN)
	cd nbs && $(abspath $(BIN))/papermill 07_train_gpu.ipynb $(abspath $(RUN))/07_train_gpu.ipynb \
	  --kernel python3 --log-output --no-progress-bar -p profile laptop -p run $(abspath $(RUN)) -p resume True

## the report's experiment: three schedules, trained, judged, compared; half an hour on two cores, goes on where it was stopped
report: $(VENV)/class.done
	$(BIN)/python .ci/report.py $(REPORT) --profile $(PROFILE) $(ARGS)

## all tests: package and notebooks in sync, every lesson executed, pytest, a headless smoke run of the training notebook
test: $(VENV)/dev.done $(VENV)/site.done notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -rs -m "not heavy" tests

## the same with every kill and every fuzzed file
test-all: $(VENV)/dev.done $(VENV)/site.done notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q tests

## every widget of every lesson, in JupyterLab and a real browser, moved by keyboard: pictures in tests/artifacts/browser
browser: $(VENV)/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -rs -m browser tests

notebooks: $(VENV)/dev.done
	cd $(CURDIR) && OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print

## open the course
lab: $(VENV)/class.done
	$(BIN)/jupyter lab nbs

## fill $(STICK), for a USB stick: the course and all it needs in a room without a network, on this system and on TARGETS
stick: $(VENV)/class.done
	$(BIN)/python -m pip install -q uv
	$(BIN)/python .ci/stick.py $(STICK) $(TARGETS) --pip-args="$(PIP_ARGS)"

## the course as a web site: _docs/index.html
site: $(VENV)/site.done
	$(BIN)/python .ci/site/build.py _docs

## make the network that comes with the package anew: half an hour on two cores with matrix units, else an hour or two
pretrained: $(VENV)/dev.done
	mkdir -p runs/box
	cd nbs && $(abspath $(BIN))/papermill 07_train_gpu.ipynb ../runs/box/07_train_gpu.ipynb --kernel python3 --no-progress-bar \
	  -p profile box -p run ../runs/box -p resume True
	$(BIN)/python .ci/pretrained.py runs/box

## after editing a notebook: write the package, clean the notebooks, write the README
export: $(VENV)/dev.done
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python .ci/readme.py
	$(BIN)/python .ci/exercises.py

$(VENV)/class.done: $(NEEDS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e ".[class]"
	touch $@

# The peer library asks for torchvision, which the course does without: install the library alone. nbgrader makes stubs here, and
# adds its buttons to JupyterLab, where no student needs them.
$(VENV)/dev.done: $(NEEDS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q $(PIP_ARGS) --no-deps denoising-diffusion-pytorch==1.10.12
	$(BIN)/jupyter labextension disable --level sys_prefix @jupyter/nbgrader
	touch $@ $(VENV)/class.done

# Neither PyTorch nor the package: the site is made of the stored notebooks and of text.
$(VENV)/site.done: .ci/site/requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -r .ci/site/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) _docs build *.egg-info
