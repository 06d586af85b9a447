"""GistNet and LensNet together: the networks that MegaContext adds to a GPT, saved beside it in checkpoints."""

import torch
import torch.nn as nn

from megacontext.config import MCConfig
from megacontext.gistnet import CopiedGistNet, DeepGists, GistNet, split_parameters
from megacontext.lensnet import LensNet
from nanochat import checkpoint_manager
from nanochat.common import UserError
from nanochat.gpt import make_optimizers

MAX_LEVELS = 2  # level embeddings: one for gists of tokens, one for gists of gists at all higher levels
RATES = 0.02, 0.003  # learning rates of Muon and AdamW
FROZEN_RATES = 0.005, 0.0008  # of GistNet for a frozen model
COPIED_RATES = 0.006, 0.0005  # of a GistNet of type "copied"


class MCNetworks(nn.Module):
    """
    The two networks for a model of n_layer layers of width n_embd. trunk: the trained model whose layers
    gistnet_type "copied" copies, else None; bos: id of its BOS token.
    """

    def __init__(self, n_embd: int, n_layer: int, config: MCConfig, trunk=None, bos=0):
        super().__init__()
        c = config
        self.settings = {name: getattr(c, name) for name in ("block_size", "gistnet_start", "mc_positional")}
        self.lens_loss_weight, self.frozen = c.mc_lens_loss_weight, c.mc_freeze_base
        if c.gistnet_type == "copied":
            if trunk is None:
                raise UserError("--gistnet_type: copied needs a trained model to copy from: use scripts.mc_train")
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
        """Load a checkpoint's weights. Raises UserError if they were trained with incompatible settings."""
        for name in self.settings:  # a mismatch that the shapes of the weights do not show
            if settings.get(name, self.settings[name]) != self.settings[name]:
                raise UserError(
                    f"--{name}: expected {settings[name]}, with which the checkpoint's MegaContext networks were made, "
                    f"got {self.settings[name]}; without the option it is that"
                )
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            made = ", ".join(f"{name}={value}" for name, value in MCConfig.saved(settings).of_networks().items())
            raise UserError(
                f"the checkpoint's MegaContext networks do not fit: they were made with {made}. Leave "
                f"--block_size, --gistnet_* and --lensnet_* out, which are then the same ({str(error).splitlines()[0]})"
            ) from error

    def setup_optimizers(self) -> list[torch.optim.Optimizer]:
        """
        [Muon for the matrices, AdamW for the rest] of GistNet, then of LensNet; sharded over ranks under torchrun.

        These optimizers are invariant to the scale of gradients, so LensNet's rates are multiplied by its loss weight.
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
    (networks, config) saved beside a checkpoint, (None, None) if there are none. meta: from `load_model`.

    Raises UserError if the file does not match the metadata.
    """
    folder = checkpoint_manager.checkpoint_root(source) / meta["model_tag"]
    state = checkpoint_manager.load_companion(folder, meta["step"], device)
    if state is None or "megacontext" not in meta:
        return None, None
    config = MCConfig.saved(meta["megacontext"])
    shape = meta["model_config"]
    networks = MCNetworks(shape["n_embd"], shape["n_layer"], config, trunk).to(device)
    networks.load(state, meta["megacontext"])
    return networks, config
