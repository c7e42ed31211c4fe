#!/usr/bin/env bash
# GPU tests and benchmarks on one GPU, without a network: four parts of at most 140 seconds each, one Markdown table.
#
#     benchmarks/gpu.sh tests|training|scoring|whole     # one part; without a name all four, one after another
#     SHAPE=tiny ANYWHERE=1 benchmarks/gpu.sh            # a look at the script itself, without a GPU
#
# Results go to the folder OUT (default: gpu_results); the table is written anew after each part, from all that lies
# there. Models are random weights of a shape, made on the GPU; the tokenizer is the demo's. Real files are taken from
# RAYLORA_SHARED_DATA or ../shared/data. A part that fails or runs over its time costs no other part: the table says so,
# and shows the end of what it printed.
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-gpu_results}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
SHAPE=${SHAPE:-llama3-8b}
AMOUNT=() EXPERIMENTS=(--num-files 2 --num-records 160 --probe-steps 6 --num-questions 570 --quantization 8bit)
if [ "${ANYWHERE:-}" ]; then
    AMOUNT=(--most-adapters 2 --steps 1 --batch-size 2 --accumulation 1 --questions 57 --shot-subjects 0 --shot-questions 20 --adapters 2 --batch-sizes 4)
    EXPERIMENTS=(--num-records 8 --probe-steps 1 --num-questions 57)
fi

tests() { "$PYTHON" -m pytest -q -m gpu tests; }

# Of the 140 seconds some are for the start of Python and of CUDA, and for the row that is measured when 110 are over.
training() { "$PYTHON" -m benchmarks.gpu training "$OUT" --shape "$SHAPE" --seconds 110 "${AMOUNT[@]}"; }

scoring() { "$PYTHON" -m benchmarks.gpu scoring "$OUT" --shape "$SHAPE" --seconds 110 "${AMOUNT[@]}"; }

whole() { # the command reads its model from a folder
    local model
    model=$("$PYTHON" -m benchmarks.common "$SHAPE" | tail -n 1) &&
        "$PYTHON" -m benchmarks.end_to_end --model "$model" --alone "${EXPERIMENTS[@]}" --json "$OUT/end-to-end" &&
        "$PYTHON" -m benchmarks.gpu whole "$OUT" --found "$OUT/end-to-end"
}

# A part runs in a bash of its own, that its time can end.
[ "${INSIDE:-}" ] && { "$1"; exit $?; }

[ "${ANYWHERE:-}" ] || "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no GPU that torch can use"; exit 1; }
mkdir -p "$OUT"
touch "$OUT/parts"
failed=0
[ $# -gt 0 ] || set -- tests training scoring whole
for name in "$@"; do
    case $name in tests | training | scoring | whole) ;; *) echo "$name: no part; they are tests, training, scoring, whole"; exit 2 ;; esac
    if [ "$name" = whole ] && [ "0$(df --output=avail -BG /dev/shm 2>/dev/null | tail -n 1 | tr -dc 0-9)" -ge 20 ]; then
        # Room for the 16 GB of the model in memory: from a disk they may take minutes.
        export RAYLORA_CACHE=/dev/shm/raylora-benchmarks-$$
        trap 'rm -rf "$RAYLORA_CACHE"' EXIT
    fi
    rm -f "$OUT/$name.json" "$OUT/$name.log"
    started=$SECONDS
    INSIDE=1 timeout --kill-after=5 140 "$PWD/benchmarks/gpu.sh" "$name" >"$OUT/$name.log" 2>&1
    code=$?
    sed -i "/^$name|/d" "$OUT/parts"
    echo "$name|$([ $code = 0 ] && echo ok || echo "failed ($code)")|$((SECONDS - started))" >>"$OUT/parts"
    [ $code = 0 ] || failed=1
done
"$PYTHON" -m benchmarks.gpu table "$OUT"
exit $failed
