"""Models of other libraries keep their parameters, names and results, and get true gradients."""

import copy
import pickle

import peer_code
import pytest
import torch
from torch import Tensor, nn

from revdist.errors import UsageError
from revdist.planning.costs import Mode
from revdist.reversible import ReversibleChain, ReversibleOperator, find_chain
from revdist.reversible.adapters import adapt, take_over

torch.set_num_threads(1)


class ScaleAndShift(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.conv(x).chunk(2, dim=1)
        return scale.sigmoid() + 0.5, shift


def branch() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.2))


def additive() -> nn.Module:
    return peer_code.AdditiveCoupling(branch(), branch())


def affine() -> nn.Module:
    return peer_code.AffineCoupling(ScaleAndShift(2), ScaleAndShift(2))


def wrapped() -> nn.Module:
    return peer_code.InvertibleModuleWrapper(additive())


def invert_all(model: nn.Module) -> None:
    chain = find_chain(model)
    chain.set_schedule([Mode.INVERT if Mode.INVERT in modes else Mode.SAVE for modes in chain.options()])


def result(model: nn.Module, *args: object, **kwargs: object) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(3)
    out = model(*args, **kwargs)
    out = out if isinstance(out, Tensor) else out.hidden_states
    model.zero_grad()
    out.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients, {name: b.clone() for name, b in model.named_buffers()}


def assert_same(found: tuple, expected: tuple) -> None:
    torch.testing.assert_close(found[0], expected[0])
    for index in (1, 2):
        assert found[index].keys() == expected[index].keys()
        for name, value in expected[index].items():
            torch.testing.assert_close(found[index][name], value, msg=name)


@pytest.mark.parametrize(
    "parts",
    [
        (additive, additive),
        (affine, affine),
        (wrapped, additive),
        (lambda: nn.Conv2d(4, 4, 1), wrapped, nn.ReLU, affine),
    ],
    ids=["additive", "affine", "wrapped", "mixed"],
)
def test_a_sequence_of_memcnn_couplings_becomes_a_chain(parts: tuple) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(*(part() for part in parts)), nn.Flatten()).double()
    x_BCHW = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    expected = result(copy.deepcopy(model), x_BCHW)
    keys = list(model.state_dict())
    parameters = list(model.parameters())
    assert take_over(model) is model
    assert isinstance(model[1], ReversibleChain)
    assert set(model.state_dict()) == set(keys)
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    invert_all(model)
    assert_same(result(copy.deepcopy(model), x_BCHW), expected)


def test_a_wrapper_that_stands_alone_becomes_a_chain_of_its_own() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = wrapped()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * 2

    model = Net().double()
    x_BCHW = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    expected = result(copy.deepcopy(model), x_BCHW)
    keys = set(model.state_dict())
    invert_all(take_over(model))
    assert set(model.state_dict()) == keys
    assert_same(result(model, x_BCHW), expected)


def test_a_module_with_several_names_is_taken_over_once() -> None:
    torch.manual_seed(0)
    shared = additive()
    sequence = nn.Sequential(shared, affine(), shared)
    model = nn.Sequential(sequence, nn.Conv2d(4, 4, 1), sequence).double()
    x_BCHW = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    expected = result(copy.deepcopy(model), x_BCHW)
    keys = list(model.state_dict())
    take_over(model)
    assert model[0] is model[2]
    assert model[0].get_submodule("0") is model[0].get_submodule("2")
    assert set(model.state_dict()) == set(keys)
    invert_all(model)
    assert_same(result(model, x_BCHW), expected)


def test_training_flags_stay_where_they_were() -> None:
    """Statistics are often frozen by eval() on the norms of a model that trains."""
    sequence = nn.Sequential(wrapped(), additive())
    reformer = peer_code.ReformerModel()
    other = peer_code.AdditiveCoupling(branch(), branch())
    for model in (sequence, reformer, other):
        frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.LayerNorm)]
        assert frozen
        for norm in frozen:
            norm.eval()
        taken = adapt(model) if model is other else take_over(model)
        assert taken.training
        if model is reformer:
            with torch.no_grad():
                taken(torch.randint(16, (2, 6)))
        assert all(module.training is (module not in frozen) for module in taken.modules())


def test_split_dimension_is_the_couplings() -> None:
    torch.manual_seed(0)

    def linear() -> nn.Module:
        return peer_code.AdditiveCoupling(nn.Linear(3, 3), nn.Linear(3, 3), split_dim=2)

    model = nn.Sequential(linear(), linear()).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = result(model, x)
    chain = take_over(model)
    assert isinstance(chain, ReversibleChain)
    assert chain.split_dim == 2
    invert_all(chain)
    assert_same(result(chain, x), expected)
    with pytest.raises(UsageError, match=r"\[1, 2\]"):
        take_over(nn.Sequential(linear(), additive()))


def test_take_over_says_where_there_is_nothing() -> None:
    with pytest.raises(UsageError, match="has no memcnn modules"):
        take_over(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("masked", [False, True])
def test_a_reformers_layers_become_a_chain(masked: bool) -> None:
    torch.manual_seed(0)
    model = peer_code.ReformerModel().double()
    token = torch.randint(16, (2, 6))
    arguments = {"num_hashes": 3}
    if masked:
        arguments["attention_mask"] = torch.rand(2, 6, dtype=torch.float64)
    expected = result(copy.deepcopy(model), token, **arguments)
    keys = set(model.state_dict())
    take_over(model)
    assert set(model.state_dict()) == keys
    invert_all(model)
    assert_same(result(model, token, **arguments), expected)


def test_a_backward_gets_the_mask_of_its_own_forward() -> None:
    torch.manual_seed(0)
    model = peer_code.ReformerModel().double().eval()
    plain = copy.deepcopy(model)
    take_over(model)
    invert_all(model)
    tokens = [torch.randint(16, (2, 6)) for _ in range(2)]
    masks = [torch.rand(2, 6, dtype=torch.float64) for _ in range(2)]
    both = []
    for net in (model, plain):
        torch.manual_seed(1)
        losses = [
            net(token, attention_mask=mask).hidden_states.square().sum()
            for token, mask in zip(tokens, masks, strict=True)
        ]
        both.append(torch.autograd.grad(losses[0] + 2 * losses[1], list(net.parameters())))
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_call_that_fails_leaves_no_mask_behind() -> None:
    torch.manual_seed(0)
    model = peer_code.ReformerModel().double().eval()
    take_over(model)
    token = torch.randint(16, (2, 6))
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(token, attention_mask=torch.rand(3, 7, dtype=torch.float64))
    assert model(token, output_hidden_states=True).hidden_states.shape == (2, 6, 16)


def test_generation_and_extra_outputs_are_left_to_the_original() -> None:
    torch.manual_seed(0)
    model = peer_code.ReformerModel().double().eval()
    plain = copy.deepcopy(model)
    take_over(model)
    token = torch.randint(16, (2, 6))
    for arguments in ({"output_hidden_states": True}, {}):
        with torch.set_grad_enabled(bool(arguments)):
            outputs = []
            for net in (model, plain):
                torch.manual_seed(1)
                outputs.append(net(token, **arguments))
        torch.testing.assert_close(outputs[0].hidden_states, outputs[1].hidden_states)
        assert (outputs[0].all_hidden_states is None) == (not arguments)


def test_a_reformer_taken_over_can_be_copied_and_pickled() -> None:
    torch.manual_seed(0)
    model = peer_code.ReformerModel().double()
    take_over(model)
    token = torch.randint(16, (2, 6))
    expected = result(copy.deepcopy(model), token)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in model.parameters():
            assert all(parameter is not other for other in twin.parameters())
        invert_all(twin)
        assert_same(result(twin, token), expected)


def test_a_class_of_ones_own_is_an_operator_after_one_line() -> None:
    class Rotate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.angle = nn.Parameter(torch.tensor(0.3))

        def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = self.angle.cos(), self.angle.sin()
            return cos * x1 - sin * x2, sin * x1 + cos * x2

        def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = self.angle.cos(), self.angle.sin()
            return cos * y1 + sin * y2, cos * y2 - sin * y1

    module = Rotate().double()
    chain = ReversibleChain([adapt(module, num_streams=2)])
    x = torch.randn(2, 4, dtype=torch.float64)
    weight = torch.randn(2, 4, dtype=torch.float64)
    gradients = []
    for mode in (Mode.SAVE, Mode.INVERT):
        chain.set_schedule([mode])
        gradients.append(torch.autograd.grad((chain(x) ** 3 * weight).sum(), module.angle)[0])
    torch.testing.assert_close(*gradients)


def test_adapting_what_is_adapted_or_cannot_be() -> None:
    operator = adapt(additive())
    assert isinstance(operator, ReversibleOperator)
    assert adapt(operator) is operator
    assert isinstance(adapt(wrapped()), ReversibleOperator)
    with pytest.raises(UsageError, match="is not reversible: give it a method `inverse`"):
        adapt(nn.Linear(2, 2))


def test_memcnn_itself() -> None:
    memcnn = pytest.importorskip("memcnn", reason="a peer, not a dependency")
    torch.manual_seed(0)
    model = nn.Sequential(
        *(memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(branch(), branch())) for _ in range(3))
    ).double()
    reference = nn.Sequential(*(copy.deepcopy(wrapper._fn) for wrapper in model)).double()
    x_BCHW = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    expected = result(reference, x_BCHW)
    chain = take_over(model)
    invert_all(chain)
    found = result(chain, x_BCHW)
    torch.testing.assert_close(found[0], expected[0])
    for name, value in expected[1].items():
        index, rest = name.split(".", 1)
        torch.testing.assert_close(found[1][f"{index}._fn.{rest}"], value)


def test_transformers_itself() -> None:
    transformers = pytest.importorskip("transformers", reason="a peer, not a dependency")
    torch.manual_seed(0)
    config = transformers.ReformerConfig(
        vocab_size=32,
        attention_head_size=8,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=4,
        feed_forward_size=32,
        attn_layers=["local", "lsh", "local", "lsh"],
        axial_pos_embds=False,
        max_position_embeddings=64,
        local_attn_chunk_length=8,
        lsh_attn_chunk_length=8,
        num_buckets=4,
        num_hashes=2,
        is_decoder=True,
        hidden_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        hash_seed=7,
    )
    model = transformers.ReformerModelWithLMHead(config).double().train()
    token = torch.randint(32, (2, 64))

    def gradients(net: nn.Module) -> dict[str, Tensor]:
        net.zero_grad()
        net(token, labels=token).loss.backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    expected = gradients(copy.deepcopy(model))
    keys = set(model.state_dict())
    take_over(model)
    assert set(model.state_dict()) == keys
    invert_all(model)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    model.eval()
    assert model.generate(token[:, :8], max_new_tokens=3, do_sample=False).shape == (2, 11)
