#!/bin/bash
# tests/system_mpi.sh mpich|openmpi: a short `make run MPI=system` with that MPI of apt's, whichever /usr/bin/mpirun is.
# Its environment takes all but mpi4py from .venv; mpi4py is built unoptimised where the wheel does not fit.
set -euo pipefail
cd "$(dirname "$0")/.."
mpi=$1 venv=.venv-system-$1
command -v "mpirun.$mpi" >/dev/null || { echo "apt's $mpi is not installed: not tried"; exit 0; }

# Put this MPI's mpirun and mpicc first on the path.
bin=$(mktemp --directory)
trap 'rm -rf "$bin"' EXIT
for tool in mpirun mpicc; do
  printf '#!/bin/sh\nexec %s.%s "$@"\n' "$tool" "$mpi" >"$bin/$tool"
  chmod +x "$bin/$tool"
done

make --no-print-directory MPI=system VENV="$venv" "$venv/bin/python"
echo "$PWD"/.venv/lib/python3*/site-packages >"$(echo "$venv"/lib/python3*/site-packages)/default.pth"
PATH=$bin:$PATH CFLAGS=-O0 make --no-print-directory run MPI=system VENV="$venv" RANKS=4 \
  ARGS="--set run.steps=10 --set run.output=out/system-$mpi --set data.validation_sequences=16"
test -s "out/system-$mpi/run/run.h5"
