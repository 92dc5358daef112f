#!/usr/bin/env bash
# On a machine with an H200 or H100: kernel tests, memory checks, benchmarks. Logs and tables go to $OUT (default: out).
# benchmarks/h200.sh [tests] [memcheck] [kernels] [calibrate] [decode] [prompts] [prompts-small]: only these parts. Each ends
# within ten minutes but for the last, which has five steps and needs the extra "demo".
# "kernels" also measures, once and quietly, what "decode" needs to know of each shape. The runs of "decode" prepare
# side by side and are timed one after another; parts named in BESIDE run while they prepare. LAYERS=16, of the 32 that
# Llama-2-7B has, leaves room for that on 80 GB.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 OUT="${OUT:-out}"
mkdir -p "$OUT"
PARTS="${*:-tests memcheck kernels calibrate decode prompts prompts-small}"
PYTEST=(python3 -m pytest tests/kernels -q -p no:cacheprovider -p no:benchmark)
# thresholds of random layers are chaotic: see the README's limits
DECODE=(python3 benchmarks/decode.py --device cuda --dtype bfloat16 --flops-budget 0.56 --recipe neuron --tolerance 0.6)
FASTEST=(--inductor triton.enable_pdl=1 coordinate_descent_tuning=1) # Inductor as it comes leaves a third unused
TURNS=(--turns "$OUT/turns")
failed=0

part() { # name, seconds, command...
    local name="$1" limit="$2"
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log" && return
    echo "== $name failed"
    return 1
}

run() { # a part by its name
    case "$1" in
    tests)
        local bad=0
        part devices 100 python3 -m pytest tests/test_determinism.py -k two_devices -q -p no:cacheprovider || bad=1
        part tests 400 "${PYTEST[@]}" -n 6 || bad=1
        return "$bad"
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
        part kernels 570 python3 benchmarks/kernels.py --device cuda --dtype bfloat16 --batch 1 2 \
            --shapes llama-2-7b llama-3-8b --densities 0.1 0.3 0.5 0.7 1.0 --csv "$OUT/kernels.csv"
        ;;
    calibrate)
        part calibrate 570 "${DECODE[@]}" --model llama-2-7b --calibration-tokens 32768 --batch
        ;;
    decode) # batches on fewer layers: one more row costs the same in each
        local tasks=()
        for each in ${BESIDE:-}; do
            (flock -s 9 && run "$each") 9>>"$OUT/turns" & # nobody is timed meanwhile
            tasks+=($!)
        done
        part decode-7b 570 "${DECODE[@]}" "${TURNS[@]}" --model llama-2-7b --layers "${LAYERS:-32}" \
            --calibration-tokens 1024 --inductor triton.enable_pdl=1 &
        tasks+=($!)
        part decode-8b 570 "${DECODE[@]}" "${TURNS[@]}" --model llama-3-8b --layers 4 --calibration-tokens 1024 \
            "${FASTEST[@]}" &
        tasks+=($!)
        for model in llama-2-7b llama-3-8b; do
            part "batches-$model" 570 "${DECODE[@]}" "${TURNS[@]}" --model "$model" --layers 4 \
                --calibration-tokens 1024 --batch 1 2 4 8 16 --inductor triton.enable_pdl=1 &
            tasks+=($!)
        done
        local bad=0
        for task in "${tasks[@]}"; do wait "$task" || bad=1; done
        return "$bad"
        ;;
    prompts)
        part prompts 570 python3 benchmarks/prompts.py --device cuda --dtype bfloat16 --recipe neuron --tolerance 0.6 \
            --model llama-2-7b --layers 4 --batch 1 4 --lengths 512 2048 --rounds 41
        ;;
    prompts-small)
        local small=(python3 benchmarks/prompts.py --device cuda --dtype bfloat16 --exclude lm_head)
        small+=(--calibration-tokens 8192 --plan "$OUT/smollm2.safetensors" --lengths 128 512 2048 --rounds 41)
        local bad=0
        part prompts-fixed 570 "${small[@]}" --batch 1 4 || bad=1
        part prompts-symbolic 570 "${small[@]}" --batch 1 4 --dynamic || bad=1
        part prompts-masked 570 "${small[@]}" --batch 4 --mask || bad=1
        part prompts-graphs 570 "${small[@]}" --batch 1 4 --mode reduce-overhead || bad=1
        part prompts-graphs-masked 570 "${small[@]}" --batch 4 --mask --mode reduce-overhead || bad=1
        return "$bad"
        ;;
    *)
        echo "unknown part $1; known: tests memcheck kernels calibrate decode prompts prompts-small" >&2
        exit 2
        ;;
    esac
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
    run "$each" || failed=1
done
exit "$failed"
