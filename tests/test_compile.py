"""--compile on the CPU, traced as for a GPU but not translated: equal results, no graph breaks, few graphs."""

from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megacontext.attach import attach, generating
from megacontext.config import MCConfig
from megacontext.gistnet import Encoder
from megacontext.session import MCSession
from nanochat.cross_entropy import loss_of_rows
from nanochat.decode import Decoder, StaticStep
from nanochat.gpt import Block, GPTConfig
from nanochat.kv_cache import CacheSession
from nanochat.loop import maybe_compile
from tests.helpers import BOS, RECENT, K, make_model, tokens

# PyTorch looks at gradients while it traces, and hides its own warning in a way that errors of pytest go past
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
CPU = torch.device("cpu")


@contextmanager
def tracing():
    """In it, torch.compile works as always, without a compiler for what was traced."""
    torch.compiler.reset()
    clear_compilation_metrics()
    counters.clear()
    with mock.patch("torch.compile", partial(torch.compile, backend="eager")):
        yield
    torch.compiler.reset()


def graphs() -> dict[str, int]:
    """How many graphs were compiled of the functions of each file until now; none may have been broken."""
    assert not counters["graph_break"]
    files = [metrics.co_filename for metrics in get_compilation_metrics() if metrics.co_filename]
    return dict(Counter(Path(file).stem for file in files))


def objective_of(model, compile="on", **options):
    options = {"block_size": K, "allocator_recent_tokens": RECENT, "mc_aux_dtype": "fp32", **options}
    config = SimpleNamespace(mc=True, megacontext=MCConfig(**options), compile=compile)
    torch.manual_seed(1)
    networks, make_objective = attach(config, model.config, CPU, BOS)
    for p in networks.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    return networks, make_objective(maybe_compile(model, compile, CPU)), config


@pytest.mark.parametrize("validated_first", [False, True])  # True: as base_train does
def test_a_training_with_mc(validated_first):
    """
    Losses and gradients are those of eager. Few graphs serve it all: of the model, the dense sequences', the variants'
    at their first length and at any other, and one more without gradients.
    """
    eager = make_model()
    networks, uncompiled, _ = objective_of(eager, "off")
    expected = [p for module in (eager, networks) for p in module.parameters()]
    model = make_model()
    with tracing():
        networks, objective, config = objective_of(model)

        def validate():
            with torch.no_grad():
                objective.validate(iter([tokens(B=4), tokens(B=4, seed=1)]), 2, torch.ones(70, dtype=torch.long))

        if validated_first:
            validate()
        for progress in (0, 0.3, 0.6, 1.0):
            loss, other = (o(*tokens(B=4), progress, seed=0)[0] for o in (objective, uncompiled))
            (loss + other).backward()
            assert loss.item() == pytest.approx(other.item(), rel=1e-5)
        for one, other in zip((p for m in (model, networks) for p in m.parameters()), expected, strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-3)
        if not validated_first:
            assert graphs() == {"gpt": 3, "cross_entropy": 2, "gistnet": 4}
            validate()
        assert graphs() == {"gpt": 4, "cross_entropy": 2, "gistnet": 5 - validated_first}
        validate()
        with generating(config, SimpleNamespace(model=model, companion=networks)) as make_session:
            session = make_session()  # whose shapes all differ: nothing is compiled for them
            session.prefill(list(range(1, 60)))
            for i in range(40):
                session.step(torch.tensor([i]))
        assert graphs() == {"gpt": 4, "cross_entropy": 2, "gistnet": 5 - validated_first}


def test_plain_training_and_rows_of_any_length():
    """One graph where all rows are as long, one more for any other length, as in supervised finetuning."""
    with tracing():
        eager, model = make_model(), maybe_compile(make_model(), "on", CPU)
        for length in (64, 64, 50, 40, 33):
            x, y = (t[:, :length] for t in tokens(B=4))
            loss, other = (m(x, y, loss_reduction="sum") for m in (model, eager))
            (loss + other).backward()
            assert loss.item() == pytest.approx(other.item(), rel=1e-5)
            assert graphs() == {name: 1 + (length < 64) for name in ("gpt", "cross_entropy")}
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-3)


class Operations(TorchDispatchMode):
    """Counts what the host starts one by one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_little_is_started_one_by_one(monkeypatch):
    """
    Of a forward pass with --mc, beside what is compiled: about thirty operations per layer, for where it looks, and ten
    per layer before which gists add a vector, which are one of two and three of six.
    """

    def out_of_sight(function):
        def call(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Block, "forward", out_of_sight(Block.forward))
    monkeypatch.setattr(Encoder, "forward", out_of_sight(Encoder.forward))
    counts = []
    for layers in (2, 6):
        model = make_model(GPTConfig(64, 70, layers, 2, 2, 32))
        model.loss_of_rows = out_of_sight(loss_of_rows)
        _, objective, _ = objective_of(model, "off")
        with Operations() as left:
            objective(*tokens(B=4), 1.0, seed=0)
        counts.append(left.count)
    assert counts[1] - counts[0] <= 4 * 32 + 2 * 10
    assert counts[0] < 1200, counts


@pytest.mark.parametrize("mc", [False, True])
def test_steps_are_recorded_once(mc, monkeypatch):
    """What a GPU would record as a graph, for all steps of an answer; with --mc, refocuses included."""
    recorded = []
    record = StaticStep._record
    monkeypatch.setattr(StaticStep, "_record", lambda self: (recorded.append(1), record(self)))
    model = make_model().eval()
    if mc:
        networks, objective, _ = objective_of(model, "off", allocator_soft_max=48, mc_infer_refocus_interval=6)
        session = MCSession(model, networks.eval(), objective.config, decoder=Decoder(model, graph=True))
    else:
        session = CacheSession(Decoder(model, graph=True), 1, 40)
    session.prefill(list(range(1, 60)))
    for i in range(40):
        session.step(torch.tensor([i]))
    assert len(recorded) == 1
