#!/bin/bash
# tests/aarch64.sh [FOLDER]: builds the kernels for 64-bit ARM with a cross compiler and runs
# tests/kernels/test_kernels_cpu.py under emulation for each of its instruction sets, so that a change can
# be checked without an ARM machine. Emulation tells right from wrong, nothing about speed.
#
# Needs Debian, for the compiler and for an ARM Python of the same release. That Python and its
# packages are fetched into FOLDER (200 MB; a temporary one if none is given) and found there by
# the next run: two cores take 2 minutes the first time, 1 after that. Nothing is installed.
set -euo pipefail

missing=
for need in aarch64-linux-gnu-g++:g++-aarch64-linux-gnu qemu-aarch64:qemu-user cmake:cmake make:make; do
  command -v "${need%%:*}" > /dev/null || missing+=" ${need#*:}"
done
if [ -n "$missing" ]; then
  echo "tests/aarch64.sh needs these Debian packages:$missing" >&2
  exit 1
fi

tree=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -gt 0 ]; then
  mkdir -p "$1"
  folder=$(cd "$1" && pwd)
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
root=$folder/root site=$folder/site python=$folder/python
cd "$folder"

# An apt command for ARM, with lists and cache of its own: the machine's stay as they are.
arm() {
  local command=$1; shift
  "$command" -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root \
    -o Dir::State::lists="$folder/apt/lists" -o Dir::State::status=/dev/null \
    -o Dir::Cache="$folder/apt/cache" "$@"
}

fetch_python() {
  mkdir -p apt/lists/partial apt/cache/archives/partial debs
  arm apt-get update
  local version
  version=$(arm apt-cache show python3-minimal | sed -n 's/^Version: \(3\.[0-9]*\).*/\1/p' | head -n 1)
  (cd debs && arm apt-get download "python$version-minimal" "libpython$version-minimal" \
    "libpython$version-stdlib" "libpython$version-dev" \
    libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8)
  for deb in debs/*.deb; do dpkg -x "$deb" "$root"; done
  python3 -m pip install -q --target "$site" --python-version "$version" --implementation cp \
    --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --only-binary=:all: \
    nanobind numpy gguf pytest hypothesis
  printf '#!/bin/sh\nexec qemu-aarch64 -cpu max -L "%s" "%s" "$@"\n' \
    "$root" "$root/usr/bin/python$version" > "$python"
  chmod +x "$python"  # last: its presence says that all is there
}

build() {
  local headers=("$root"/usr/include/python3.*)
  cmake -S "$tree" -B build -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS="-idirafter $root/usr/include" \
    -DPython_EXECUTABLE="$python" -DPython_INCLUDE_DIR="${headers[0]}" \
    -Dnanobind_DIR="$site/nanobind/cmake" > build.log
  cmake --build build -j "$(nproc)" >> build.log
  rm -rf "$site/fwdllm"
  cmake --install build --prefix "$site" >> build.log
  touch "$site/fwdllm/__init__.py"  # the package's own would import the engine and all it needs
  (cd "$tree" && find kernels -name '*.py' -exec cp --parents -t "$site/fwdllm" {} +)
}

[ -e "$python" ] || fetch_python
build
# FWDLLM_ISA, set, also keeps test_every_isa from starting a Python of ARM without emulation.
for isa in neon_i8mm neon_dotprod portable; do
  echo "$isa"
  FWDLLM_ISA=$isa PYTHONPATH=$site:$tree/tests PYTHONDONTWRITEBYTECODE=1 "$python" -m pytest -q \
    -p no:cacheprovider -c /dev/null --rootdir="$folder" "$tree/tests/kernels/test_kernels_cpu.py"
done
