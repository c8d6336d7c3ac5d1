"""What a forward notes is what its replays read."""

import pytest
import torch
from torch import Tensor, nn

from revdist.errors import ReplayDiverged
from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, ReversibleChain
from revdist.reversible.notes import Notes, noted


class Choosy(nn.Module):
    """Scales by a number that it would choose differently every time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.num_choices = 0

    def choose(self) -> Tensor:
        self.num_choices += 1
        return torch.tensor(float(self.num_choices))

    def forward(self, x: Tensor) -> Tensor:
        first = noted(self, self.choose)
        second = noted(self, self.choose)
        out: Tensor = self.linear(x) * first + self.linear(x) ** 2 * second
        return out


@pytest.mark.parametrize("mode", [Mode.SAVE, Mode.INVERT])
def test_a_forward_chooses_once_whatever_its_backward_does(mode: Mode) -> None:
    torch.manual_seed(0)
    f, g = Choosy(), Choosy()
    chain = ReversibleChain([AdditiveCoupling(f, g)]).double()
    chain.set_schedule((mode, mode))
    halves = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    y1, y2 = chain(halves)
    found = torch.autograd.grad((y1 * y2).sum(), list(chain.parameters()))
    assert (f.num_choices, g.num_choices) == (2, 2)
    f.num_choices = g.num_choices = 0
    y1, y2 = AdditiveCoupling.forward(chain.get_submodule("0"), *halves)
    expected = torch.autograd.grad((y1 * y2).sum(), list(chain.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_owners_read_their_own_notes_in_their_own_order() -> None:
    notes, first, second = Notes(), nn.Identity(), nn.Identity()
    with notes.taking():
        for owner, value in ((first, 1.0), (second, 2.0), (first, 3.0)):
            noted(owner, lambda value=value: torch.tensor(value))
    for _ in range(2):
        with notes.reading():
            assert float(noted(second, lambda: torch.tensor(0.0))) == 2
            assert float(noted(first, lambda: torch.tensor(0.0))) == 1
            assert float(noted(first, lambda: torch.tensor(0.0))) == 3


def test_asking_for_more_than_was_noted_is_an_error() -> None:
    notes, owner = Notes(), nn.Identity()
    with notes.taking():
        noted(owner, lambda: torch.tensor(1.0))
    with notes.reading():
        noted(owner, lambda: torch.tensor(1.0))
        with pytest.raises(ReplayDiverged, match="asks for note 2"):
            noted(owner, lambda: torch.tensor(1.0))


def test_outside_a_chain_it_just_computes() -> None:
    assert [float(noted(nn.Identity(), lambda value=value: torch.tensor(value))) for value in (1.0, 2.0)] == [1, 2]
