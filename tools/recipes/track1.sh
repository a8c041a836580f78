#!/usr/bin/env bash
# Track 1: ten random real images of each class, refined, and scored by the official protocol.
#
#     bash tools/recipes/track1.sh cifar100 [FOLDER]                        # 4,000 steps, three rounds
#     STEPS=1000 ROUNDS=1 bash tools/recipes/track1.sh tinyimagenet [FOLDER]
#
# Everything lies in FOLDER (runs/track1-DATASET). Stopped at any time, the same command resumes; with more STEPS it refines on.
set -euo pipefail
dataset=$1
folder=${2:-runs/track1-$dataset}
mkdir -p "$folder"
cd "$folder"
[ -f "random/$dataset.pt" ] || python -m ddkit generate --dataset "$dataset" --from-real random --seed 0 --out "random/$dataset.pt"
python -m ddkit refine "random/$dataset.pt" --out "refined/$dataset.pt" --run refine --steps "${STEPS:-4000}"
python -m ddkit evaluate "refined/$dataset.pt" --rounds "${ROUNDS:-3}"
sha256sum "refined/$dataset.pt"
