"""The network against the reference, and the reference against the paper's formulas written as plain loops."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from export.icnet import EPS, CoSaliency, ICNet
from export.reference import ReferenceCoSaliency, ReferenceICNet
from tests.helpers import DATA, random_network

# In FP64 two formulations of one function differ by rounding alone, and no two pixels are near enough to swap.
EXACT = 1e-8


def group(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 12, 12, generator=generator, dtype=torch.float64)
    sisms = torch.rand(n, 1, 6, 6, generator=generator, dtype=torch.float64)
    resize = nn.Upsample((224, 224), mode="bilinear")
    return resize(images), resize(sisms)


def test_state_dict_has_the_names_and_shapes_of_the_released_checkpoint_in_its_order():
    released = json.loads((DATA / "icnet_vgg16_state_dict.json").read_text())
    ours = {name: list(tensor.shape) for name, tensor in ICNet().state_dict().items()}
    assert ours == released
    assert list(ours) == list(released)  # an optimiser's state refers to parameters by position


@pytest.mark.parametrize("width", [1 / 32, 0.25, 2.0])
def test_width_scales_every_channel_count(width):
    full, scaled = ICNet().state_dict(), ICNet(width).state_dict()
    fixed = {1, 3, 49, 196, 784}  # map, RGB and pixel axes, kernels
    for name, tensor in full.items():
        expected = [d if d in fixed else int(d * width) for d in tensor.shape]
        assert list(scaled[name].shape) == expected, name


@pytest.mark.parametrize("width", [0, -1, 0.3, 1 / 64])
def test_a_width_without_whole_channel_counts_is_refused(width):
    with pytest.raises(ValueError, match="multiple of 1/32"):
        ICNet(width)


def sub_module_in_loops(features, sisms, weight, bias):
    """§3.2 to 3.4 with the 1×1 convolution, for features [N, C, H, W] and resized SISMs [N, H, W]."""
    n, c, height, width = features.shape
    pixels = [(y, x) for y in range(height) for x in range(width)]
    f = np.empty_like(features)
    for i in range(n):
        for y, x in pixels:
            f[i, :, y, x] = features[i, :, y, x] / max(np.linalg.norm(features[i, :, y, x]), EPS)
    sivs = np.empty((n, c))
    for i in range(n):
        v = sum(f[i, :, y, x] * sisms[i, y, x] for y, x in pixels) / len(pixels)
        sivs[i] = v / max(np.linalg.norm(v), EPS)
    out = np.empty((n, len(weight), height, width))
    for i in range(n):
        maps = np.array([[sivs[m] @ f[i, :, y, x] for y, x in pixels] for m in range(n)])
        maps = np.array([row / max(np.linalg.norm(row), EPS) for row in maps])
        scores = np.array([sum(maps[m] @ maps[k] for k in range(n)) for m in range(n)])
        weights = np.exp(scores) / np.exp(scores).sum()
        csa = sum(weights[m] * maps[m] for m in range(n))
        csa = (csa - csa.min()) / (csa.max() - csa.min() + 1e-12)
        order = sorted(range(len(pixels)), key=lambda p: -csa[p])
        for p, (y, x) in enumerate(pixels):
            rscf = [f[i, :, pixels[q][0], pixels[q][1]] @ f[i, :, y, x] * csa[p] for q in order]
            out[i, :, y, x] = weight @ np.array(rscf) + bias
    return out


@pytest.mark.parametrize("module", [CoSaliency, ReferenceCoSaliency])
@pytest.mark.parametrize(("n", "channels", "out"), [(1, 6, 4), (3, 6, 4), (4, 40, 48)])
def test_the_sub_module_is_the_papers_formulas(module, n, channels, out):
    size = 5
    torch.manual_seed(n)
    module = module(channels, out, size).double().eval()
    sub_module = module.cosal_feat
    sub_module.conv[1] = nn.Identity()  # the residual block is a plain torch one
    module.conv = nn.Identity()
    assert sub_module.weights_first == (out < 20)  # both associations are covered
    features = torch.randn(n, channels, size, size, dtype=torch.float64)
    sisms = torch.rand(n, 1, size, size, dtype=torch.float64)
    weight, bias = sub_module.conv[0].weight.detach().numpy()[:, :, 0, 0], sub_module.conv[0].bias.detach().numpy()
    with torch.no_grad():
        found = module(features, sisms).numpy()
    s = sisms[:, 0].numpy()
    expected = [sub_module_in_loops(features.numpy(), s, weight, bias) for s in (s, 1 - s)]
    np.testing.assert_allclose(found, np.concatenate(expected, 1), atol=EXACT)


@pytest.mark.parametrize(("width", "n"), [(0.25, 1), (0.25, 4), (1.0, 2)])
def test_the_network_is_the_reference(width, n):
    network = random_network(width).double()
    images, sisms = group(n)
    with torch.no_grad():
        torch.testing.assert_close(
            network(images, sisms), ReferenceICNet.of(network).double()(images, sisms), atol=EXACT, rtol=0
        )


def test_training_gives_the_references_four_maps_gradients_and_batch_statistics():
    network = random_network(0.125).double().train()
    reference = ReferenceICNet.of(network).double().train()
    images, sisms = group(3)
    for model in (network, reference):
        maps = model(images, sisms)
        assert [tuple(m.shape) for m in maps] == [(3, 1, side, side) for side in (28, 56, 112, 224)]
        sum((m**2).sum() for m in maps).backward()
    for map_ours, map_reference in zip(network(images, sisms), reference(images, sisms), strict=True):
        torch.testing.assert_close(map_ours, map_reference, atol=EXACT, rtol=0)
    for (name, ours), theirs in zip(network.named_parameters(), reference.parameters(), strict=True):
        scale = theirs.grad.abs().max().item() + 1  # biases before a batch norm have a gradient of zero
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9 * scale, rtol=0, msg=name)
    for (name, ours), theirs in zip(network.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=EXACT, msg=name)


def test_permuting_a_group_permutes_its_maps():
    network = random_network().double()
    images, sisms = group(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        torch.testing.assert_close(
            network(images[order], sisms[order]), network(images, sisms)[order], atol=EXACT, rtol=0
        )


def test_images_of_a_group_talk_to_each_other():
    network = random_network().double()
    images, sisms = group(3)
    others, _ = group(3, seed=1)
    with torch.no_grad():
        together = network(images, sisms)
        changed = network(torch.cat([images[:1], others[1:]]), sisms)
    assert (together[0] - changed[0]).abs().max() > 1e-4


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("image", [0.0, 1.0, "noise"])
@pytest.mark.parametrize("sism", [0.0, 1.0, "noise"])
def test_degenerate_inputs_give_finite_maps(n, image, sism):
    network = random_network()
    images, sisms = (t.float() for t in group(n))
    images = images if image == "noise" else torch.full_like(images, image)
    sisms = sisms if sism == "noise" else torch.full_like(sisms, sism)
    with torch.no_grad():
        maps = network(images, sisms)
    assert maps.isfinite().all()
    assert maps.min() >= 0
    assert maps.max() <= 1


@pytest.fixture(scope="module")
def exact():
    """A narrow network in FP64, and images for groups of it."""
    return random_network(1 / 32).double(), *group(8)


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_packed_in_any_order_is_one_by_one(exact, data):
    network, images, sisms = exact
    labels = data.draw(st.lists(st.sampled_from([-7, 0, 1, 2**31 - 1]), min_size=1, max_size=8), "groups")
    order = data.draw(st.permutations(range(len(labels))), "order")
    groups, images, sisms = torch.tensor(labels, dtype=torch.int32), images[order], sisms[order]
    with torch.no_grad():
        packed = network(images, sisms, member_mask=groups[:, None] == groups)
        for label in set(labels):
            mine = groups == label
            torch.testing.assert_close(packed[mine], network(images[mine], sisms[mine]), atol=EXACT, rtol=0)


@settings(max_examples=5, deadline=None)
@given(n=st.integers(1, 8), chunk=st.integers(1, 8), data=st.data())
def test_chunks_with_the_sivs_of_all_are_the_whole(exact, n, chunk, data):
    network, images, sisms = exact
    order = data.draw(st.permutations(range(n)), "order of the bank")
    chunks = list(zip(images[:n].split(chunk), sisms[:n].split(chunk), strict=True))
    with torch.no_grad():
        bank = torch.cat([network.sivs(*c) for c in chunks])
        found = torch.cat([network(*c, bank=bank[order]) for c in chunks])
        torch.testing.assert_close(found, network(images[:n], sisms[:n]), atol=EXACT, rtol=0)
    assert bank.shape == (n, 1280 / 32)


def test_the_sivs_are_unit_vectors_of_each_image_alone(exact):
    network, images, sisms = exact
    with torch.no_grad():
        bank = network.sivs(images[:3], sisms[:3])
        for level in bank.split([4, 4, 8, 8, 8, 8], 1):  # 128, 256 and 256 channels, twice
            torch.testing.assert_close(level.norm(dim=1), torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(network.sivs(images[1:2], sisms[1:2]), bank[1:2], atol=EXACT, rtol=0)
        other = network.sivs(images[:3], 1 - sisms[:3])  # foreground and background change places
    torch.testing.assert_close(other[:, :4], bank[:, 4:8])


def test_nothing_of_another_group_gets_through(exact):
    """Not even a NaN of it."""
    network, images, sisms = exact
    own = torch.tensor([0, 1, 0, 1, 1])[:, None] == torch.tensor([0, 1, 0, 1, 1])
    corrupted = images[:5].clone()
    corrupted[1], corrupted[3] = torch.randn(3, 224, 224, dtype=torch.float64), float("nan")
    with torch.no_grad():
        expected = network(images[:5], sisms[:5], member_mask=own)
        found = network(corrupted, sisms[:5], member_mask=own)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], atol=0, rtol=0)
    assert not torch.equal(found[4], expected[4])
