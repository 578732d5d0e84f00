"""Noise floors: the rounding of TF32. Those of the other precisions are tested where files are compared with them."""

import numpy as np
import pytest
import torch

from export.noise import reference, round_to_tf32, variant
from export.samples import samples
from tests.helpers import random_network


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1 + 2**-10, 1 + 2**-10),
        (1 + 2**-11, 1 + 2**-10),  # a half goes away from 0
        (-1 - 2**-11, -1 - 2**-10),
        (1 + 2**-11 - 2**-20, 1),
        (2 - 2**-12, 2),  # into the next exponent
        (3e38, 3e38),  # FP32's range
        (0.0, 0.0),
        (float("inf"), float("inf")),
    ],
)
def test_rounding_to_tf32(value, rounded):
    found = round_to_tf32(torch.tensor([value])).item()
    assert found == pytest.approx(rounded, rel=2**-11 if rounded == 3e38 else 0)
    assert np.float32(found).view(np.int32) % 2**13 == 0


def test_nan_stays_nan():
    assert round_to_tf32(torch.tensor([float("nan"), 1.0])).isnan().tolist() == [True, False]
    every_bit = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # where rounding up overflows
    assert round_to_tf32(every_bit).isnan().all()


def test_tf32_rounds_the_factors_of_every_product_and_nothing_else():
    """The floor, computed by hand on the reference's first convolution and on a product of its own."""
    network = random_network(1 / 32)
    plain, rounding = reference(network), variant(network, "tf32")
    seen = {}

    def keep(name):
        return lambda _module, inputs, output: seen.update({name: (inputs[0], output)})

    plain.network.vgg.vgg[0].register_forward_hook(keep("plain"))
    rounding.network.vgg.vgg[0].register_forward_hook(keep("rounded"))
    (group, *_) = samples(sizes=(2,))
    images, sisms = torch.from_numpy(group.images), torch.from_numpy(group.sisms)
    with torch.inference_mode():
        difference = (plain(images, sisms) - rounding(images, sisms)).abs()
    conv = plain.network.vgg.vgg[0]
    torch.testing.assert_close(seen["rounded"][0], seen["plain"][0], rtol=0, atol=0)  # what goes in is not rounded
    by_hand = torch.conv2d(
        round_to_tf32(seen["plain"][0]), round_to_tf32(conv.weight), conv.bias, padding=1
    )  # the bias is not
    torch.testing.assert_close(seen["rounded"][1], by_hand, rtol=0, atol=0)
    assert 1e-7 < difference.mean() < 1e-2
