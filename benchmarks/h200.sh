#!/usr/bin/env bash
# On a machine with an H200: kernel tests, memory checks, benchmarks. Logs and tables go to $OUT (default: out).
# benchmarks/h200.sh [tests] [memcheck] [kernels] [calibrate] [decode] [batches]: only these parts. Each ends within ten
# minutes. decode takes the plan that calibrate left in $PLAN, and makes one of few tokens if there is none.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 OUT="${OUT:-out}"
mkdir -p "$OUT"
PLAN="${PLAN:-$OUT/llama-2-7b.safetensors}"
PARTS="${*:-tests memcheck kernels calibrate decode batches}"
PYTEST=(python3 -m pytest tests/kernels -q -p no:cacheprovider -p no:benchmark)
# thresholds of random layers are chaotic: see the README's limits
DECODE=(python3 benchmarks/decode.py --device cuda --dtype bfloat16 --flops-budget 0.56 --recipe neuron --tolerance 0.6)
failed=0

part() { # name, seconds, command...
    local name="$1" limit="$2"
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log" || { echo "== $name failed"; failed=1; }
}

# The backend is found by its entry point: where the package is not installed, one beside it is enough.
if ! python3 -c 'from importlib.metadata import version; version("rana-compile")' 2>/dev/null; then
    info="$(mktemp -d)"
    mkdir "$info/rana_compile-0.1.0.dist-info"
    printf 'Metadata-Version: 2.1\nName: rana-compile\nVersion: 0.1.0\n' >"$info/rana_compile-0.1.0.dist-info/METADATA"
    printf '[torch_dynamo_backends]\nrana = rana_compile.backend:rana\n' \
        >"$info/rana_compile-0.1.0.dist-info/entry_points.txt"
    export PYTHONPATH="$PWD:$info"
fi
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
for each in $PARTS; do
    case "$each" in
    tests)
        part tests 400 "${PYTEST[@]}" -n 6
        ;;
    memcheck)
        if command -v compute-sanitizer >/dev/null; then
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 part memcheck 400 compute-sanitizer --tool memcheck --error-exitcode 9 \
                --target-processes all "${PYTEST[@]}" -k "cuda and (plain_form or tiny or live) or tiles"
        else
            echo "== memcheck: no compute-sanitizer on this machine, not run"
        fi
        ;;
    kernels)
        part kernels 420 python3 benchmarks/kernels.py --device cuda --dtype bfloat16 \
            --shapes llama-2-7b llama-3-8b --densities 0.1 0.3 0.5 0.7 1.0 --csv "$OUT/kernels.csv"
        ;;
    calibrate)
        part calibrate 500 "${DECODE[@]}" --model llama-2-7b --calibration-tokens 32768 --plan "$PLAN" --batch
        ;;
    decode) # against Inductor as the mode has it, then with both models' options at their fastest
        part decode 300 "${DECODE[@]}" --model llama-2-7b --plan "$PLAN" --calibration-tokens 1024
        part decode-tuned 300 "${DECODE[@]}" --model llama-2-7b --plan "$PLAN" --calibration-tokens 1024 \
            --inductor coordinate_descent_tuning=1 triton.enable_pdl=1
        ;;
    batches) # eight layers: one compile each
        for model in llama-2-7b llama-3-8b; do
            part "batches-$model" 280 "${DECODE[@]}" --model "$model" --layers 8 --calibration-tokens 1024 \
                --batch 1 2 4 8 16
        done
        ;;
    *)
        echo "unknown part $each; known: tests memcheck kernels calibrate decode batches" >&2
        exit 2
        ;;
    esac
done
exit "$failed"
