#!/bin/bash
# tests/aarch64.sh [FOLDER]: builds a wheel for 64-bit ARM with a cross compiler and, under emulation, runs
# tests/kernels/test_kernels_cpu.py for each of its instruction sets and tunes the bundled model, so
# that a change can be checked without an ARM machine. Emulation tells right from wrong, nothing
# about speed.
#
# Needs Debian, for the compiler and for an ARM Python of the same release. That Python, its packages
# and a llama.cpp are fetched and built in FOLDER (600 MB; a temporary one if none is given) and found
# there by the next run: two idle cores take about half an hour the first time, most of it for
# llama.cpp. Nothing is installed.
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
root=$folder/root site=$folder/site python=$folder/python toolchain=$folder/toolchain.cmake
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
    libc6 libgcc-s1 libgomp1 libstdc++6 zlib1g libexpat1 libffi8 libsqlite3-0 libssl3)
  for deb in debs/*.deb; do dpkg -x "$deb" "$root"; done
  python3 -m pip install -q --target "$site" --python-version "$version" --implementation cp \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux_2_26_aarch64 --platform manylinux2014_aarch64 --only-binary=:all: \
    pip scikit-build-core nanobind numpy gguf typer rich matplotlib diskcache jinja2 pytest hypothesis
  # -0 makes it start itself, and so the emulator, for processes of its own.
  printf '#!/bin/sh\nexport PYTHONHOME="%s"\nexec qemu-aarch64 -cpu max -0 "%s" -L "%s" "%s" "$@"\n' \
    "$root/usr" "$python" "$root" "$root/usr/bin/python$version" > "$python"
  chmod +x "$python"  # last: its presence says that all is there
}

cross() {
  cat > "$toolchain" <<- END
	set(CMAKE_SYSTEM_NAME Linux)
	set(CMAKE_SYSTEM_PROCESSOR aarch64)
	set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
	set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
	set(CMAKE_CXX_FLAGS_INIT "-idirafter $root/usr/include")
	END
}

# The wheel, by the ARM Python, so that it is named and laid out as on such a machine.
build_wheel() {
  rm -rf wheels
  PYTHONPATH=$site CMAKE_TOOLCHAIN_FILE=$toolchain CMAKE_GENERATOR="Unix Makefiles" \
    CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) "$python" -m pip wheel -v --no-index --no-deps \
    --no-build-isolation -C build-dir="$folder/build" -w wheels "$tree" > wheel.log 2>&1
  ls wheels
  rm -rf "$site"/fwdllm*
  python3 -m zipfile -e wheels/*.whl "$site"
}

# Of llama-cpp-python what tokenizes and generates; without images.
build_llama() {
  python3 -m pip download -q --no-deps --no-binary :all: -d llama 'llama-cpp-python>=0.3.36'
  tar -C llama --strip-components 1 -xf llama/*.tar.gz
  cmake -S llama/vendor/llama.cpp -B llama/build -DCMAKE_TOOLCHAIN_FILE="$toolchain" \
    -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_TOOLS=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
    -DCMAKE_INSTALL_RPATH='$ORIGIN' -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON > llama.log
  cmake --build llama/build --target llama -j "$(nproc)" >> llama.log
  mkdir -p llama/llama_cpp/lib
  cp llama/build/bin/*.so* llama/llama_cpp/lib
  cp -r llama/llama_cpp "$site"  # last: its presence says that all is there
}

[ -e "$python" ] || fetch_python
cross
build_wheel
# FWDLLM_ISA, set, also keeps test_every_isa from repeating all of it.
for isa in neon_i8mm neon_dotprod portable; do
  echo "$isa"
  FWDLLM_ISA=$isa PYTHONPATH=$site:$tree/tests/support PYTHONDONTWRITEBYTECODE=1 "$python" -m pytest -q \
    -p no:cacheprovider -c /dev/null --rootdir="$folder" "$tree/tests/kernels/test_kernels_cpu.py"
done

[ -e "$site/llama_cpp" ] || build_llama
export PYTHONPATH=$site XDG_CACHE_HOME=$folder/cache
rm -rf run adapter.gguf
assets=$site/fwdllm/assets
"$python" -m fwdllm doctor
"$python" -m fwdllm tune "$assets/fwdllm-tiny.gguf" "$assets/pirate.train.jsonl" -o adapter.gguf \
  --run-dir run --steps 20 --held-out 16 --json > tune.json
"$python" -m fwdllm generate "$assets/fwdllm-tiny.gguf" "A cow" --adapter adapter.gguf --max-tokens 20
python3 -I - <<- END
	import json
	loss = json.load(open("tune.json"))
	print("held-out loss", loss["loss_before"], "to", loss["loss_after"])
	assert loss["loss_after"] < loss["loss_before"] - 0.1
	END
