#!/usr/bin/env bash
# On a machine with an H200: kernel tests, memory checks of the kernels, kernel benchmarks. Logs and tables in $OUT.
# benchmarks/h200.sh [tests] [memcheck] [kernels]: only these parts. Each part ends within ten minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 OUT="${OUT:-out}"
mkdir -p "$OUT"
PARTS="${*:-tests memcheck kernels}"
failed=0

part() { # name, seconds, command...
    local name="$1" limit="$2"
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log" || { echo "== $name failed"; failed=1; }
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
for each in $PARTS; do
    case "$each" in
    tests)
        part tests 300 python3 -m pytest tests/kernels -q -p no:cacheprovider -p no:benchmark
        ;;
    memcheck)
        if command -v compute-sanitizer >/dev/null; then
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 part memcheck 400 compute-sanitizer --tool memcheck --error-exitcode 9 \
                --target-processes all python3 -m pytest tests/kernels -q -p no:cacheprovider -p no:benchmark \
                -k "cuda and (plain_form or tiny or live)"
        else
            echo "== memcheck: no compute-sanitizer on this machine, not run"
        fi
        ;;
    kernels)
        part kernels 420 python3 benchmarks/kernels.py --device cuda --dtype bfloat16 \
            --shapes llama-2-7b llama-3-8b --csv "$OUT/kernels.csv"
        ;;
    *)
        echo "unknown part $each; known: tests memcheck kernels" >&2
        exit 2
        ;;
    esac
done
exit "$failed"
