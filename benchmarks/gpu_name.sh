# To be sourced: GPU, the card's short name in names of result files, such as h100; `cpu` where there is none.
GPU=${GPU:-$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | grep -oiE '[a-z]+[0-9]+' | head -n 1 | tr '[:upper:]' '[:lower:]' || true)}
export GPU=${GPU:-cpu}
