"""GistNet and LensNet together: what MegaContext adds to a GPT and its checkpoints hold beside it."""

import torch
import torch.nn as nn

from megacontext.config import MCConfig
from megacontext.gistnet import CopiedGistNet, DeepGists, GistNet, split_parameters
from megacontext.lensnet import LensNet
from nanochat import checkpoint_manager
from nanochat.common import UserError
from nanochat.gpt import make_optimizers

MAX_LEVELS = 2  # levels with an embedding of their own: gists of tokens, and gists of gists, which are alike
RATES = 0.02, 0.003  # learning rates of Muon and AdamW
FROZEN_RATES = 0.005, 0.0008  # of GistNet, where the model does not learn with it
COPIED_RATES = 0.006, 0.0005  # of a GistNet that was copied


class MCNetworks(nn.Module):
    """
    The two networks for a model of n_layer layers of width n_embd; trunk: the model, if it is finished, for what
    GistNet has of it.
    """

    def __init__(self, n_embd: int, n_layer: int, config: MCConfig, trunk=None, bos=0):
        super().__init__()
        c = config
        self.settings = {name: getattr(c, name) for name in ("block_size", "gistnet_start", "mc_positional")}
        self.lens_loss_weight, self.frozen = c.mc_lens_loss_weight, c.mc_freeze_base
        if c.gistnet_type == "copied":
            if trunk is None:
                raise UserError("--gistnet_type: copied needs a finished model to copy from: train with mc_train")
            if c.gistnet_layers > n_layer:
                raise UserError(
                    f"--gistnet_layers: expected at most the model's {n_layer}, got {c.gistnet_layers}: copy fewer, or "
                    "none with --gistnet_type=transformer"
                )
            self.gistnet = CopiedGistNet(trunk, c.gistnet_layers, c.block_size, MAX_LEVELS, c.gistnet_head, bos)
        else:
            gistnet = c.gistnet_type, c.gistnet_layers, c.gistnet_pooling, c.gistnet_head, c.gistnet_start
            self.gistnet = GistNet(n_embd, c.block_size, MAX_LEVELS, *gistnet)
        if count := c.deep_layers(n_layer):
            self.gistnet.deep = DeepGists(n_embd, count)
        self.lensnet = LensNet(n_embd, c.lensnet_layers, c.lensnet_head)

    def load(self, state: dict, settings: dict):
        """Take over a checkpoint's weights. Raises UserError when they were made with settings they do not fit."""
        for name in self.settings:  # which no shape tells
            if settings.get(name, self.settings[name]) != self.settings[name]:
                raise UserError(
                    f"--{name}: expected {settings[name]}, with which the checkpoint's MegaContext networks were made, "
                    f"got {self.settings[name]}"
                )
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint's MegaContext networks do not fit: they were made with {settings}. Choose the same "
                f"--block_size, --gistnet_* and --lensnet_* options ({str(error).splitlines()[0]})"
            ) from error

    def setup_optimizers(self) -> list[torch.optim.Optimizer]:
        """
        [Muon for the matrices, AdamW for the rest] of GistNet, then of LensNet; sharded over ranks under torchrun.

        These optimizers do not see the scale of a gradient. So LensNet's rates carry the weight of its loss.
        """
        optimizers = []
        of_gists = COPIED_RATES if self.gistnet.copied else FROZEN_RATES if self.frozen else RATES
        for network, rates, weight in ((self.gistnet, of_gists, 1.0), (self.lensnet, RATES, self.lens_loss_weight)):
            matrices, others = split_parameters(network, self.gistnet.copied)
            matrix_lr, other_lr = rates
            if matrices:  # GistNet of type "mean" has none
                groups = [{"params": others, "lr": weight * other_lr}]
                optimizers += reversed(make_optimizers(groups, matrices, weight * matrix_lr))
        return optimizers


def load_networks(source, meta, device, trunk=None):
    """
    (networks, config) that lie beside the checkpoint of which `meta` came from `load_model`; (None, None) if none do.

    Raises UserError when the file does not fit what the meta data says of it.
    """
    folder = checkpoint_manager.checkpoint_root(source) / meta["model_tag"]
    state = checkpoint_manager.load_companion(folder, meta["step"], device)
    if state is None or "megacontext" not in meta:
        return None, None
    config = MCConfig(**meta["megacontext"])
    shape = meta["model_config"]
    networks = MCNetworks(shape["n_embd"], shape["n_layer"], config, trunk).to(device)
    networks.load(state, meta["megacontext"])
    return networks, config
