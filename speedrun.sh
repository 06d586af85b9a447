#!/usr/bin/env bash
# The $100 tier: d20 (561M parameters, 11.2B tokens) on one 8×H100 node, in about 4 hours.
#   bash speedrun.sh
#   screen -L -Logfile speedrun.log -S speedrun bash speedrun.sh
DESCRIPTION="Train the \$100 model (depth 20) from text to report card on 8×H100."
NPROC=8
. "$(dirname "$0")/dev/recipe.sh"
recipe_options "$@"
# Data: 561M parameters × 20 tokens × 4.8 characters / 250M characters a shard ≈ 216 shards; 240 to be safe.
hub_recipe 20 32 240 2000000000
