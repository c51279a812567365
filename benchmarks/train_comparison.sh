#!/usr/bin/env bash
# Train the controlled comparison (recipes/comparison/): every recipe from the same base on the same rows, steps and seed.
#     bash benchmarks/train_comparison.sh SEED STEPS [--only RECIPE] [refusion train options, such as --set model.attention=sdpa]
# Paths: WORK (scratch of the machine), DATA (files of benchmarks/prepare_data.py and, where there are, rg_*.jsonl.gz), OUT (what comes back).
# Models land in $WORK/runs/comparison/RECIPE-SEED/final, reports in $OUT/comparison-RECIPE-SEED.json. Run again after an end of any
# kind: what is finished is left alone, what has a checkpoint goes on from it.
set -euo pipefail
usage() { sed -n '2,3p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
seed=$1 steps=$2; shift 2
case $seed$steps in *[!0-9]*) usage ;; esac
recipes="autoregressive masked_diffusion block_diffusion refusion refusion_few"
if [ "${1:-}" = --only ]; then recipes=$2; shift 2; fi
here=$(cd "$(dirname "$0")/.." && pwd)
WORK=${WORK:-/tmp/campaign} OUT=${OUT:-$WORK/out}
DATA=${DATA:-$WORK/data}
export REFUSION_HOME=${REFUSION_HOME:-$WORK/home} PYTHONPATH=$here/src:$WORK/site:${PYTHONPATH:-} PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$WORK/inductor}
mkdir -p "$OUT" "$WORK/logs"

listed() { # the files among the arguments as TOML strings, each once
    local file found=
    for file in "$@"; do [ ! -e "$file" ] || found+="\"$file\","; done
    echo "[${found%,}]"
}
files=() held_out=()
for file in "$DATA"/greedy.jsonl.gz "$DATA"/warm.jsonl.gz "$DATA"/predictable.jsonl.gz "$DATA"/gsm8k.jsonl.gz "$DATA"/rg_*.jsonl.gz; do
    case $file in *heldout*) held_out+=("$file") ;; *) files+=("$file") ;; esac
done
[ -e "$DATA/greedy.jsonl.gz" ] || files+=("$DATA"/selfwritten_train-0*.jsonl.gz)
sources=$(listed "${files[@]}")
exclude=$(listed "$DATA/tasks_heldout.jsonl.gz" "$DATA/heldout.jsonl.gz" ${held_out[@]+"${held_out[@]}"})

for recipe in $recipes; do
    name=$recipe-$seed run=$WORK/runs/comparison/$recipe-$seed resume=
    if [ -d "$run/final" ] && [ -e "$run/report.json" ]; then
        echo "$name is finished"; cp "$run/report.json" "$OUT/comparison-$name.json"; continue
    fi
    for checkpoint in "$run"/checkpoint-*; do [ ! -e "$checkpoint/trainer_state.json" ] || resume=--resume; done
    echo "$name: $steps steps${resume:+, resumed}"
    python3 -m refusion train "$here/recipes/comparison/$recipe.toml" --output "$run" --json $resume \
        --set "data.sources=$sources" --set "data.exclude=$exclude" --set "data.cache=$WORK/cache" --set "run.seed=$seed" \
        --set "run.max_steps=$steps" "$@" > "$WORK/logs/comparison-$name.json" 2> >(trap '' INT; tee -a "$WORK/logs/comparison-$name.log" | tail -n 3 >&2)  # a stopped run still says that it saved
    cp "$run/report.json" "$OUT/comparison-$name.json"
done
