"""The cache of exports that the other tests use: it may miss, but never give the wrong file."""

import os

import onnx
import pytest
import torch
from torch import nn

from export.icnet import Uint8Interface
from export.reference import ReferenceICNet
from tests.export_cache import ExportCache, Kept
from tests.helpers import random_network

IMAGES = torch.zeros(3, 224, 224, 3, dtype=torch.uint8)
EXAMPLE = (IMAGES, IMAGES[..., 0])
OPTIONS = {"input_names": ["images", "sisms"], "dynamic_shapes": ({0: torch.export.Dim("N", min=1)},), "opset": 18}


@pytest.fixture
def traced():
    return []


@pytest.fixture
def cache(traced, tmp_path):
    def trace(module, args, **options):
        traced.append(module)
        return Kept(onnx.helper.make_model(onnx.helper.make_graph([], f"number {len(traced)}", [], [])))

    return ExportCache(trace, tmp_path, max_bytes=10_000)


@pytest.fixture
def module():
    return Uint8Interface(random_network(1 / 32)).eval()


def test_the_same_export_is_traced_once(cache, module, traced, tmp_path):
    first = cache(module, EXAMPLE, **OPTIONS)
    again = cache(Uint8Interface(random_network(1 / 32)).eval(), EXAMPLE, **OPTIONS)
    other_process = ExportCache(cache.trace, tmp_path)(module, EXAMPLE, **OPTIONS)
    assert first == again == other_process
    assert len(traced) == 1


def change_a_weight(module):
    module.network.refine_1.cmprs.weight.data[0, 0, 0, 0] += 1e-6


def change_a_statistic(module):
    module.network.Co4.cosal_feat.conv[1].conv[1].running_var[0] *= 1.1


def change_an_eps(module):
    module.network.merge_co_56.conv[1].eps = 1e-3


def change_an_association(module):
    module.network.Co4.cosal_feat.weights_first ^= True


def drop_a_layer(module):
    module.network.merge_co_56.conv[2] = nn.Identity()


def train(module):
    module.network.Co4.train()


def halve(module):
    module.half()


@pytest.mark.parametrize(
    "change",
    [change_a_weight, change_a_statistic, change_an_eps, change_an_association, drop_a_layer, train, halve],
)
def test_another_network_is_another_export(cache, module, change):
    before = cache(module, EXAMPLE, **OPTIONS)
    change(module)
    after = cache(module, EXAMPLE, **OPTIONS)
    assert before != after
    assert cache(module, EXAMPLE, **OPTIONS) == after


def test_other_arguments_are_another_export(cache, module, traced):
    cache(module, EXAMPLE, **OPTIONS)
    cache(module, (IMAGES[:2], IMAGES[:2, ..., 0]), **OPTIONS)
    cache(module, (IMAGES.float(), IMAGES[..., 0]), **OPTIONS)
    cache(module, EXAMPLE, **OPTIONS | {"opset": 19})
    cache(module, EXAMPLE, **OPTIONS | {"input_names": ["x", "y"]})
    cache(module, EXAMPLE, **OPTIONS | {"dynamic_shapes": ({0: torch.export.Dim("N", min=2)},)})
    cache(module.network, EXAMPLE, **OPTIONS)
    cache(Uint8Interface(ReferenceICNet.of(module.network)).eval(), EXAMPLE, **OPTIONS)
    assert len(traced) == 8


def a_function(module, patch):
    patch.setattr("export.icnet.at_least_fp32", lambda x: x)


def a_constant(module, patch):
    patch.setattr("export.icnet.EPS", 1e-3)


def a_method(module, patch):
    patch.setattr("export.icnet.Decoder.forward", lambda self, *tensors: tensors[0])


def one_objects_method(module, patch):
    patch.setattr(module.network.refine_1, "forward", lambda *tensors: tensors[0])


def a_hook(module, patch):
    module.network.refine_1.register_forward_hook(lambda *_: None)


class Own(nn.Module):
    def forward(self, x):
        return -x


def a_module_of_the_tests(module, patch):
    module.network.refine_1.pred = Own()


@pytest.mark.parametrize(
    "replaced", [a_function, a_constant, a_method, one_objects_method, a_hook, a_module_of_the_tests]
)
def test_what_the_digest_can_not_see_is_always_traced(cache, module, traced, replaced):
    kept = cache(module, EXAMPLE, **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        replaced(module, patch)
        assert cache(module, EXAMPLE, **OPTIONS) != cache(module, EXAMPLE, **OPTIONS)
        assert len(traced) == 3
    assert cache(Uint8Interface(random_network(1 / 32)).eval(), EXAMPLE, **OPTIONS) == kept
    assert len(traced) == 3


def test_what_was_not_used_for_longest_goes_first(cache, module, tmp_path):
    for age, name in [(30, "old"), (20, "used"), (10, "new")]:
        (tmp_path / f"{name}.onnx").write_bytes(bytes(4_900))
        os.utime(tmp_path / f"{name}.onnx", (1e9 - age, 1e9 - (0 if name == "used" else age)))
    cache(module, EXAMPLE, **OPTIONS)
    left = {path.stem for path in tmp_path.glob("*.onnx")}
    assert len(left) == 3
    assert {"used", "new"} < left
