"""
Import nanochat's tokenizer and checkpoints: check them, copy them, add checksums.

    python -m scripts.import_nanochat --from ~/.cache/nanochat

They are copied to $NANOCHAT_BASE_DIR. No code in the files is run, and no existing file is overwritten.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nanochat.common import get_base_dir
from nanochat.configurator import run
from nanochat.importing import import_cache


@dataclass
class Config:
    source: Annotated[Path, tyro.conf.arg(name="from")]
    """cache folder of nanochat"""


def main(config: Config):
    import_cache(config.source, get_base_dir())
    print("to talk to an imported chat model: python -m scripts.chat_cli")


if __name__ == "__main__":
    run(main, Config)
