#!/usr/bin/env bash
# All GPU tests and benchmarks on one GPU in under 9 minutes, without a network: one Markdown table in gpu_results.md.
#
#     benchmarks/gpu.sh [FOLDER]      # results go to FOLDER (default: gpu_results)
#     SHAPE=tiny ANYWHERE=1 benchmarks/gpu.sh     # a look at the script itself, without a GPU
#
# Models are random weights of a shape; the tokenizer is the demo's. Real files are taken from RAYLORA_SHARED_DATA or
# ../shared/data. A part that fails or runs over its time costs no other part: the table says so, and shows the end of
# what it printed.
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=${1:-gpu_results}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
SHAPE=${SHAPE:-llama3-8b}
EXAMPLES=96 ADAPTERS=8 SMALL_DATASETS=256 EXPERIMENT=()
[ "${ANYWHERE:-}" ] && EXAMPLES=16 ADAPTERS=2 SMALL_DATASETS=8 EXPERIMENT=(--num-records 8 --probe-steps 1 --num-questions 57)
mkdir -p "$OUT"
[ "${ANYWHERE:-}" ] || "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no GPU that torch can use"; exit 1; }
DEADLINE=$((SECONDS + 530))

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 left=$((DEADLINE - SECONDS)) started=$SECONDS code
    shift 2
    [ "$left" -lt 10 ] && { echo "| $name | not run: out of time | |" >>"$OUT/parts.md"; return; }
    timeout "$((limit < left ? limit : left))" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    echo "| $name | $([ $code = 0 ] && echo ok || echo "failed ($code)") | $((SECONDS - started)) |" >>"$OUT/parts.md"
}

rm -f "$OUT"/*.json "$OUT"/*.md "$OUT"/*.log
printf '| part | result | seconds |\n| --- | --- | --- |\n' >"$OUT/parts.md"
part model 60 "$PYTHON" -m benchmarks.common "$SHAPE"
part tests 75 "$PYTHON" -m pytest -q -m gpu tests
for quantization in none 8bit 4bit; do
    part "training-$quantization" 65 "$PYTHON" -m benchmarks.training --shape "$SHAPE" --quantization "$quantization" \
        --num-examples "$EXAMPLES" --rounds 1 --json "$OUT/training-$quantization.json"
done
part adapters 55 "$PYTHON" -m benchmarks.training --shape "$SHAPE" --adapters "$ADAPTERS" --num-examples "$SMALL_DATASETS" --rounds 1 \
    --trl-way padding-free --json "$OUT/adapters.json"
part mmlu 60 "$PYTHON" -m benchmarks.mmlu --shape "$SHAPE" --num-questions 114 --batch-sizes 16 --rounds 1 \
    --json "$OUT/mmlu.json"
part end-to-end 120 "$PYTHON" -m benchmarks.end_to_end --model "$(tail -n 1 "$OUT/model.log")" \
    "${EXPERIMENT[@]}" --json "$OUT/end-to-end.json"

"$PYTHON" - "$OUT" <<'PY'
import json, sys
from pathlib import Path

import torch

folder = Path(sys.argv[1])
name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
lines = [f"# {name}, torch {torch.__version__}", "", (folder / "parts.md").read_text()]
for file in sorted(folder.glob("*.json")):
    result = json.loads(file.read_text())
    names = list(result["rows"][0])
    lines += [f"## {result['title']}", "", f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for row in result["rows"]:
        lines.append("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    lines.append("")
for log in sorted(folder.glob("*.log")):
    if f"| {log.stem} | failed" in lines[2]:
        lines += [f"## The end of {log.name}", "", "```", *log.read_text().splitlines()[-8:], "```", ""]
(folder / "gpu_results.md").write_text("\n".join(lines))
print("\n".join(lines))
PY
! grep -q "failed\|not run" "$OUT/parts.md"
