#!/bin/bash
# Trains the zoo's far-emoji from nothing: pictures, KL-VAE, cached latents, FAR, the card. About three hours on two idle
# cores with AMX; an interrupted run goes on where it was when the script is started again. STEPS_VAE, STEPS_DECODER,
# STEPS_FAR, STEPS_MEAN: longer is better.
# PROCESSES: one per core (default 2).
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${RUNS:-runs}
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true

train() {  # COMMAND FOLDER OPTIONS...: single-threaded processes that share every batch
    local command=$1 folder=$2 resume=()
    shift 2
    [ -e "$folder/checkpoint-last.pth" ] && resume=(--resume)
    python -m torch.distributed.run --standalone --nproc_per_node "${PROCESSES:-2}" \
        -m far_training "$command" -o "$folder" --threads 1 --amp auto --seed 0 "${resume[@]}" "$@"
}

[ -e data/emoji ] || python scripts/zoo/prepare_emoji.py -o data/emoji --size 64 --concepts 256 --holdout 2
[ -e data/emoji-all ] || python scripts/zoo/prepare_emoji.py -o data/emoji-all --size 64 --concepts all --holdout 2

[ -e "$runs/vae/vae.safetensors" ] || train vae "$runs/vae" \
    --data data/emoji --extra data/emoji-all --extra-share 0.25 --steps "${STEPS_VAE:-9000}" \
    --ch 48 --multipliers 1,2,4 --patch 2 --lowpass 0.1 --kl 3e-5 \
    --batch 16 --lr 1.3e-3 --warmup 100 --schedule cosine --ema 0.998 --weight-decay 0 --beta2 0.99 --clip 1

# The decoder once more, on disturbed latents: it learns to forgive the small errors of those that FAR draws.
[ -e "$runs/decoder/vae.safetensors" ] || train vae "$runs/decoder" --init "$runs/vae/vae.safetensors" \
    --freeze-encoder --latent-noise 0.5 \
    --data data/emoji --extra data/emoji-all --extra-share 0.25 --steps "${STEPS_DECODER:-5000}" \
    --ch 48 --multipliers 1,2,4 --patch 2 --lowpass 0.1 --kl 0 \
    --batch 16 --lr 8e-4 --warmup 50 --schedule cosine --ema 0.997 --weight-decay 0 --beta2 0.99 --clip 1

[ -e "$runs/latents" ] || far train cache-latents --data data/emoji --vae "$runs/decoder/vae.safetensors" -o "$runs/latents"

[ -e "$runs/far/far.safetensors" ] || train far "$runs/far" \
    --data "$runs/latents" --vae "$runs/decoder/vae.safetensors" --steps "${STEPS_FAR:-14000}" \
    --width 256 --depth 4 --heads 4 --buffer 8 --head-width 256 --head-depth 3 --prediction v \
    --levels sample --low 1 --draws 2 --dropout 0 --input-noise 0.3 --flip 0 --no-level-weight \
    --sheet-steps 10 --sheet-minutes 15 \
    --batch 32 --lr 8e-4 --warmup 100 --schedule cosine --clip 1 --ema 0.999

# FAR once more, with a first level that draws the mean of one picture's latents (docs/training.md).
[ -e "$runs/mean/far.safetensors" ] || train far "$runs/mean" --init "$runs/far/far.safetensors" \
    --data "$runs/latents" --vae "$runs/decoder/vae.safetensors" --steps "${STEPS_MEAN:-11000}" \
    --width 256 --depth 4 --heads 4 --buffer 8 --head-width 256 --head-depth 3 --prediction v \
    --levels sample --low 0.3 --first mean --first-share 0.45 --draws 2 --dropout 0 --input-noise 0.25 --flip 0 \
    --no-level-weight --sheet-steps 10 --sheet-minutes 15 \
    --batch 32 --lr 6e-4 --warmup 100 --schedule cosine --clip 1 --ema 0.9993

python scripts/zoo/model_card.py --vae-run "$runs/vae" --vae-run "$runs/decoder" --run "$runs/far" --run "$runs/mean" \
    --data data/emoji --extra data/emoji-all --recipe scripts/zoo/train_far_emoji.sh -o models/zoo/far-emoji \
    --settings "steps=50,10,10,10,10,10,10,10 guidance=1.6 temperature=0.5 shared_noise=1"
