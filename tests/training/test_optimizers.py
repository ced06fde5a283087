"""Muon and AdamW as one optimiser; that a continued run repeats with it is in test_stages.py."""

import copy

import pytest
import torch
from torch import nn

from imageconductor.training.optimizers import MuonAndAdamW

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.linear = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.linear(self.conv(self.embedding(tokens).mT).mT)


def one_group(net):
    return {"params": dict(net.named_parameters()), **SETTINGS}


def learn(net, *optimizers, steps=3):
    for _ in range(steps):
        net(torch.arange(5)[None]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@muon
def test_it_is_muon_for_matrices_and_adamw_for_the_rest():
    torch.manual_seed(0)
    together = Net()
    apart = copy.deepcopy(together)
    learn(together, MuonAndAdamW([one_group(together)]))
    rest = [parameter for name, parameter in apart.named_parameters() if name != "linear.weight"]
    learn(
        apart,
        torch.optim.Muon([apart.linear.weight], **SETTINGS, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, **SETTINGS, fused=True),
    )
    for (name, one), other in zip(together.named_parameters(), apart.parameters(), strict=True):
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
    with pytest.raises(ValueError, match="no matrix"):
        MuonAndAdamW([one_group(nn.Conv1d(2, 2, 1))])


def test_an_old_pytorch_is_told(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"optimizer=muon needs PyTorch 2\.9"):
        MuonAndAdamW([one_group(Net())])
