#!/usr/bin/env bash
# What docs/engine.md and README.md say of the engine and the default model, measured on one GPU in stages of bounded time.
#     bash benchmarks/engine_gpu.sh forward serving predictable slots profile batches bench carrier quality checks \
#         quantized quantized_small                                   # any of these, in this order
# A stage that runs out of its seconds (FORWARD_S and so on) writes what it has. Compiled kernels stay in $WORK/triton; `save` packs them for
# the way home and `restore FILE` unpacks them on the next machine, which otherwise compiles for minutes: they fit as long as src/ is the same.
# Paths: WORK (scratch of the machine), DATA (heldout.jsonl.gz, tasks_heldout.jsonl.gz), OUT (what comes back). Timings want the GPU alone.
set -euo pipefail
source "$(dirname "$0")/gpu_name.sh"
WORK=${WORK:-/tmp/campaign}
DATA=${DATA:-$WORK/data} OUT=${OUT:-$WORK/out} DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3}
export REFUSION_HOME=${REFUSION_HOME:-$WORK/home} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$WORK/triton} PYTHONUNBUFFERED=1
export PYTHONPATH=src:$WORK/site:${PYTHONPATH:-}
[ ! -d "$WORK/gguf" ] || export REFUSION_GGUF=$WORK/gguf
chat="--data $DATA/heldout.jsonl.gz" tasks=$DATA/tasks_heldout.jsonl.gz sweep=benchmarks/sweeps/alternatives
mkdir -p "$OUT" "$WORK/logs"

forward() { limited forward "${FORWARD_S:-120}" forward.py --device "$DEVICE" --contenders static --profile "$WORK/logs/profile.json"; }

serving() { limited serving "${SERVING_S:-120}" serving.py --device "$DEVICE" $chat --requests 512 --requests-per-concurrency 24; }

predictable() { # the text that slots are made for, one request at a time
    limited serving-tasks "${PREDICTABLE_S:-60}" serving.py --device "$DEVICE" --kind tasks --data "$tasks" --concurrency 1 --requests 42 \
        --requests-per-concurrency 42 --warm-up 42 --decoders refusion autoregressive
}

slots() { # the same one at a time with slots of half the length, whose forwards have fewer rows
    local short="--slot-size 8 --block-size 8 --alternatives 1 --concurrency 1 --decoders refusion autoregressive"
    # shellcheck disable=SC2086 # several words
    limited serving-slots8 "${SLOTS_S:-90}" serving.py --device "$DEVICE" $chat --requests 24 $short
    # shellcheck disable=SC2086
    limited serving-tasks-slots8 "${SLOTS_S:-90}" serving.py --device "$DEVICE" --kind tasks --data "$tasks" --requests 42 \
        --requests-per-concurrency 42 --warm-up 42 $short
}

profile() { # where the time of a slot forward goes, beside that of an autoregressive one
    limited decode-profile "${PROFILE_S:-60}" decode_profile.py --device "$DEVICE" $chat
}

batches() { limited batches "${BATCHES_S:-120}" batches.py --device "$DEVICE" $chat --limit 64 --concurrency 64 --batch-invariant; }

bench() { # the user's own command
    timeout -s INT -k 15 "${BENCH_S:-150}" "$PYTHON" -m refusion bench --device "$DEVICE" --seconds 5 --output "$OUT/bench-$GPU.json" \
        > "$WORK/logs/bench.log" 2>&1 || echo "bench ended with $?"
}

carrier() { limited eight-billion "${CARRIER_S:-180}" eight_billion.py --device "$DEVICE" $chat --tasks-data "$tasks" --num-prompts 16 --loop-prompts 2; }

quality() { # tokens per forward, agreement and right answers need no quiet GPU
    limited chat-default "${QUALITY_S:-140}" chat.py --device "$DEVICE" --batch-size 16 --rows 256:512 --sweep "$sweep/chat.json" \
        --score-batch-size 64 $chat &
    limited tasks-default "${QUALITY_S:-140}" tasks.py --device "$DEVICE" --batch-size 16 --sweep "$sweep/tasks.json" --data "$tasks"
    wait
}

checks() { limited gpu-checks "${CHECKS_S:-290}" gpu_checks.py --device "$DEVICE" --timeout "$((${CHECKS_S:-290} - 10))" $chat; }

quantized() { # wants its GPU to itself: what others have allocated there counts
    limited quantized "${QUANTIZED_S:-260}" quantized.py --device "$DEVICE" --models carrier --num-prompts 8 --num-tasks 64 $chat --tasks-data "$tasks"
}

quantized_small() { limited quantized-small "${QUANTIZED_S:-260}" quantized.py --device "$DEVICE" --models small $chat --tasks-data "$tasks"; }

save() { tar -czf - -C "$TRITON_CACHE_DIR" . | split -b 15M -d -a 1 - "$OUT/triton.tgz.part"; }

restore() { # FILE...: the parts, in their order
    mkdir -p "$TRITON_CACHE_DIR"
    cat "$@" | tar -xzf - -C "$TRITON_CACHE_DIR"
}

limited() { # NAME SECONDS SCRIPT [options]
    local name=$1 seconds=$2 began=$SECONDS code=0; shift 2
    # A shell's background jobs ignore INT, so it is switched on again.
    timeout -s INT -k 15 "$seconds" env --default-signal=INT "$PYTHON" "benchmarks/$1" --output "$OUT/$name-$GPU.json" "${@:2}" > "$WORK/logs/$name.log" 2>&1 || code=$?
    echo "$name: ended with $code after $((SECONDS - began)) s"
    tar -czf "$OUT/logs.tgz" -C "$WORK" logs || [ $? -eq 1 ]  # 1: somebody beside us was writing a log
}

[ $# -gt 0 ] || { sed -n '2,7p' "$0" >&2; exit 2; }
if [ "$1" = restore ]; then
    "$@"
else
    for stage in "$@"; do
        case $stage in
            forward | serving | predictable | slots | profile | batches | bench | carrier | quality | checks | quantized | quantized_small | save) "$stage" ;;
            *) echo "unknown stage $stage" >&2; exit 2 ;;
        esac
    done
fi
