"""The settings of MegaContext. A field's name is its option's name; -1 stands for a value derived from others."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from megacontext.working_context import old_blocks, smallest_length
from nanochat.common import UserError
from nanochat.ranges import Amount, Count, CountOr0, Fraction, Range, check


@dataclass(frozen=True)
class MCConfig:
    """All settings, checked on construction (UserError). `resolve` replaces each -1 by a number."""

    # Tree
    block_size: Annotated[int, Range(2)] = 32
    """K: number of tokens, or of gists of the level below, that one gist stands for"""
    mc_tree: Literal["ram", "disk"] = "ram"
    """where sessions keep their trees: in memory, or on disk, from which chat_web resumes chats after a restart"""
    mc_positional: Literal["near", "rank", "gaussian", "simple"] = "near"
    """rotary positions: each entry where its span is, gists faded (gaussian) or at the centre (simple); one entry after
    another (rank, mc_train's default); as gaussian, but beyond the newest tokens of streams longer than T as rank
    (near)"""
    # GistNet
    gistnet_type: Literal["transformer", "mean", "copied"] = "transformer"
    """how gists are made: by a new network, as the mean of the block, or by a network initialized with the lowest
    layers of a trained model (mc_train's default)"""
    gistnet_layers: Literal[2, 4, 6] = 2
    """layers of GistNet"""
    gistnet_pooling: Literal["mean", "query", "cls"] = "mean"
    """how GistNet pools its outputs into one vector"""
    gistnet_head: Literal["linear", "mlp"] = "mlp"
    """last layer of GistNet"""
    gistnet_start: Literal["mean", "last"] = "mean"
    """what GistNet's correction is added to: the mean of a block, or its last element (mc_train's default)"""
    gistnet_deep: CountOr0 = 3
    """number of later layers of the model, evenly spaced, before which a gist adds one more vector to the residual
    stream"""
    mc_gist_limit: CountOr0 = 0
    """number of gists in a working context above which each gets less attention and, with rank, several share a
    position, for models not trained with that many; 0 for no limit; mc_train's default is 32"""
    # LensNet
    lensnet_type: Literal["transformer"] = "transformer"
    """network that computes the key of a block"""
    lensnet_layers: Literal[2, 4, 8] = 2
    """layers of LensNet's key network"""
    lensnet_head: Literal["linear", "mlp"] = "mlp"
    """last layer of LensNet's key network"""
    mc_beside: Fraction = 0.0
    """fraction of a wanted block's logit that its two neighbours get at least, so that sentences are opened whole;
    mc_train's default is 0.9"""
    # Focus allocator
    allocator: Literal["greedy", "stochastic_greedy"] = "greedy"
    """open the best blocks, or draw them at random from the best"""
    allocator_sample_top_k: Count = 4
    """stochastic_greedy: number of best blocks from which one is drawn"""
    allocator_sample_temperature: Annotated[float, Range(1e-6, 1e30)] = 1.0
    """stochastic_greedy: temperature of the draw"""
    allocator_soft_max: Count = -1
    """budget: maximum number of entries in a working context; -1 for 3/4 of max_seq_len, or the minimum that a session
    needs if that is more"""
    allocator_recent_tokens: CountOr0 = -1
    """number of newest tokens that are never compressed; -1 for 1/16 of max_seq_len, rounded up to whole blocks"""
    allocator_expand_threshold: Fraction = 0.1
    """minimum score for opening a block, 0 to 1"""
    allocator_collapse_threshold: Fraction = 0.1
    """while generating, siblings collapse to make room for a block only if its score exceeds theirs by at least
    allocator_expand_threshold plus this, 0 to 1; after a prompt, any higher score suffices"""
    allocator_max_replacements: Count = 4
    """maximum number of blocks opened per round"""
    allocator_iterations: Count = 4
    """maximum rounds of scoring and editing after a prompt; a round without edits is the last"""
    # Training
    mc_num_random_variants: Count = 2
    """number of random variants of each compressed sequence that are read; half of the sequences are read in full"""
    mc_start: Annotated[float, Range(0, 0.99)] = 0.0
    """fraction of the training, at its start, in which all sequences are read in full: a small model may have to learn
    to look things up before gists are of use; base_train's default is 0.6"""
    mc_past: CountOr0 = -1
    """maximum number of preceding tokens that a compressed sequence of pretraining text is read with, mostly as gists;
    0 for none, as always in mid_train; -1 for 16 × max_seq_len, or 0 if block_size does not divide max_seq_len"""
    mc_train_wc_length: Count = -1
    """entries per variant at the end of training; -1 for 20% of max_seq_len, but no fewer than two open blocks need"""
    mc_max_counterfactuals: Count = 1
    """number of random compressed versions of each sequence read in full, in which LensNet learns to find what is
    hidden"""
    mc_lens_loss_weight: Amount = 1.0
    """weight of LensNet's loss in the sum; it also multiplies LensNet's learning rates. 0: LensNet is not trained"""
    mc_auto_batch: bool = True
    """split micro-batches for which MegaContext needs more memory than the plain model"""
    mc_aux_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """precision of GistNet and LensNet; auto is bf16 on hardware where that is faster"""
    mc_freeze_base: bool = False
    """train GistNet and LensNet only, and leave the model unchanged"""
    # Evaluation and inference
    mc_eval_soft_max_length: Count = -1
    """budget of working contexts in validation; -1 for that of a session right after a refocus"""
    mc_infer_allocator_max_replacements: Count = -1
    """maximum number of blocks opened per round in inference; -1 for allocator_max_replacements"""
    mc_infer_allocator_iterations: Count = -1
    """maximum rounds of scoring and editing after a prompt in inference; -1 for allocator_iterations"""
    mc_infer_refocus_interval: Count = 32
    """maximum number of generated tokens between refocuses; a token that wants a hidden block causes one at once"""
    mc_infer_exact: bool = False
    """after a refocus, read everything behind the first edit again (a slow reference), not only the new entries and
    the newest tokens"""

    def __post_init__(self):
        check(self)

    @classmethod
    def saved(cls, settings: dict) -> "MCConfig":
        """The settings in a checkpoint's metadata. What older ones lack had other defaults then."""
        return cls(**{"gistnet_deep": 0} | settings)

    def of_networks(self) -> dict:
        """The settings with which networks are made, and with which a model learns to read their gists."""
        names = "block_size", "mc_positional", "gistnet_", "lensnet_", "mc_gist_limit", "mc_beside"
        return {name: value for name, value in vars(self).items() if name.startswith(names)}

    def begun(self, progress) -> float:
        """Completed fraction of the training with gists, which begins at mc_start; negative before that."""
        return (progress - self.mc_start) / (1 - self.mc_start)

    def resolve(self, max_seq_len: int) -> "MCConfig":
        """
        These settings for a model of context length max_seq_len, with each -1 replaced by a value.

        Raises UserError for settings that contradict max_seq_len or each other, such as a budget that is too small.
        """
        K = self.block_size
        alone = "0 with --mc_freeze_base, where the model has nothing to learn alone"
        _expect("mc_start", self.mc_start, not (self.mc_freeze_base and self.mc_start), alone)
        _expect("block_size", K, max_seq_len >= K, f"at most max_seq_len, {max_seq_len}")
        config = self._derive(allocator_recent_tokens=-(-max_seq_len // (16 * K)) * K)
        long = min(max_seq_len, config._least(max_seq_len**2))  # small blocks and budgets: room for long streams, too
        config = config._derive(  # 3/4: in fuller working contexts, models read less of open blocks (dev/LOG.md)
            allocator_soft_max=max(3 * max_seq_len // 4, config._least(max_seq_len), long),
            mc_infer_allocator_max_replacements=self.allocator_max_replacements,
            mc_infer_allocator_iterations=self.allocator_iterations,
            mc_past=0 if max_seq_len % K else 16 * max_seq_len,
        )
        whole = config.mc_past == 0 or (config.mc_past >= max_seq_len and max_seq_len % K == 0)
        _expect("mc_past", config.mc_past, whole, f"0, or at least max_seq_len, {max_seq_len}, in blocks of {K} tokens")
        recent = config.allocator_recent_tokens
        smallest = smallest_length(max_seq_len, K, recent)
        # Room for two open blocks, so that the model learns to read mixtures, as in inference
        two_open = max_seq_len - (K - 1) * max(0, old_blocks(max_seq_len, K, recent) - 2)
        config = config._derive(
            mc_train_wc_length=max(max_seq_len // 5, two_open),
            mc_eval_soft_max_length=max(smallest, config.budget_of_a_refocus),
        )
        for name in ("allocator_soft_max", "mc_train_wc_length", "mc_eval_soft_max_length"):
            what = (
                f"at least {smallest}, the fewest entries for {max_seq_len} tokens with the newest {recent} "
                f"(--allocator_recent_tokens) at full detail"
            )
            _expect(name, getattr(config, name), getattr(config, name) >= smallest, what)
        length = config.mc_train_wc_length
        _expect("mc_train_wc_length", length, length <= max_seq_len, f"at most max_seq_len, {max_seq_len}")
        return config

    @property
    def budget_of_a_refocus(self) -> int:
        """Entries that a refocus of a session may leave: the next ones must fit until the refocus after it."""
        return self.allocator_soft_max - self.mc_infer_refocus_interval

    def deep_layers(self, n_layer: int) -> int:
        """Number of layers behind the first, in a model of n_layer, before which gists add a vector; 0 for means."""
        return 0 if self.gistnet_type == "mean" else min(self.gistnet_deep, n_layer - 1)

    def check_session(self, max_seq_len: int):
        """Raises UserError if a session of a model of this context length cannot keep to the budget."""
        K, recent, interval = self.block_size, self.allocator_recent_tokens, self.mc_infer_refocus_interval
        least = self._least(max_seq_len)
        if self.allocator_soft_max < least:
            raise UserError(
                f"--allocator_soft_max: expected at least {least} entries: {recent} recent tokens, up "
                f"to {K - 1} of an incomplete block, up to {K - 1} gists of each level, and {interval} "
                f"tokens until the next refocus; got {self.allocator_soft_max}. Raise it, or lower "
                f"--allocator_recent_tokens, --mc_infer_refocus_interval or --block_size"
            )

    def _least(self, max_seq_len):
        """Entries that a session needs at least; check_session's message lists them."""
        K, levels, blocks = self.block_size, 0, max_seq_len // self.block_size
        while blocks:
            levels, blocks = levels + 1, blocks // K
        return self.allocator_recent_tokens + (K - 1) * (1 + levels) + self.mc_infer_refocus_interval

    def _derive(self, **values):
        """These settings with the given values for those that are -1."""
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) == -1})


def _expect(name, value, holds, what):
    if not holds:
        raise UserError(f"--{name}: expected {what}, got {value!r}")
