"""Muon and AdamW as one optimiser; that a continued run repeats with it is in test_stages.py."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imageconductor.training.optimizers import MuonAndAdamW, build_optimizer
from imageconductor.training.sharding import check_gradients
from imageconductor.training.stages.base import ParameterGroup

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.conv_in = nn.Conv2d(4, 4, 1)
        self.filters = nn.Conv2d(4, 6, (3, 1), padding=(1, 0))
        self.linear = nn.Linear(6, 3)

    def forward(self, tokens):
        features = self.conv(self.embedding(tokens).mT)[..., None]
        return self.linear(self.filters(self.conv_in(features))[..., 0].mT)


def one_group(net):
    return {"params": dict(net.named_parameters()), **SETTINGS}


def learn(net, *optimizers, steps=3):
    for _ in range(steps):
        net(torch.arange(5)[None]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


class Apart(Net):
    """The same with the filters as a matrix of its own."""

    def __init__(self, like):
        super().__init__()
        self.load_state_dict(like.state_dict())
        self.matrix = nn.Parameter(like.filters.weight.detach().permute(0, 2, 3, 1).reshape(6, 12).clone())

    def forward(self, tokens):
        filters = self.matrix.view(6, 3, 1, 4).permute(0, 3, 1, 2)
        features = self.conv_in(self.conv(self.embedding(tokens).mT)[..., None])
        return self.linear(nn.functional.conv2d(features, filters, self.filters.bias, padding=(1, 0))[..., 0].mT)


@pytest.fixture
def computes_bfloat16(monkeypatch):
    """A function that says whether the device is one that has instructions for bfloat16."""
    return lambda does: monkeypatch.setattr("imageconductor.training.optimizers.has_instructions", lambda *_: does)


@muon
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_muon_for_matrices_and_filters_and_adamw_for_the_rest(layout, computes_bfloat16):
    computes_bfloat16(True)
    torch.manual_seed(0)
    together = Net().to(memory_format=layout)
    apart = Apart(together)
    learn(together, MuonAndAdamW([one_group(together)]))
    weights = ("linear.weight", "matrix")
    rest = [p for name, p in apart.named_parameters() if name not in (*weights, "filters.weight")]
    learn(
        apart,
        torch.optim.Muon([apart.linear.weight, apart.matrix], **SETTINGS, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, **SETTINGS, fused=True),
    )
    found = dict(together.named_parameters())
    filters = found.pop("filters.weight").permute(0, 2, 3, 1).reshape(6, 12)
    torch.testing.assert_close(filters, apart.matrix, rtol=1e-4, atol=1e-6)
    for name, one in found.items():
        torch.testing.assert_close(one, apart.get_parameter(name), rtol=1e-4, atol=1e-6, msg=name)


class Seen(TorchDispatchMode):
    """The types of all results."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.dtypes |= {one.dtype for one in tree_leaves(result) if isinstance(one, torch.Tensor)}
        return result


@muon
def test_a_device_that_imitates_bfloat16_is_spared_it(computes_bfloat16):
    torch.manual_seed(0)
    start, changes = Net(), {}
    gradients = {name: torch.randn_like(p) for name, p in start.named_parameters()}
    for does in (True, False):
        computes_bfloat16(does)
        net = copy.deepcopy(start)
        for name, p in net.named_parameters():
            p.grad = gradients[name].clone()
        with Seen() as seen:
            MuonAndAdamW([one_group(net)]).step()
        assert (torch.bfloat16 in seen.dtypes) == does
        changes[does] = {name: p.detach() - start.get_parameter(name) for name, p in net.named_parameters()}
    for name, change in changes[True].items():  # Muon's are alike but for rounding, the others the same.
        allowed = 0.03 * change.abs().max().item() if name in ("linear.weight", "filters.weight") else 0.0
        torch.testing.assert_close(changes[False][name], change, rtol=0, atol=allowed, msg=name)


@muon
def test_it_goes_on_from_its_saved_state():
    torch.manual_seed(0)
    whole = Net()
    halves = copy.deepcopy(whole)
    learn(whole, MuonAndAdamW([one_group(whole)]), steps=5)
    first = MuonAndAdamW([one_group(halves)])
    learn(halves, first, steps=2)
    second = MuonAndAdamW([one_group(halves)])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    learn(halves, second, steps=3)
    for (name, one), other in zip(whole.named_parameters(), halves.parameters(), strict=True):
        assert torch.equal(one, other), name


@muon
def test_a_learning_rate_set_from_outside_reaches_both():
    net = Net()
    optimizer = MuonAndAdamW([one_group(net)])
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(net.state_dict())
    learn(net, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@muon
def test_without_a_matrix_it_is_refused():
    with pytest.raises(ValueError, match="finds no weight"):
        MuonAndAdamW([one_group(nn.Conv1d(2, 2, 1))])


def test_an_old_pytorch_is_told(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"optimizer=muon needs PyTorch 2\.9"):
        MuonAndAdamW([one_group(Net())])


def test_8_bit_moments_need_a_gpu_and_their_library(monkeypatch):
    net = Net()
    config = SimpleNamespace(optimizer="adamw_8bit", learning_rate=1e-2, weight_decay=0.1)
    weight, bias = ({name: p} for name, p in net.linear.named_parameters())
    groups = [ParameterGroup(weight), ParameterGroup(bias, learning_rate=1e-3, weight_decay=0.0)]
    with pytest.raises(ValueError, match="adamw_8bit needs a CUDA device, this is cpu; use optimizer=adamw"):
        build_optimizer(groups, config, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"adamw_8bit needs bitsandbytes: pip install 'imageconductor\[lowmem\]'"):
        build_optimizer(groups, config, torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=list))
    assert build_optimizer(groups, config, torch.device("cuda")) == [
        {"params": [net.linear.weight], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [net.linear.bias], "lr": 1e-3, "weight_decay": 0.0},
    ]


def test_a_backward_pass_that_reaches_nothing_is_an_error():
    """Of split weights; a part that gets no gradient is none."""
    net = Net()
    with pytest.raises(RuntimeError, match="gives no gradients here"):
        check_gradients(list(net.parameters()))
    net.linear.bias.grad = torch.zeros(3)
    check_gradients(list(net.parameters()))
