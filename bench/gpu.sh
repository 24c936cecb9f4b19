#!/usr/bin/env bash
# All tests, checks and benchmarks that want a GPU, in under ten minutes: bash bench/gpu.sh OUT [--only PART ...]
# bench/gpu.py says what there is. Needs no network, and installs nothing; --dry tries it all with tiny shapes, also
# without a GPU.
set -euo pipefail
began=$(date +%s) # the first import of torch may take half a minute
out=$(mkdir -p "${1:?usage: bash bench/gpu.sh OUT [--only PART ...] [--dry]}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
FUSEDOPT_COMMIT=${FUSEDOPT_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
export FUSEDOPT_COMMIT PYTHONUNBUFFERED=1

# This checkout, whether it is installed, or another one is, or none.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

python3 -m fusedopt info 2>&1 | tee "$out/info.txt" || true
nvidia-smi >>"$out/info.txt" 2>&1 || true
python3 bench/gpu.py "$out" --since "$began" "$@" 2>&1 | tee -a "$out/log.txt"
