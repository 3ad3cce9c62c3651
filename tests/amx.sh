#!/bin/bash
# tests/amx.sh: builds the kernels with AMX's tile instructions emulated in C++ and runs the kernels' tests
# on them, so that they can be checked on a machine without AMX. It tells right from wrong, nothing
# about speed. Where there is AMX, `make test` runs the same tests on it.
#
# Needs what `make test` has installed in .venv; builds in build/amx, of which nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python build=$PWD/build/amx
package=$("$python" -c "import fwdllm, os; print(os.path.dirname(fwdllm.__file__))")
"$python" -m pip install -q --target "$build/tools" nanobind
cmake -S . -B "$build" -DFWDLLM_EMULATE_AMX=ON -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" \
  -Dnanobind_DIR="$(PYTHONPATH=$build/tools "$python" -m nanobind --cmake_dir)" > "$build/log"
cmake --build "$build" -j "$(nproc)" >> "$build/log"

rm -rf "$build/site"
mkdir "$build/site"
cp -r "$package" "$build/site/fwdllm"
rm "$build"/site/fwdllm/kernels/cpu/_native*
cp "$build"/_native* "$build/site/fwdllm/kernels/cpu"
# FWDLLM_ISA, set, also keeps test_every_isa from repeating all of it.
FWDLLM_ISA=amx PYTHONPATH=$build/site "$python" -m pytest -q -p no:cacheprovider \
  tests/kernels/test_kernels_cpu.py tests/kernels/test_attention.py tests/kernels/test_tangents.py \
  tests/kernels/test_vjps.py "$@"
