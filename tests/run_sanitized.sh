#!/usr/bin/env bash
# Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests: ragged shapes (one
# image, rows or columns of one pixel, middle widths 8 to 1152 in steps of 8, odd sizes with stride 2) on every
# instruction-set tier, NaN-filled scratch. Needs gcc and an environment with torch, pytest, cmake, ninja and pybind11.
#
#   PYTHON=.venv/bin/python tests/run_sanitized.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=${BUILD:-build/sanitized}

"$python" -m cmake -S . -B "$build" -G Ninja -DPFNAS_SANITIZE=ON -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >/dev/null
"$python" -m cmake --build "$build"

# The package beside the sanitized _C, away from any other build.
rm -rf "$build/python"
cp -r python "$build/python"
rm -f "$build"/python/pfnas_fast/_C*.so
cp "$build"/_C*.so "$build/python/pfnas_fast/"

if [ $# -eq 0 ]; then
  set -- tests/supernet/test_fused_block.py tests/supernet/test_prepared.py tests/ops
fi
libraries="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)"
# Python and torch keep memory until the end of the process, so leaks are not looked for.
LD_PRELOAD="$libraries" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONPATH="$PWD/$build/python" "$python" -m pytest -q -p no:cacheprovider -k "not cuda" "$@"
