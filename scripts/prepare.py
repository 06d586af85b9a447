"""
Download and check the data of the chat stages and evaluations, before hours are spent on pretraining.

    python -m scripts.prepare                   # the hub's datasets, and the CORE bundle
    python -m scripts.prepare --tasks=local     # data generated on this machine
    python -m scripts.prepare --tasks=none --run=mine     # whether W&B can be reached

Prints the number of conversations of each stage. Existing data is not downloaded again.
"""

from dataclasses import dataclass
from typing import Literal

from nanochat.common import print0
from nanochat.configurator import run
from nanochat.core_bundle import download_bundle
from nanochat.execution import SandboxUnavailable, find_sandbox
from nanochat.loop import check_wandb
from tasks.mixtures import eval_tasks, mid_mixture, mid_val, rl_tasks, sft_mixture, sft_val


@dataclass
class Config:
    tasks: Literal["full", "local", "none"] = "full"
    """full (datasets of the hub), local, or none"""
    run: str = "dummy"
    """name of the W&B run to come; other than "dummy": check that W&B can be reached"""
    core: bool = True
    """with --tasks full: download the CORE bundle for base_eval too"""


def main(config: Config):
    check_wandb(config.run)
    which = config.tasks
    if which == "none":
        return
    rl_train, rl_val = rl_tasks(which)
    sizes = {
        "midtraining": mid_mixture(which),
        "midtraining, validation": mid_val(which),
        "SFT": sft_mixture(which),
        "SFT, validation": sft_val(which),
        "RL": rl_train,
        "RL, validation": rl_val,
        **{f"evaluation, {name}": make() for name, make in eval_tasks(which).items()},
    }
    for name, task in sizes.items():
        print0(f"{name}: {len(task):,} conversations")
    if which == "full":
        if config.core:
            print0(f"CORE: {download_bundle()}")
        try:
            find_sandbox()
        except SandboxUnavailable as error:
            print0(f"HumanEval will be left out: {error}")


if __name__ == "__main__":
    run(main, Config)
