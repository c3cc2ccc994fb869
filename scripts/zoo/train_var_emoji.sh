#!/bin/bash
# Trains the zoo's var-emoji: a VQ-VAE and a VAR on its tokens. About 40 minutes of one idle core with AMX.
set -euo pipefail
source "$(dirname "$0")/training_run.sh"
prepare

train vqvae "$runs/vqvae" --data data/emoji --extra data/emoji-all --extra-share 0.25 --steps "${STEPS_VAE:-2700}" \
    --ch 32 --multipliers 1,2,4 --patch 2 --channels 16 --vocabulary 2048 --scales 1,2,3,4,6,8 \
    --batch 16 --lr 1.3e-3 --ema 0.998 --weight-decay 0 --beta2 0.99

encode "$runs/vqvae/vqvae.safetensors" "$runs/tokens"

train var "$runs/var" --data "$runs/tokens" --vae "$runs/vqvae/vqvae.safetensors" --steps "${STEPS:-3000}" \
    --width 192 --depth 4 --heads 4 --drop-path 0 --flip 0 \
    --batch 32 --lr 1.5e-3 --ema 0.998 --sheet-guidance 1.5 --sheet-top-k 100 --sheet-top-p 0.95

python scripts/zoo/model_card.py --vae-run "$runs/vqvae" --run "$runs/var" --data data/emoji --extra data/emoji-all \
    --settings "guidance=1.5 top_k=100 top_p=0.95" --recipe scripts/zoo/train_var_emoji.sh -o models/zoo/var-emoji
