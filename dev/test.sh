#!/usr/bin/env bash
# Lint and the whole test suite, on a bare machine: installs what is missing first.
#   bash dev/test.sh [pytest arguments]
DESCRIPTION="Install what is missing, then run ruff and the test suite."
. "$(dirname "$0")/recipe.sh"
# The sandbox of tests/test_execution.py
if ! command -v bwrap >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq && apt-get install -y -qq bubblewrap
fi
activate_environment cpu
ruff check .
ruff format --check .
python -m pytest "$@"
