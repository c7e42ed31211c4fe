#!/usr/bin/env bash
# All GPU tests and benchmarks on one GPU in under 9 minutes, without a network: one Markdown table in gpu_results.md.
#
#     benchmarks/gpu.sh [FOLDER]      # results go to FOLDER (default: gpu_results)
#
# Models are random weights of a shape; the tokenizer is the demo's. Real files are taken from RAYLORA_SHARED_DATA or
# ../shared/data. A part that fails or runs over its time is a line of the table, and costs no other part.
set -u
cd "$(dirname "$0")/.."
OUT=${1:-gpu_results}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no GPU that torch can use"; exit 1; }
DEADLINE=$((SECONDS + 530))

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 left=$((DEADLINE - SECONDS)) started=$SECONDS code
    shift 2
    [ "$left" -lt 10 ] && { echo "| $name | not run: out of time | |" >>"$OUT/parts.md"; return; }
    timeout "$((limit < left ? limit : left))" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    echo "| $name | $([ $code = 0 ] && echo ok || echo "failed ($code)") | $((SECONDS - started)) |" >>"$OUT/parts.md"
}

printf '| part | result | seconds |\n| --- | --- | --- |\n' >"$OUT/parts.md"
part tests 90 "$PYTHON" -m pytest -q -m gpu tests
for quantization in none 8bit 4bit; do
    part "training-$quantization" 80 "$PYTHON" -m benchmarks.training --shape llama3-8b --quantization "$quantization" \
        --num-examples 64 --rounds 1 --trl-way padding-free --json "$OUT/training-$quantization.json"
done
part adapters-4bit 60 "$PYTHON" -m benchmarks.training --shape llama3-8b --quantization 4bit --adapters 8 \
    --num-examples 128 --rounds 1 --json "$OUT/adapters-4bit.json"
part mmlu-8bit 60 "$PYTHON" -m benchmarks.mmlu --shape llama3-8b --quantization 8bit --rounds 1 --json "$OUT/mmlu-8bit.json"
part features-8bit 60 "$PYTHON" -m benchmarks.features --shape llama3-8b --quantization 8bit --rounds 1 \
    --json "$OUT/features-8bit.json"

"$PYTHON" - "$OUT" <<'PY'
import json, sys
from pathlib import Path

import torch

folder = Path(sys.argv[1])
lines = [f"# {torch.cuda.get_device_name(0)}, torch {torch.__version__}", "", (folder / "parts.md").read_text()]
for file in sorted(folder.glob("*.json")):
    result = json.loads(file.read_text())
    names = list(result["rows"][0])
    lines += [f"## {result['title']}", "", f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for row in result["rows"]:
        lines.append("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    lines.append("")
(folder / "gpu_results.md").write_text("\n".join(lines))
print("\n".join(lines))
PY
