"""Training with the compiled kernels together with hooks, copies, compilers, threads and processes."""

from __future__ import annotations

import copy
import gc
import io
import threading
import warnings
import weakref

import pytest
import torch
from forked import Forked
from native_block import BLOCK, SEGMENTS, SPEC, assert_near, assert_same, block, images, learn, x_of
from torch import Tensor, fx, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.func import grad as gradient_of
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from effnet.models.efficientnet import EfficientNet
from effnet.native import instruction_sets

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="nothing was compiled")


def torchs(module: nn.Module) -> nn.Module:
    """A copy that torch computes."""
    twin = copy.deepcopy(module)
    for each in twin.modules():
        if hasattr(type(each), "native"):
            vars(each)["native"] = False
    return twin


LAYOUTS = {
    "NCHW": lambda g: g.contiguous(),
    "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "transposed": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
    "a slice": lambda g: torch.cat([g, g], 1)[:, : g.shape[1]],
    "double": lambda g: g.double(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_maps_and_gradients_come_in_any_layout(name, layout, calls):
    module = block()
    x, gradient = x_of(module), torch.randn(3, 8, 6, 6)
    found = []
    for each, other in ((LAYOUTS[name], LAYOUTS[layout]), (LAYOUTS["NCHW"], LAYOUTS["NCHW"])):
        inner = each(x.detach()).float().requires_grad_()
        torch.manual_seed(1)
        y = copy.deepcopy(module)(inner)
        found += torch.autograd.grad((y.to(other(gradient).dtype) * other(gradient)).sum(), inner)
    assert torch.equal(found[0], found[1])
    assert calls == [BLOCK] * 2


def test_an_expanded_gradient():
    module = block()
    x = x_of(module)
    found = []
    for ones in (torch.ones(1, 1, 1, 1).expand(3, 8, 6, 6), torch.ones(3, 8, 6, 6)):
        torch.manual_seed(1)
        found += torch.autograd.grad(module(x), x, ones)
    assert torch.equal(*found)


def test_frozen_parameters_get_no_gradient(calls):
    module = block()
    x = x_of(module)
    expected = learn(copy.deepcopy(module), x)
    frozen = {"expand.conv.weight", "depthwise.norm.bias", "se.squeeze.bias", "project.norm.weight"}
    for name, weight in module.named_parameters():
        weight.requires_grad_(name not in frozen)
    assert_same(learn(module, x), {name: value for name, value in expected.items() if name not in frozen})
    assert calls == [BLOCK] * 2


@pytest.mark.parametrize("expand", [1, 4])
def test_an_input_without_gradient(expand, calls):
    module = block(expand=expand)
    x = x_of(module)
    expected = learn(copy.deepcopy(module), x)
    del expected["x"]
    assert_same(learn(module, x.detach()), expected)
    assert calls[0] == (BLOCK if expand > 1 else BLOCK - 3)


def test_nothing_is_kept_where_nothing_needs_a_gradient(calls):
    module = block().requires_grad_(False)
    y = module(x_of(module).detach())
    assert not y.requires_grad
    assert calls == [BLOCK]


HOOKS = {
    "save_on_cpu": save_on_cpu,
    "NCHW": lambda: saved_tensors_hooks(lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t),
    "double": lambda: saved_tensors_hooks(lambda t: t.double(), lambda t: t),
}


@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("low", [False, True])
def test_hooks_of_saved_tensors(hooks, low):
    module = block()
    x = x_of(module, torch.bfloat16 if low else torch.float32)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return module(x)

    with hooks():
        found = learn(module, x, run)
    module = copy.deepcopy(module)
    for name, value in module.named_buffers():
        value.copy_(torch.ones_like(value) if "var" in name else torch.zeros_like(value))
    assert_same(found, learn(module, x, run))


def test_a_hook_that_returns_another_shape_is_refused():
    module = block()
    with saved_tensors_hooks(lambda t: t, lambda t: t[..., :1] if t.ndim == 4 else t):
        y = module(x_of(module))
    with pytest.raises(RuntimeError, match=r"need a tensor of \(3, 8, 6, 6\) on the CPU and got \(3, 8, 6, 1\)"):
        y.sum().backward()


def test_what_is_written_over_is_noticed():
    module = block()
    y = module(x_of(module))
    with torch.no_grad():
        module.depthwise.conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_parameters_are_those_of_now(calls):
    module, other = block(), block()
    x = x_of(module)
    learn(module, x)
    fresh = copy.deepcopy(other)
    module.load_state_dict(other.state_dict(), assign=True)
    assert_same(learn(module, x), learn(copy.deepcopy(fresh), x))
    module.double().float()
    module.load_state_dict(fresh.state_dict())
    assert_same(learn(module, x), learn(copy.deepcopy(fresh), x))
    module.project = copy.deepcopy(block().project)
    module.expand.conv.weight = nn.Parameter(torch.randn(32, 8, 1, 1))
    module.depthwise.norm.running_mean = torch.zeros(32)
    module.depthwise.norm.eps, module.expand.norm.momentum = 0.1, 0.5
    twin = torchs(module)
    assert_near(learn(module, x), learn(twin, x))
    for weight in module.parameters():  # not contiguous, then of another type
        weight.data = torch.stack([weight.data] * 2, -1)[..., 0]
    assert_near(learn(module, x), learn(twin, x))
    assert calls == [BLOCK] * len(calls)
    module.expand.norm.weight.data = module.expand.norm.weight.data.double()
    count = len(calls)
    with pytest.raises(RuntimeError):
        module(x)
    assert len(calls) == count  # never with a type that the kernels do not read


def test_stem_weights_in_channels_last(calls):
    network = EfficientNet(SPEC).train()
    x = images()
    expected = learn(copy.deepcopy(network), x)
    assert_same(learn(network.to(memory_format=torch.channels_last), x), expected)
    assert len(calls) == 2 * SEGMENTS


def test_functional_call_uses_the_given_tensors(calls):
    module, other = block(), block()
    x = x_of(module)
    torch.manual_seed(1)
    expected = other(x)
    given = {name: value.detach().clone() for name, value in other.state_dict().items() if "running" not in name}
    torch.manual_seed(1)
    assert torch.equal(functional_call(module, given, (x,)), expected)
    assert calls == [BLOCK] * 2


def test_a_second_derivative_is_refused():
    module = block()
    x = x_of(module)
    with pytest.raises(RuntimeError, match=r"no second derivative.*native\(False\)"):
        torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    twin = torchs(module)
    (first,) = torch.autograd.grad(twin(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()


def test_twice_through_a_kept_graph():
    module = block()
    x = x_of(module)
    y = module(x).square().sum()
    y.backward(retain_graph=True)
    first = {name: weight.grad.clone() for name, weight in module.named_parameters()}
    module.zero_grad()
    y.backward()
    assert_same({name: weight.grad for name, weight in module.named_parameters()}, first)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    module = block()
    x = x_of(module)
    twin = copy.deepcopy(module)
    found = learn(module, x, lambda x: checkpoint(module, x, use_reentrant=reentrant))
    expected = learn(twin, x)
    buffers = {name for name, _ in module.named_buffers()}  # torch.utils.checkpoint moves them twice
    kept = [{name: value for name, value in each.items() if name not in buffers} for each in (found, expected)]
    assert_near(*kept)


def test_tracers_compilers_and_functorch_see_modules(calls):
    network = EfficientNet(SPEC).train()
    x = images()
    assert "stages.2.0.depthwise.norm" in {str(node.target) for node in fx.symbolic_trace(network).graph.nodes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, x, check_trace=False)
    assert "batch_norm" in str(traced.inlined_graph)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = module.num_batches_tracked = None  # written in place
            module.track_running_stats = False
    weights = dict(network.named_parameters())
    found = gradient_of(lambda weights: functional_call(network, weights, (x,)).square().mean())(weights)
    assert found.keys() == weights.keys()
    batched = vmap(lambda x: functional_call(network, weights, (x,)), randomness="different")(torch.stack([x, x]))
    assert batched.shape == (2, 3, 5)
    assert not calls


def test_compiled_training_is_torchs(calls):
    module = block()
    x = x_of(module)
    found = learn(module, x, torch.compile(module, backend="eager", fullgraph=True))
    assert not calls
    assert found["y"].shape == x.shape


def test_two_threads_train_at_once():
    modules = [block(), block(16)]
    inputs = [x_of(module) for module in modules]
    for module in modules:
        module.drop.rate = 0.0
    expected = [learn(copy.deepcopy(module), x) for module, x in zip(modules, inputs, strict=True)]
    found: list[list[dict[str, Tensor]]] = [[], []]

    def train(number: int) -> None:
        for _ in range(20):
            found[number].append(learn(copy.deepcopy(modules[number]), inputs[number]))

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, right in zip(found, expected, strict=True):
        assert len(results) == 20
        for result in results:
            assert_same(result, right)


def test_in_a_thread_of_ones_own():
    module = block()
    x = x_of(module)
    found: list[dict[str, Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(learn(copy.deepcopy(module), x)))
    thread.start()
    thread.join()
    assert_same(found[0], learn(module, x))


def test_copies_and_pickles(calls):
    module = block()
    x = x_of(module)
    learn(module, x)
    kept = io.BytesIO()
    torch.save(module, kept)
    kept.seek(0)
    assert b"Plan" not in kept.getvalue()
    copies = [copy.deepcopy(module), torch.load(kept, weights_only=False)]
    expected = learn(module, x)
    for each in copies:
        assert_same(learn(each, x), expected)
    assert calls == [BLOCK] * 4


def test_a_module_goes_when_nobody_needs_it():
    module = block()
    module(x_of(module)).sum().backward()
    watched = weakref.ref(module), weakref.ref(module.depthwise.conv)
    del module
    gc.collect()
    assert [each() for each in watched] == [None, None]


def distributed(rank: int, where: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{where}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = EfficientNet(SPEC).train()
    x = images(4)
    learner = DistributedDataParallel(network)
    learner(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    torch.save({name: weight.grad for name, weight in network.named_parameters()}, f"{where}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path):
    for process in [Forked(tmp_path / f"{rank}.log", distributed, rank, str(tmp_path)) for rank in range(2)]:
        said = process.communicate(timeout=150)
        assert process.returncode == 0, said
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_same(found[0], found[1])
    torch.manual_seed(0)
    network = EfficientNet(SPEC).train()
    x = images(4)
    halves = []
    for half in (x[:2], x[2:]):
        twin = copy.deepcopy(network)
        twin(half).square().mean().backward()
        halves.append({name: weight.grad for name, weight in twin.named_parameters()})
    assert_near(found[0], {name: (value + halves[1][name]) / 2 for name, value in halves[0].items()})
