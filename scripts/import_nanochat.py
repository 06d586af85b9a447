"""
Take over a tokenizer and checkpoints that nanochat trained: checked, and with checksums from now on.

    python -m scripts.import_nanochat --from ~/.cache/nanochat

They go to $NANOCHAT_BASE_DIR. Nothing in the files is run, and nothing that is there is overwritten.
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
    """nanochat's cache folder"""


def main(config: Config):
    import_cache(config.source, get_base_dir())
    print("talk to a chat model among them: python -m scripts.chat_cli")


if __name__ == "__main__":
    run(main, Config)
