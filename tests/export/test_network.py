"""The network against the reference; both against the paper's formulas as plain loops and against numbers by hand."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from export import icnet, reference
from export.icnet import EPS, CoSaliency, ICNet, Uint8Interface
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


# By hand. The network and its reference are compared below; what both have wrong shows only here.


def numbers(*shape):
    """A tensor of this shape from a flat list: numbers(1, 1, 2, 2)([0, 3, 6, 9])."""
    return lambda values: torch.tensor(values, dtype=torch.float64).view(*shape)


@pytest.mark.parametrize("resize", [icnet.resize, reference.resize])
def test_resizing_puts_corner_on_corner(resize):
    ramp = numbers(1, 1, 2, 2)([0, 3, 6, 9])
    # Four pixels lie at 0, 1/3, 2/3 and 1 of the way from one corner to the next: one step is 3/3 across, 6/3 down.
    expected = numbers(1, 1, 4, 4)([0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9])
    torch.testing.assert_close(resize(ramp, 4), expected)
    # Three to two: the corners stay, the middle is gone.
    nine = numbers(1, 1, 3, 3)([1, 50, 2, 50, 50, 50, 3, 50, 4])
    torch.testing.assert_close(resize(nine, 2), numbers(1, 1, 2, 2)([1, 2, 3, 4]))
    # Per image and channel; a tensor of the size asked for stays as it is.
    two = torch.cat([ramp, -ramp], 1)
    torch.testing.assert_close(resize(two, 4), torch.cat([expected, -expected], 1))
    assert torch.equal(resize(two, 2), two)


@pytest.mark.parametrize("module", [CoSaliency, ReferenceCoSaliency])
def test_co_saliency_of_four_pixels_by_hand(module):
    """Two channels, images of 2×2 pixels; the first image is computed, two others are its company."""
    module = module(2, 1, 2).double().eval()
    module.conv = nn.Identity()
    module.cosal_feat.conv[1] = nn.Identity()
    module.cosal_feat.conv[0].weight.data = numbers(1, 4, 1, 1)([1, 10, 100, 1000])
    module.cosal_feat.conv[0].bias.data = numbers(1)([0.5])
    # Vectors of length 2, 5, 10 and 15 at the pixels; f: (1, 0), (0, 1), (0.6, 0.8), (0.8, 0.6).
    image = numbers(2, 2, 2)([2, 0, 6, 12, 0, 5, 8, 9])
    # The others point to (0, 1) everywhere, whatever their SISMs say.
    other = numbers(2, 2, 2)([0, 0, 0, 0, 3, 4, 5, 6])
    features = torch.stack([image, other, other])
    sism = numbers(1, 2, 2)([0.6, 0.8, 0, 0])
    grey = torch.full((1, 2, 2), 0.5, dtype=torch.float64)
    sisms = torch.stack([sism, grey, grey])
    # NMAP: 0.6·(1, 0) + 0.8·(0, 1) = (0.6, 0.8), whose length is 1. The SIVs: (0.6, 0.8), (0, 1), (0, 1).
    # CFM: the first SIV's map on the first image is (0.6, 0.8, 1, 0.96), of length √2.9216 = 1.709269:
    #   (0.351027, 0.468036, 0.585046, 0.561644); the others' (0, 1, 0.8, 0.6), of length √2 = 1.414214:
    #   (0, 0.707107, 0.565685, 0.424264).
    # They agree by 0.468036·0.707107 + 0.585046·0.565685 + 0.561644·0.424264 = 0.900190.
    # Scores: 1 + 2·0.900190 = 2.800380 for the first, 0.900190 + 2 = 2.900190 for each other.
    # Softmax: e^-0.099810 = 0.905009; 0.905009 / 2.905009 = 0.311534 and twice 1 / 2.905009 = 0.344233.
    # CSA: 0.311534·(first map) + 0.688466·(the others'): (0.109357, 0.632628, 0.571717, 0.467062).
    # From 0.109357 to 0.632628 is 0.523271: (0, 1, 0.883595, 0.683594).
    # RSCF: the pixels by CSA are 1, 2, 3, 0. The rows of the self-correlation in that order:
    #   (0, 1, 0.8, 0.6), (0.6, 0.8, 1, 0.96), (0.8, 0.6, 0.96, 1), (1, 0, 0.6, 0.8).
    # With weights 1, 10, 100 and 1000: (1086, 69, 706.8, 910.2); times CSA: (0, 69, 624.525, 622.207); plus 0.5.
    expected = numbers(1, 2, 2)([0.5, 69.5, 625.025, 622.707])
    with torch.no_grad():
        found = module(features, sisms)
        turned = module(features, 1 - sisms)
        dim = module(features * 1e-9, sisms)
    assert found.shape == (3, 2, 2, 2)  # foreground, background
    torch.testing.assert_close(found[0, :1], expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(turned[0, 1:], expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(dim, found)  # the length of the features is none of its business
    # On the others every pixel is alike: CSA is 0 everywhere, and what is left is the bias.
    torch.testing.assert_close(found[1:], torch.full_like(found[1:], 0.5))


def test_normalisation_ends_at_epsilon():
    rows = numbers(3, 2)([3e-6, 4e-6, 3e-14, 4e-14, 0, 0])  # of length 5e-6, 5e-14, 0
    torch.testing.assert_close(icnet.l2_normalise(rows, 1), numbers(3, 2)([0.6, 0.8, 0.03, 0.04, 0, 0]))
    rows = numbers(4, 3)([2, 3, 6, 2e-6, 3e-6, 6e-6, 2e-13, 3e-13, 6e-13, 7, 7, 7])
    expected = numbers(4, 3)([0, 0.25, 1, 0, 0.25, 1, 0, 0.1, 0.4, 0, 0, 0])
    torch.testing.assert_close(icnet.min_max(rows), expected)


def test_of_a_group_of_one_the_attention_is_its_own_correlation():
    fusion = icnet.CorrelationFusion(2, 1, 2).double()
    f = numbers(1, 2, 4)([1, 0, 0.6, 0, 0, 1, 0.8, 0])  # the last pixel has no direction
    sisms = numbers(1, 1, 2, 2)([1, 0, 0, 1])
    sivs = fusion.sivs(f, sisms)
    # Foreground (1, 0); background (0, 1) + (0.6, 0.8) = (0.6, 1.8), of length 1.897367.
    torch.testing.assert_close(sivs, numbers(1, 2, 2)([1, 0, 0.316228, 0.948683]), atol=1e-6, rtol=0)
    # The least agreement is 0, at the last pixel; the highest becomes 1. 0.316228 / 0.948683 = 1/3 and
    # 0.316228·0.6 + 0.948683·0.8 = 0.948683, as much as the second pixel's.
    expected = numbers(1, 2, 4)([1, 0, 0.6, 0, 1 / 3, 1, 1, 0])
    torch.testing.assert_close(fusion.attention(f, sivs), expected)


@pytest.mark.parametrize("block", [icnet.Residual, reference.ReferenceResidual])
def test_a_residual_block_by_hand(block):
    block = block(1)
    block.conv = nn.Identity()
    assert block(torch.tensor([-3.0, 0, 2])).tolist() == [0, 0, 4]


@pytest.mark.parametrize("block", [icnet.Decoder, reference.ReferenceDecoder])
def test_a_decoder_block_joins_map_sism_and_the_block_before_in_this_order(block):
    block = block(1, 1).double()
    block.merge_conv = nn.Identity()
    block.cmprs.weight.data.fill_(3)
    block.cmprs.bias.data.fill_(1)
    low = numbers(1, 1, 3, 3)([1, 1, 1, 1, 2, 1, 1, 1, 1])  # 4 after the convolution, 7 in the middle
    map_4, sism = numbers(1, 1, 2, 2)([0.5, 0, 0.5, 0]), numbers(1, 1, 2, 2)([0.2, 0.2, 0.4, 0.4])
    found = block(low, map_4, sism, numbers(1, 1, 2, 2)([9, 9, 9, 11]))
    # The map fades from left to right, 0.5, 0.25, 0; the SISM grows downwards, 0.2, 0.3, 0.4.
    by_map = [2, 1, 0, 2, 1.75, 0, 2, 1, 0]
    by_sism = [0.8, 0.8, 0.8, 1.2, 2.1, 1.2, 1.6, 1.6, 1.6]
    before = [9, 9, 9, 9, 9.5, 10, 9, 10, 11]
    torch.testing.assert_close(found, numbers(1, 3, 3, 3)([*by_map, *by_sism, *before]))


@pytest.mark.parametrize("head", [icnet.Prediction, reference.Map])
def test_a_map_is_a_sigmoid(head):
    head = head(1)
    head.pred[0].weight.data.fill_(2)
    head.pred[0].bias.data.fill_(math.log(3))
    found = head(torch.tensor([0, -math.log(3), 50]).view(1, 1, 1, 3))
    torch.testing.assert_close(found.flatten(), torch.tensor([3 / 4, 1 / 4, 1]))  # e^log 3 = 3 to 1, then 1 to 3


@pytest.mark.parametrize("make", [lambda: ICNet(1 / 32), lambda: ReferenceICNet(1 / 32)], ids=["network", "reference"])
def test_the_backbones_taps_by_hand(make):
    """The five outputs: those of convolutions 2, 4, 7, 10 and 13, after their ReLU and before the pooling."""
    vgg = make().vgg
    convolutions = [m for m in vgg.modules() if isinstance(m, nn.Conv2d)]
    for number, conv in enumerate(convolutions, 1):
        conv.weight.data.zero_()
        conv.bias.data[0], conv.bias.data[1:] = number, -number
    with torch.no_grad():
        taps = vgg(torch.zeros(1, 3, 224, 224))
    for tap, number, side in zip(taps, (2, 4, 7, 10, 13), (224, 112, 56, 28, 14), strict=True):
        assert tap.shape[2:] == (side, side)
        assert (tap[:, 0] == number).all()
        assert (tap[:, 1:] == 0).all()

    # Now each convolution hands its first channel on, so that only the pooling changes anything: the brightest of four.
    for conv in convolutions:
        conv.bias.data.zero_()
        conv.weight.data[0, 0, 1, 1] = 1
    image = torch.ones(1, 3, 224, 224)
    image[0, 0, 223, 222] = 5
    with torch.no_grad():
        taps = vgg(image)
    for tap, column in zip(taps, (222, 111, 55, 27, 13), strict=True):
        assert tap[0, 0, -1, column] == 5
        assert tap[0, 0].sum() == tap[0, 0].numel() + 4  # 1 everywhere else


@pytest.mark.parametrize("make", [lambda: ICNet(1 / 32), lambda: ReferenceICNet(1 / 32)], ids=["network", "reference"])
def test_every_batch_norm_by_hand(make):
    norms = [m for m in make().modules() if isinstance(m, nn.BatchNorm2d)]
    # One in each residual block (two per co-saliency module, two between them), two in conv6 and in each decoder.
    assert len(norms) == 3 * 2 + 2 + 2 + 3 * 2
    for norm in norms:
        channels = norm.num_features
        norm.running_mean.fill_(1)
        norm.running_var.fill_(3e-5)
        norm.weight.data.fill_(2)
        norm.bias.data.fill_(3)
        x = torch.full((2, channels, 1, 1), 1.002, dtype=torch.float64)
        # (1.002 - 1) / √(3e-5 + 1e-5) = 0.316228; times 2, plus 3.
        torch.testing.assert_close(norm.double().eval()(x), torch.full_like(x, 3.632456), atol=1e-5, rtol=0)
        # In training a tenth is new: 0.9·1 + 0.1·4 is the mean; the variance of 3 and 5 is 2, unbiased.
        norm.train()(torch.tensor([3.0, 5.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, channels, 1, 1))
        torch.testing.assert_close(norm.running_mean, torch.full_like(norm.running_mean, 1.3))
        torch.testing.assert_close(norm.running_var, torch.full_like(norm.running_var, 0.200027))


def test_bytes_become_what_the_network_takes():
    images = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    images[0, 1, 2] = torch.tensor([255, 0, 51])
    sisms = torch.zeros(1, 224, 224, dtype=torch.uint8)
    sisms[0, 3, 4] = 51
    x, s = Uint8Interface(ICNet(1 / 32)).normalise(images, sisms)
    assert x.shape == (1, 3, 224, 224)
    # (1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225
    torch.testing.assert_close(x[0, :, 1, 2], torch.tensor([2.248908, -2.035714, -0.915556]), atol=1e-5, rtol=0)
    assert s.shape == (1, 1, 224, 224)
    assert s[0, 0, 3, 4] == pytest.approx(0.2)
    assert s.sum() == s[0, 0, 3, 4]


# By loops, and each against the other.


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
    if isinstance(module, CoSaliency):
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
