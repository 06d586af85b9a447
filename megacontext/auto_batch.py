"""How much more a micro-batch holds with MegaContext, and the device_batch_size that makes up for it."""

from megacontext.config import MCConfig
from megacontext.variants import target_length


def variant_tokens(config: MCConfig, progress, T) -> int:
    """Entries of all variants of one sequence of T tokens at this part of training."""
    length = target_length(progress, T, config.block_size, config.mc_train_wc_length)
    return config.mc_num_random_variants * length


def auto_batch_size(device_batch_size: int, config: MCConfig, T: int) -> int:
    """
    The largest batch size for which the model needs no more memory than for device_batch_size without MegaContext; at
    least 1. (GistNet and LensNet are two layers each, and are not counted.)

    It divides device_batch_size, so that accumulation makes up for it and a step has the same tokens. With
    mc_auto_batch off: device_batch_size.
    """
    if not config.mc_auto_batch:
        return device_batch_size
    most = device_batch_size / (1 + variant_tokens(config, 0.0, T) / T)  # variants are longest at the start
    sizes = [size for size in range(1, device_batch_size + 1) if device_batch_size % size == 0 and size <= most]
    return max(sizes, default=1)
