"""`swap_attention` in models of torch's own layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnrec.nn import FusedMultiHeadAttention, attention, swap_attention
from attnrec.nn.attention import attend

DIM, HEADS = 32, 4

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The module of each call that the fused kernels served."""
    calls = []

    def spy(module: nn.Module, *args: Any) -> Any:
        calls.append(module)
        return attend(module, *args)

    monkeypatch.setattr(attention, "attend", spy)
    return calls


def make_encoder(layers: int = 2, **arguments: Any) -> nn.TransformerEncoder:
    arguments = {"dim_feedforward": 48, "dropout": 0.0, "batch_first": True} | arguments
    layer = nn.TransformerEncoderLayer(DIM, HEADS, **arguments)
    nested = not layer.norm_first  # torch warns where it will not use it
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested)
    for parameter in encoder.parameters():  # its layers are copies, and its biases zeros
        nn.init.normal_(parameter, std=0.2)
    return encoder


def right_padding(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)


class Ranker(nn.Module):
    """A model with attention at several depths, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, kdim=24, vdim=24)
        self.blocks = nn.ModuleList([nn.MultiheadAttention(DIM, HEADS, batch_first=True) for _ in range(2)])
        self.again = self.blocks[0]
        self.unregistered = [self.blocks[1]]
        self.linear = nn.Linear(DIM, DIM)


def test_swaps_in_place() -> None:
    """The modules and parameters stay the objects that others hold."""
    model = Ranker().to(torch.float64).eval()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    assert swap_attention(model) == ["attention", "blocks.0", "blocks.1"]
    assert dict(model.named_modules()) == modules
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(dict(model.named_parameters())) == list(parameters)
    assert type(model.again) is type(model.unregistered[0]) is FusedMultiHeadAttention
    assert not any(module.training for module in model.modules())
    assert swap_attention(model) == [], "nothing is left to swap"


def test_swaps_the_model_itself() -> None:
    model = nn.MultiheadAttention(DIM, HEADS)
    assert swap_attention(model) == [""]
    assert isinstance(model, FusedMultiHeadAttention)


def test_leaves_subclasses_alone() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"own": Own(DIM, HEADS), "torchs": nn.MultiheadAttention(DIM, HEADS)})
    assert swap_attention(model) == ["torchs"]
    assert type(model["own"]) is Own


def test_results_hooks_and_optimizer_go_on(attended: list) -> None:
    """Training goes on with the optimizer's state, to the same weights as without the swap."""
    plain = Ranker()
    swapped = copy.deepcopy(plain)
    x, history = torch.randn(4, 2, DIM), torch.randn(6, 2, 24)
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in (plain, swapped)]
    seen = []
    handle = swapped.attention.register_forward_hook(lambda *_: seen.append("hook"))

    def step(model: Ranker, optimizer: torch.optim.Optimizer) -> Tensor:
        y, _ = model.attention(x, history, history)
        y, _ = model.blocks[0](y, y, y)
        loss = y.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    for _ in range(2):
        step(plain, optimizers[0]), step(swapped, optimizers[1])
    swap_attention(swapped)
    for _ in range(3):
        torch.testing.assert_close(step(swapped, optimizers[1]), step(plain, optimizers[0]))
    assert len(attended) == 6
    assert len(seen) == 5
    handle.remove()
    step(swapped, optimizers[1])
    assert len(seen) == 5


def test_state_dict_and_copies() -> None:
    model = make_encoder()
    state = copy.deepcopy(model.state_dict())
    swap_attention(model)
    assert list(model.state_dict()) == list(state)
    make_encoder().load_state_dict(model.state_dict())
    model.load_state_dict(state)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.layers[1].self_attn, FusedMultiHeadAttention)
        assert swap_attention(other) == []


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "causal_padding"])
@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_encoder_layer(mode: str, masks: str, norm_first: bool, attended: list) -> None:
    """Its fast path, which would compute the attention from the parameters, never by-passes the module."""
    plain = make_encoder(1, norm_first=norm_first).layers[0].train(mode == "train")
    swapped = copy.deepcopy(plain)
    assert swap_attention(swapped) == ["self_attn"]
    x = torch.randn(3, 6, DIM)
    call: dict[str, Any] = {}
    if "padding" in masks:
        call["src_key_padding_mask"] = right_padding(6, 2, 4)
    if "causal" in masks:
        call |= {"src_mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "is_causal": True}
    with torch.inference_mode(mode == "inference"):
        torch.testing.assert_close(swapped(x, **call), plain(x, **call))
    assert attended == [swapped.self_attn]


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_encoder(mode: str, padded: bool, attended: list) -> None:
    """In inference torch's encoder makes a padded batch a nested one, which drops padding throughout."""
    plain = make_encoder(2).train(mode == "train")
    swapped = copy.deepcopy(plain)
    assert swap_attention(swapped) == ["layers.0.self_attn", "layers.1.self_attn"]
    x = torch.randn(3, 6, DIM)
    mask = right_padding(6, 2, 4) if padded else None
    with torch.inference_mode(mode == "inference"):
        got, wanted = (model(x, src_key_padding_mask=mask) for model in (swapped, plain))
    torch.testing.assert_close(got, wanted)
    assert attended == [layer.self_attn for layer in swapped.layers]
    if padded and mode == "inference":
        assert (got[mask] == 0).all()


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_causal_encoder(mode: str, attended: list) -> None:
    """As sequential recommenders use it: causal, and padded on the left.

    The padded positions see nothing. Torch's fast path makes NaN of them, which its second layer spreads over
    every event: compared with what torch gives while training.
    """
    plain = make_encoder(2, norm_first=True)
    swapped = copy.deepcopy(plain).train(mode == "train")
    swap_attention(swapped)
    x, mask = torch.randn(3, 6, DIM), nn.Transformer.generate_square_subsequent_mask(6)
    padding = right_padding(6, 2, 4).flip(1)
    call = {"mask": mask, "src_key_padding_mask": torch.zeros(3, 6).masked_fill(padding, -torch.inf)}
    with torch.inference_mode(mode == "inference"):
        got = swapped(x, **call)
    torch.testing.assert_close(got[~padding], plain(x, **call)[~padding])
    assert got.isfinite().all()
    assert len(attended) == 2


def test_encoder_built_around_a_fused_layer(attended: list) -> None:
    """The fast path of the encoder asks the layer; torch says that it will not take it."""
    layer = make_encoder(1).layers[0]
    swap_attention(layer)
    with pytest.warns(UserWarning, match="enable_nested_tensor"):
        encoder = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(3, 6, DIM), right_padding(6, 2, 4)
    with torch.inference_mode():
        got = encoder(x, src_key_padding_mask=mask)
    assert len(attended) == 2
    plain = make_encoder(2)
    plain.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(got[~mask], plain.train()(x, src_key_padding_mask=mask)[~mask])


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_decoder_layer(mode: str, attended: list) -> None:
    plain = nn.TransformerDecoderLayer(DIM, HEADS, 48, dropout=0.0).train(mode == "train")
    swapped = copy.deepcopy(plain)
    assert swap_attention(swapped) == ["self_attn", "multihead_attn"]
    target, memory = torch.randn(5, 3, DIM), torch.randn(7, 3, DIM)
    call = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "tgt_is_causal": True,
        "memory_key_padding_mask": right_padding(7, 3, 1),
    }
    with torch.inference_mode(mode == "inference"):
        torch.testing.assert_close(swapped(target, memory, **call), plain(target, memory, **call))
    assert attended == [swapped.self_attn, swapped.multihead_attn]


def test_transformer_gradients(attended: list) -> None:
    """Every parameter of a whole `nn.Transformer` gets the gradient that it gets without the swap."""
    plain = nn.Transformer(DIM, HEADS, 1, 1, 48, dropout=0.0, batch_first=True).double()
    swapped = copy.deepcopy(plain)
    assert len(swap_attention(swapped)) == 3
    source, target = torch.randn(2, 5, DIM).double(), torch.randn(2, 4, DIM).double()
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    for model in (plain, swapped):
        model(
            source, target, tgt_mask=causal, src_key_padding_mask=right_padding(5, 3)
        ).sin().sum().backward()
    for (name, got), wanted in zip(swapped.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, msg=lambda m, n=name: f"{n}: {m}")
    assert len(attended) == 3
