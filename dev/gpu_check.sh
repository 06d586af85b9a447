#!/usr/bin/env bash
# Everything that must be known of a GPU, in one command of at most ten minutes, on a machine without a network, Rust or uv.
#   bash dev/gpu_check.sh --pack        # first, where there is a network: wheels for such a machine, into dev/gpu/wheels
#   bash dev/gpu_check.sh               # there: results in $OUT (default dev/gpu), gpu_check.json and a log per stage
#   bash dev/gpu_check.sh --rehearse    # the same on a CPU, in tiny sizes
# Options go to dev/gpu_check.py, see --help there. PYTHON: the interpreter that has PyTorch (default: python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}" WHEELS=dev/gpu/wheels SITE="${TMPDIR:-/tmp}/gpu_check_site"

if [ "${1:-}" = --pack ]; then # needs uv and Rust. PACK_FOR: the other machine's Python and kind
    rm -rf "$WHEELS"
    uvx maturin build --quiet --release --manifest-path rustbpe/Cargo.toml --out "$WHEELS"
    # What the check imports and machines for machine learning often lack
    printf '%s\n' fastapi httpx markdown-it-py nh3 pydantic pygments rich safetensors tiktoken tokenizers tyro uvicorn |
        uv pip compile --quiet --no-header --no-annotate --python-version 3.12 \
            --python-platform x86_64-manylinux_2_28 - >"$WHEELS/names.txt"
    uv run --quiet --no-project --with pip python -m pip download --quiet --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
        $(printf -- '--platform manylinux_2_%s_x86_64 ' 28 27 24 17 12 5) --platform manylinux2014_x86_64 --platform any \
        --dest "$WHEELS" --requirement "$WHEELS/names.txt"
    du -sh "$WHEELS"
    exit
fi

# Of the wheels, those that are missing here; a folder of their own leaves the machine's packages as they are
missing="$("$PYTHON" - "$WHEELS" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

for path in sorted(Path(sys.argv[1]).glob("*.whl")):
    try:
        version(path.name.split("-")[0])
    except PackageNotFoundError:
        print(path)
PY
)"
if [ -n "$missing" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SITE" $missing
    export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$PYTHON" -m dev.gpu_check "$@"
