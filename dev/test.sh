#!/usr/bin/env bash
# Lint and the whole test suite, on a bare machine: installs what is missing first.
#   bash dev/test.sh [pytest arguments]
DESCRIPTION="Install what is missing, then run ruff and the test suite."
. "$(dirname "$0")/recipe.sh"
# The sandbox of tests/test_execution.py and the browser of tests/test_ui.py
if ! { command -v bwrap && command -v chromium; } >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq bubblewrap chromium
fi
activate_environment cpu
ruff check .
ruff format --check .
# Two processes share the tests, a file each at a time: most tests wait for something, or use one core. In the order of
# their names: by number of tests, the files of few but long ones would come last, one after the other.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
