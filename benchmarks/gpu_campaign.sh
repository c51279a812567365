#!/usr/bin/env bash
# The training campaign of the default model on one H100, stage by stage: base, synthesize, train, evaluate. Each stage can be run again.
# Paths: WORK (scratch of the machine), DATA (JSONL files of the mixture), OUT (what comes back).
#     bash benchmarks/gpu_campaign.sh base && bash benchmarks/gpu_campaign.sh synthesize
#     bash benchmarks/gpu_campaign.sh train NAME recipes/smollm2-135m.toml [--set key=value ...]
#     bash benchmarks/gpu_campaign.sh final STEPS TWIN_STEPS && bash benchmarks/gpu_campaign.sh further STEPS
#     bash benchmarks/gpu_campaign.sh evaluate NAME [FIRST_ROW:LAST_ROW of chat] [rows of tasks]
set -euo pipefail
WORK=${WORK:-/tmp/campaign} DATA=${DATA:-.carry/data} OUT=${OUT:-$WORK/out}
export REFUSION_HOME=$WORK/home REFUSION_GGUF=$WORK/gguf PYTHONPATH=src:$WORK/site PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
mkdir -p "$WORK/data" "$WORK/gguf" "$WORK/logs" "$OUT"
refusion() { python3 -m refusion "$@"; }

base() {
    python3 -m pip install -q --no-index --no-deps --no-cache-dir --upgrade --target "$WORK/site" .whl/*.whl
    cp "$DATA"/*.jsonl.gz "$WORK/data/"
    refusion models pull smollm2-135m
}

synthesize() { # greedy answers to the queries of the supplied pairs, then new pairs for SECONDS_NEW seconds
    zcat "$WORK"/data/selfwritten_train-0*.jsonl.gz > "$WORK/data/queries.jsonl"
    refusion synthesize --output "$WORK/greedy" --queries "$WORK/data/queries.jsonl" --exclude "$WORK/data/heldout.jsonl.gz" \
        --device "${DEVICE:-cuda}" --batch-size "${BATCH:-4096}" 2> >(tee "$OUT/synthesize-greedy.log" >&2)
    timeout -s INT "${SECONDS_NEW:-100}" python3 -m refusion synthesize --output "$WORK/new" --num-pairs 1000000 --seed 11 \
        --exclude "$WORK/data/heldout.jsonl.gz" --exclude "$WORK/data/queries.jsonl" --device "${DEVICE:-cuda}" --batch-size "${BATCH:-4096}" \
        2> >(tee "$OUT/synthesize-new.log" >&2) || true
    mkdir -p "$WORK/new"  # missing where the time was too short for a pair
    find "$WORK/greedy" "$WORK/new" -name "part-*.jsonl" -exec cat {} + | gzip > "$WORK/data/greedy.jsonl.gz"
    python3 benchmarks/without_queries.py "$WORK/data/queries.jsonl" "$WORK/data/greedy.jsonl.gz" | gzip > "$WORK/data/warm.jsonl.gz"
    ls -l "$WORK/data"; cp "$WORK/data/greedy.jsonl.gz" "$OUT/"
}

train() { # NAME RECIPE [options]
    local name=$1 recipe=$2; shift 2
    refusion train "$recipe" --output "$WORK/runs/$name" --json --set "data.exclude=[\"$WORK/data/tasks_heldout.jsonl.gz\"]" \
        --set "data.sources=$(mixture)" "$@" > "$WORK/logs/train-$name.json" 2> >(tee "$WORK/logs/train-$name.log" | tail -n 3 >&2)
    tail -n 4 "$WORK/logs/train-$name.log"
}

mixture() { # chat, predictable tasks, and a little of everything else that is permitted; only the chat is the base model's own
    local chat='{path="'$WORK'/data/greedy.jsonl.gz",weight='${GREEDY:-1}'},{path="'$WORK'/data/warm.jsonl.gz"},'
    [ "${ONLY:-}" != tasks ] || chat=
    local other=
    for file in predictable gsm8k arc mbpp functions; do other+='{path="'$WORK'/data/'$file'.jsonl.gz",distill=false},'; done
    echo "[$chat${other%,}]"
}

pack() { # NAME: quantise the finished run to the file that ships, build the model from it, and slice the file for the way home
    local name=$1
    python3 tools/pack_weights.py --tuned "$WORK/runs/$name/final" --bits 3 --embedding-bits 0 --output "$WORK/packed.safetensors"
    split -b 15M -d -a 1 "$WORK/packed.safetensors" "$OUT/weights.part"
    mkdir -p "$WORK/runs/$name-packed/final"
    python3 -c "from pathlib import Path; from refusion.deltas import load_packed, materialise; \
        materialise(Path('$REFUSION_HOME/models/smollm2-135m'), load_packed(Path('$WORK/packed.safetensors')), Path('$WORK/runs/$name-packed/final'), refusion={})"
}

evaluate() { # NAME [chat rows] [number of tasks] [sweep file, or folder with chat.json and tasks.json]
    local name=$1 rows=${2:-0:256} tasks=${3:-2100} sweep=${4:-benchmarks/sweeps}
    local model="$WORK/runs/$name/final" chat=$sweep/chat.json task=$sweep/tasks.json
    [ -d "$sweep" ] || { chat=$sweep; task=$sweep; }
    python3 benchmarks/chat.py --model "$model" --device "${DEVICE:-cuda}" --batch-size "${CHAT_BATCH:-256}" --rows "$rows" --sweep "$chat" \
        --score-batch-size 64 --data "$WORK/data/heldout.jsonl.gz" --output "$OUT/chat-$name.json" --save-texts "$OUT/chat-$name.jsonl"
    python3 benchmarks/tasks.py --model "$model" --device "${DEVICE:-cuda}" --batch-size "${TASK_BATCH:-700}" --rows "0:$tasks" --sweep "$task" \
        --data "$WORK/data/tasks_heldout.jsonl.gz" --output "$OUT/tasks-$name.json"
}

further() { # STEPS: the packed default model trained further, and the mean of both as the file that ships, sliced
    GREEDY=2 train further recipes/smollm2-135m-further.toml --set "model.base=$WORK/runs/default-packed/final" --set "run.max_steps=$1"
    pack further
    python3 tools/pack_weights.py --tuned "$WORK/runs/default-packed/final" "$WORK/runs/further-packed/final" --shares 0.3 0.7 \
        --bits 3 --embedding-bits 0 --output "$WORK/mean.safetensors"
    split -b 15M -d -a 1 "$WORK/mean.safetensors" "$OUT/weights.part"
}

final() { # STEPS TWIN_STEPS: the default model, its shipped form measured, and its autoregressive twin on the same task rows
    train default recipes/smollm2-135m.toml --set "run.max_steps=$1"
    pack default; tar -czf "$OUT/logs.tgz" -C "$WORK" logs
    (ONLY=tasks train twin recipes/smollm2-135m-autoregressive.toml --set "run.max_steps=$2" --set run.save_steps=0) &
    evaluate default-packed 0:256 2100 benchmarks/sweeps
    wait
    python3 benchmarks/tasks.py --model "$WORK/runs/twin/final" --device cuda --batch-size 700 --sweep benchmarks/sweeps/autoregressive.json \
        --data "$WORK/data/tasks_heldout.jsonl.gz" --output "$OUT/tasks-twin.json"
    tar -czf "$OUT/logs.tgz" -C "$WORK" logs
}

"$@"
