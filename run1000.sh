#!/usr/bin/env bash
# The $1000 tier: d32 (1.9B parameters, 38B tokens) on one 8×H100 node, in about 33 hours.
#   bash run1000.sh
DESCRIPTION="Train the \$1000 model (depth 32) from text to report card on 8×H100."
NPROC=8
. "$(dirname "$0")/dev/recipe.sh"
recipe_options "$@"
# Data: 1.88B parameters × 20 tokens × 4.8 characters / 250M characters a shard ≈ 720 shards; 800 to be safe.
hub_recipe 32 8 800 4000000000
