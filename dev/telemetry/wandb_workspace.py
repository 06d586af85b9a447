"""
Create a saved view of the W&B project with the panels of the training dashboard, over tokens instead of steps.

    python -m dev.telemetry.wandb_workspace --entity=my-team          # saves it in W&B and prints its address
    python -m dev.telemetry.wandb_workspace --dry_run                 # prints the view

Needs WANDB_API_KEY (or `wandb login`) and a project with runs: python -m scripts.base_train --run=<name>.
"""

import json
from dataclasses import dataclass

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from dev.telemetry.dashboards import TRAINING
from megacontext.telemetry.events import METRICS
from nanochat.common import UserError
from nanochat.configurator import run

LEVELS = 4  # of detail to show curves for


@dataclass
class Config:
    entity: str = ""
    """user or team that the project belongs to"""
    project: str = "nanochat"
    """W&B project; the training scripts log to nanochat"""
    name: str = "MegaContext"
    """name of the view"""
    x: str = "total_training_tokens"
    """x axis: total_training_tokens, total_training_flops, total_training_time or step"""
    dry_run: bool = False
    """print the view instead of saving it"""


def workspace(config: Config) -> ws.Workspace:
    """The view. Raises UserError for an x axis that is not logged."""
    if config.x != "step" and not config.x.startswith("total_"):
        raise UserError(f"--x must be step, total_training_tokens, …_flops or …_time, got {config.x!r}")
    sections = []
    for title, parts in TRAINING.items():
        panels = []
        for part in parts:
            keys = [key for key in part.metrics if key in METRICS]  # spans are not in W&B
            keys = [key.replace("{lod}", str(lod)) for key in keys for lod in range(LEVELS if "{lod}" in key else 1)]
            if not keys:
                continue
            kind = "pct-area" if part.stacked else "line"
            panels.append(wr.LinePlot(title=part.title, x=config.x, y=keys, plot_type=kind, smoothing_factor=0))
        sections.append(ws.Section(name=title, panels=panels, is_open=True))
    return ws.Workspace(entity=config.entity, project=config.project, name=config.name, sections=sections)


def main(config: Config):
    view = workspace(config)
    if config.dry_run:
        charts = {s.name: [{"title": p.title, "x": p.x, "y": p.y} for p in s.panels] for s in view.sections}
        print(json.dumps(charts, indent=1, default=lambda metric: metric.name))
        return
    if not config.entity:
        raise UserError("--entity is missing: the user or team that the W&B project belongs to")
    print(view.save().url)


if __name__ == "__main__":
    run(main, Config)
