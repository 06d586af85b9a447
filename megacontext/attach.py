"""The one place where --mc becomes objects. With the flag off, none of MegaContext's networks or losses is made."""

import math
from contextlib import contextmanager
from dataclasses import asdict

from megacontext.auto_batch import auto_batch_size
from megacontext.inference import session_maker
from megacontext.networks import MCNetworks
from megacontext.telemetry import open_telemetry
from megacontext.training import MCObjective
from nanochat.common import resolve_dtype
from nanochat.training import PlainObjective


def is_on(config) -> bool:
    """Whether a script's options ask for MegaContext; a script without the flag, but with its options, always does."""
    return getattr(config, "mc", True)


def batch_shape(config, T) -> tuple[int, int]:
    """
    (device_batch_size, streams) of this run: as given, or shrunk by --mc_auto_batch to make room for variants.

    A smaller micro-batch is put together from fewer streams; more micro-batches a step make up for both.
    """
    B, streams = config.device_batch_size, getattr(config, "streams", 1)
    if not is_on(config):
        return B, streams
    smaller = auto_batch_size(B, config.megacontext.resolve(T), T)
    return smaller, streams if smaller == B else math.gcd(streams, smaller)


def attach(config, model_config, device, parent=None):
    """
    (networks, make_objective) for a run with these options on a model of this GPTConfig.

    networks: None with the flag off. parent: (state dict, settings) of networks to go on from, else they are new.
    make_objective(model) is what the loop calls. Raises UserError when the parent's networks are of another shape.
    """
    if not is_on(config):
        return None, PlainObjective
    mc = config.megacontext.resolve(model_config.sequence_len)
    networks = MCNetworks(model_config.n_embd, mc).to(device)
    if parent is not None:
        networks.load(*parent)
    dtype = resolve_dtype(mc.mc_aux_dtype, device.type)
    return networks, lambda model: MCObjective(model, networks, mc, dtype)


def meta_of(config, T) -> dict:
    """What a checkpoint's meta data says of MegaContext; nothing with the flag off."""
    return {"megacontext": asdict(config.megacontext.resolve(T))} if is_on(config) else {}


def observe(config, script, training, objective):
    """Send what MegaContext does, and all that is logged, to where MC_OTEL_ENDPOINT says; training.close() ends it."""
    if is_on(config):
        objective.telemetry = open_telemetry(script, training.tag, {"device": training.device.type})
        objective.step = lambda: training.step
        training.log.others.append(objective.telemetry)


@contextmanager
def generating(config, training):
    """
    While in use, what is trained is in eval mode; as it gives a maker of sessions, make_session(rows) -> MCSession, of
    the networks as they are now, or None with the flag off.
    """
    model, networks = training.model, training.companion
    trained = [model] if networks is None else [model, networks]
    for module in trained:
        module.eval()
    try:
        make_session = None
        if is_on(config):
            make_session = session_maker(model, networks, config.megacontext.resolve(model.config.sequence_len))
        yield make_session
    finally:
        for module in trained:
            module.train()
