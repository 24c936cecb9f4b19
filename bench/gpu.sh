#!/usr/bin/env bash
# All tests, then the benchmarks, on a machine with a GPU: bash bench/gpu.sh OUT
# Most important first, so that a run that is cut short still tells something. Needs no network.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash bench/gpu.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)

# A checkout that is not installed: run in a copy where "import fusedopt" finds the kernels.
export FUSEDOPT_COMMIT=${FUSEDOPT_COMMIT:-$(git describe --always --dirty 2>/dev/null)}
if ! python3 -c "import fusedopt.kernels" 2>/dev/null; then
    copy=$(mktemp -d)
    cp -r fusedopt kernels tests bench pyproject.toml "$copy"
    cp -r kernels "$copy/fusedopt/kernels"
    cd "$copy"
    export PYTHONPATH="$copy"
fi

python3 -m fusedopt info | tee "$out/info.txt"
python3 -m pytest tests -q --durations=10 -p no:cacheprovider 2>&1 | tee "$out/tests.txt" | tail -40
python3 bench/step.py --models gpt2 small1000 --seconds 2 --save --out "$out/history.csv" | tee "$out/bench.txt"
python3 bench/step.py --models one50m resnet50 groups465 mlp --seconds 1 --save --out "$out/history.csv" | tee -a "$out/bench.txt"

echo "--- ratios ours / best of torch ---"
grep -E "default" "$out/bench.txt" | awk '{print $1, $2, $3, $8, $9}' | column -t
grep -E "passed|failed" "$out/tests.txt" | tail -1
