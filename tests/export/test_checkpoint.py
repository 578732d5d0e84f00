import pickle

import numpy as np
import pytest
import torch

from export.checkpoint import (
    load_backbone,
    load_checkpoint,
    read_card,
    read_checkpoint,
    save_checkpoint,
    weights_digest,
)
from export.icnet import ICNet
from runtime import CheckpointError, OutputError
from runtime.contract import CARD, WEIGHTS
from tests.helpers import flipped, random_network


@pytest.fixture
def state():
    return random_network(1 / 32).state_dict()


def save(path, content):
    torch.save(content, path)
    return path


def assert_same(model, state):
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("width", [1.0, 0.25, 3 / 32])
def test_round_trip_finds_the_width(tmp_path, width):
    model = random_network(width)
    save_checkpoint(tmp_path / "x.pth", model)
    loaded = load_checkpoint(tmp_path / "x.pth")
    assert loaded.width == width
    assert not loaded.training
    assert_same(loaded, model.state_dict())


def test_written_in_the_authors_layout_with_the_optimiser(tmp_path):
    model = ICNet(1 / 32)
    optimizer = torch.optim.Adam(model.parameters())
    sum(m.sum() for m in model.train()(torch.rand(2, 3, 224, 224), torch.rand(2, 1, 224, 224))).backward()
    optimizer.step()
    save_checkpoint(tmp_path / "x.pth", model, optimizer)
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    assert set(content) == {"state_dict", WEIGHTS, "optimizer"}
    assert len(content["state_dict"]) == 190
    torch.optim.Adam(model.parameters()).load_state_dict(content["optimizer"])
    assert_same(load_checkpoint(tmp_path / "x.pth"), model.state_dict())


def test_a_bare_state_dict_and_half_precision_are_taken(tmp_path, state):
    assert_same(load_checkpoint(save(tmp_path / "x.pth", state)), state)
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    loaded = load_checkpoint(save(tmp_path / "half.pth", {"state_dict": half}))
    assert all(p.dtype == torch.float32 for p in loaded.parameters())


def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "Co6.conv.0.bias"), r"missing 1 tensor: Co6\.conv\.0\.bias"),
        (lambda s: s | {"extra.weight": torch.ones(1)}, r"unexpected 1 tensor: extra\.weight"),
        (
            lambda s: s | {"conv5_cmprs.bias": torch.ones(9)},
            r"misshapen 1 tensor: conv5_cmprs\.bias \[9\] \(expected \[8\]\)",
        ),
        (lambda s: s | {"conv5_cmprs.bias": torch.full((8,), torch.nan)}, r"NaN .* conv5_cmprs\.bias"),
        (lambda s: s | {"conv5_cmprs.bias": 3}, r"'conv5_cmprs.bias' .* is int, not a tensor"),
        (
            lambda s: {f"module.{k}": v for k, v in s.items()},
            r"no 4-D tensor vgg\.vgg\.0\.weight .*190 tensors: module\.vgg",
        ),
        (lambda s: s | {"vgg.vgg.0.weight": torch.ones(3, 3, 3, 3)}, r"vgg\.vgg\.0\.weight has 3 output channels"),
        (
            lambda s: s | {"conv5_cmprs.bias": torch.ones(8, dtype=torch.int8)},
            r"another type .*conv5_cmprs\.bias torch\.int8",
        ),
        (lambda s: s | {"conv5_cmprs.bias": torch.ones(8, dtype=torch.complex64)}, r"another type .*complex64"),
        (
            lambda s: s | {"conv5_cmprs.bias": torch.full((8,), 1e300, dtype=torch.float64)},
            r"infinite .*conv5_cmprs\.bias",
        ),
        (lambda s: s | {"conv5_cmprs.bias": torch.ones(8).to_sparse()}, r"'conv5_cmprs\.bias' is sparse"),
        (lambda s: s | {"vgg.vgg.0.weight": torch.zeros(1).expand(2**40, 3, 3, 3)}, "up to 16"),
        (lambda s: s | {"vgg.vgg.0.weight": torch.zeros(1).expand(1024, 3, 3, 3)}, "misshapen"),
        (lambda s: {}, "it is empty"),
    ],
)
def test_checkpoints_that_do_not_fit_name_the_tensors(tmp_path, state, change, message):
    path = save(tmp_path / "bad.pth", {"state_dict": change(state)})
    with pytest.raises(CheckpointError, match=rf"bad\.pth: .*{message}"):
        load_checkpoint(path)


class Custom:
    """Something that only pickled code can bring back."""

    def __reduce__(self):
        return (print, ("code ran",))


def test_a_checkpoint_that_needs_pickled_code_is_refused(tmp_path, state, capsys):
    path = save(tmp_path / "evil.pth", {"state_dict": state, "extra": Custom()})
    with pytest.raises(CheckpointError, match=r"evil\.pth: needs pickled code"):
        load_checkpoint(path)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 a broken zip", pickle.dumps([1, 2])])
def test_files_that_are_no_checkpoints(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pth: not a"):
        load_checkpoint(tmp_path / "x.pth")


def test_truncated_missing_and_foreign_checkpoints(tmp_path, state):
    whole = save(tmp_path / "whole.pth", {"state_dict": state}).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.pth: not a PyTorch checkpoint, or a damaged one"):
        load_checkpoint(tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"key 'state_dict' \(its keys: model"):
        load_checkpoint(save(tmp_path / "other.pth", {"model": state}))


def test_saving_where_nothing_can_be_written(tmp_path, network):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a folder"):
        save_checkpoint(tmp_path / "file" / "x.pth", network)


def backbone(prefix=""):
    return {f"{prefix}{k}": torch.randn_like(v) for k, v in ICNet().vgg.vgg.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "features."])
def test_backbone_of_the_authors_and_of_torchvision(tmp_path, prefix):
    state = backbone(prefix)
    if prefix:
        state |= {"classifier.0.weight": torch.ones(4, 4), "classifier.0.bias": torch.ones(4)}
    model = ICNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    load_backbone(model, save(tmp_path / "vgg.pth", state))
    for name, tensor in model.state_dict().items():
        expected = state[prefix + name.removeprefix("vgg.vgg.")] if name.startswith("vgg.") else before[name]
        assert torch.equal(tensor, expected), name


def test_backbones_that_do_not_fit(tmp_path):
    path = save(tmp_path / "vgg.pth", without(backbone(), "28.bias"))
    with pytest.raises(CheckpointError, match=r"missing 1 tensor: 28\.bias"):
        load_backbone(ICNet(), path)
    with pytest.raises(CheckpointError, match=r"misshapen 26 tensors: 0\.weight"):
        load_backbone(ICNet(0.25), save(tmp_path / "whole.pth", backbone()))


def test_flipped_bits_are_noticed_or_change_nothing(tmp_path):
    """Some bits of a zip archive belong to no tensor."""
    path, network = tmp_path / "x.pth", random_network(1 / 32)
    save_checkpoint(path, network)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    messages = []
    for position, bit in zip(rng.integers(0, len(whole), 150), rng.integers(0, 8, 150), strict=True):
        path.write_bytes(flipped(whole, position, bit))
        try:
            assert_same(load_checkpoint(path), network.state_dict())
        except CheckpointError as error:
            messages.append(str(error))
    assert sum("x.pth: damaged, or edited" in message for message in messages) > 10


def test_edited_tensors_need_a_new_digest(tmp_path):
    path = tmp_path / "x.pth"
    save_checkpoint(path, random_network(1 / 32))
    content = torch.load(path, weights_only=True)
    content["state_dict"]["vgg.vgg.0.bias"][0] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"x\.pth: damaged, or edited: .* Remove {WEIGHTS} from its dict"):
        load_checkpoint(path)
    del content[WEIGHTS]
    torch.save(content, path)
    save_checkpoint(path, load_checkpoint(path))
    assert_same(load_checkpoint(path), content["state_dict"])


def test_the_digest_is_that_of_the_weights_in_fp32_however_they_are_stored(tmp_path):
    network = random_network(1 / 32)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.half()
    save_checkpoint(tmp_path / "x.pth", network)
    assert read_checkpoint(tmp_path / "x.pth")[WEIGHTS] == weights_digest(load_checkpoint(tmp_path / "x.pth"))


def test_what_a_checkpoint_is_for(tmp_path):
    path, network = tmp_path / "x.pth", random_network(1 / 32)
    for card in ("drawings, a demo", None):
        save_checkpoint(path, network, card=card)
        assert read_card(path) == card
    save_checkpoint(path, network, card="two\nlines \x1b[1m" + "long" * 999)  # anybody may have written it
    found = read_card(path)
    assert found is not None
    assert len(found) == 200
    assert found.isprintable()
    torch.save(read_checkpoint(path) | {CARD: 5}, path)
    assert read_card(path) is None
