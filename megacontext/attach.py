"""Where --mc becomes objects in training. With the flag off, none of MegaContext's networks or losses is made."""

from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

import torch

from megacontext.config import MCConfig
from megacontext.inference import session_maker
from megacontext.networks import MCNetworks
from megacontext.objective import MCObjective
from megacontext.telemetry.endpoint import open_telemetry
from nanochat.checkpoint_manager import find_model, load_meta
from nanochat.configurator import group
from nanochat.loop import compiles
from nanochat.training import PlainObjective


@dataclass
class MCOptions:
    """Options of the stages that can train a model together with GistNet and LensNet."""

    mc: bool = False
    """train with MegaContext: the model learns to read gists, together with GistNet and LensNet"""
    megacontext: Annotated[MCConfig, group] = field(default_factory=MCConfig)
    """these options have an effect with --mc only"""


def is_on(config) -> bool:
    """Whether a script's options ask for MegaContext: by --mc, or always in a script without this flag (mc_train)."""
    return getattr(config, "mc", True)


def attach(config, model_config, device, bos, parent=None, trunk=None):
    """
    (networks, make_objective) for a run with these options on a model of this GPTConfig.

    networks: None with the flag off. bos: id of BOS. parent: (state dict, settings) of networks to continue from, None
    for new ones. make_objective(model) gives the objective of the training loop. Raises UserError if the parent's
    networks do not fit. trunk: see MCNetworks.
    """
    if not is_on(config):
        return None, PlainObjective
    mc = config.megacontext.resolve(model_config.sequence_len)
    networks = MCNetworks(model_config.n_embd, model_config.n_layer, mc, trunk, bos).to(device)
    if parent is not None:
        networks.load(*parent)

    if compiles(config.compile, device):
        for network in (networks.gistnet, networks.lensnet):
            if hasattr(network, "encoder"):  # means have none
                network.encoder.compile(dynamic=True)
    return networks, lambda model: MCObjective(model, networks, mc, bos)


def meta_of(config, T) -> dict:
    """MegaContext's entry in a checkpoint's metadata; {} with the flag off."""
    return {"megacontext": asdict(config.megacontext.resolve(T))} if is_on(config) else {}


def observe(config, script, training):
    """With MegaContext, send all log records to MC_OTEL_ENDPOINT, until training.close()."""
    if is_on(config):
        training.log.listen(open_telemetry(script, training.tag, {"device": training.device.type}))


def with_settings_of_networks(defaults, options, **others):
    """
    `defaults`, a script's options, with the settings of the networks beside the checkpoint from which a stage with
    these options starts, if it has any: what continues with them need not be told how they were made. others: further
    settings in that case.
    """
    meta = load_meta(*find_model(options.source, options.model_tag, options.step))
    made = MCConfig.saved(meta["megacontext"]).of_networks() | others if "megacontext" in meta else {}
    return replace(defaults, megacontext=replace(defaults.megacontext, **made))


@contextmanager
def generating(config, training):
    """
    Put a model in training and its networks into eval mode, to generate from them; afterwards back into train mode.

    Yields make_session(seed=…) -> MCSession with the current weights; None with the flag off.
    """
    model, networks = training.model, training.companion
    trained = [model] if networks is None else [model, networks]
    for module in trained:
        module.eval()
    try:
        make_session = None
        if is_on(config):
            make_session = session_maker(model, networks, config.megacontext.resolve(model.config.sequence_len))
        with torch.compiler.set_stance("force_eager"):  # shapes in sessions vary too much to compile
            yield make_session
    finally:
        for module in trained:
            module.train()
