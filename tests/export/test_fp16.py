"""Half precision: what runs in it and what does not, and that its range is enough."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from export.fp16 import half_precision, round_to_half
from export.icnet import Uint8Interface
from export.proof import check, compare
from export.samples import samples, smooth_group
from export.to_onnx import write_onnx
from runtime import ModelError, Predictor
from tests.helpers import random_network


@pytest.fixture(scope="module")
def half_file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("half") / "icnet.onnx"
    write_onnx(half_precision(network), path)
    return path


def element_types(path):
    """The type of every tensor in a file, by name; and its nodes."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return types | {i.name: i.data_type for i in graph.initializer}, list(graph.node)


def test_convolutions_are_fp16_and_the_islands_fp32(half_file):
    types, nodes = element_types(half_file)
    for node in nodes:
        tensors = {types[name] for name in (*node.input, *node.output) if name}
        if node.op_type in {"Conv", "MaxPool"}:
            assert tensors == {TensorProto.FLOAT16}, node.name
        if node.op_type in {"ReduceL2", "Clip", "Softmax", "ReduceMin", "ReduceMax", "ReduceSum", "TopK", "Div"}:
            assert tensors <= {TensorProto.FLOAT, TensorProto.INT64}, node.name
    assert {"Conv", "ReduceL2", "Clip", "Softmax", "ReduceMin", "ReduceMax", "TopK"} <= {n.op_type for n in nodes}
    products = [types[n.output[0]] for n in nodes if n.op_type == "MatMul"]
    # Per level: RSCF's two products in FP16; what the sort key comes from in FP32.
    assert products.count(TensorProto.FLOAT16) == 3 * 2
    assert products.count(TensorProto.FLOAT) == 3 * 4


def test_its_weights_take_half_the_bytes(half_file, model_file):
    def weights(path):
        return sum(i.ByteSize() for i in onnx.load(path).graph.initializer)

    assert weights(half_file) < 0.52 * weights(model_file)


def scaled_activations(network, factor):
    """The same function with the activations of VGG16 and the compressed features `factor` times as large."""
    scaled = copy.deepcopy(network)
    for i, conv in enumerate(m for m in scaled.vgg.vgg if isinstance(m, torch.nn.Conv2d)):
        conv.weight.data *= factor if i == 0 else 1
        conv.bias.data *= factor
    for conv in (scaled.conv4_cmprs, scaled.conv5_cmprs):
        conv.bias.data *= factor
    scaled.conv6_cmprs[1].weight.data /= factor  # batch norms follow it
    for decoder in (scaled.refine_1, scaled.refine_2, scaled.refine_3):
        decoder.cmprs.weight.data /= factor
    return scaled


@pytest.mark.parametrize("factor", [1e-4, 1, 1000, 1e6])
def test_any_scale_of_activations_is_computed_right(network, tmp_path, factor):
    scaled = scaled_activations(network, factor)
    path = tmp_path / "scaled.onnx"
    write_onnx(half_precision(scaled), path)
    check(path, compare(path, scaled, precision="fp16", groups=samples(sizes=(1, 3))), "fp16")


def test_a_plain_conversion_overflows_where_ours_does_not(network, tmp_path):
    """Activations in the hundreds, like a trained VGG16's, times 1000."""
    scaled = scaled_activations(network, 30 * 1000)
    largest = max(t.abs().max() for t in scaled.vgg(torch.rand(1, 3, 224, 224) * 4 - 2))
    assert 1e5 < largest < 1e6
    path = tmp_path / "plain.onnx"
    write_onnx(copy.deepcopy(scaled).half(), path)
    differences = compare(path, scaled, precision="fp16", groups=[smooth_group(3, seed=0)])
    assert differences[-1].max == np.inf
    with pytest.raises(ModelError):
        check(path, differences, "fp16")
    write_onnx(half_precision(scaled), path)
    check(path, compare(path, scaled, precision="fp16", groups=[smooth_group(3, seed=0)]), "fp16")


def test_without_the_islands_even_small_activations_fail(network, monkeypatch):
    """A conversion of everything to FP16: ε is zero and 0/0 is NaN."""
    monkeypatch.setattr("export.icnet.at_least_fp32", lambda x: x)
    half = half_precision(network)
    group = next(s for s in samples(sizes=()) if s.name == "SISMs all 1")
    with torch.inference_mode():
        tensors = Uint8Interface(half).normalise(torch.from_numpy(group.images), torch.from_numpy(group.sisms))
        maps = half(*(tensor.half() for tensor in tensors))
    assert maps.isnan().any()


def test_the_original_is_left_alone(network):
    before = copy.deepcopy(network.state_dict())
    half_precision(network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_backbone_with_a_dead_layer(tmp_path):
    network = random_network(1 / 32)
    network.vgg.vgg[14].weight.data.zero_()
    network.vgg.vgg[14].bias.data.zero_()
    path = tmp_path / "dead.onnx"
    write_onnx(half_precision(network), path)
    check(path, compare(path, network, precision="fp16", groups=samples(sizes=(2,))), "fp16")


def test_rounding_is_that_of_fp16_within_its_range():
    x = torch.randn(10_000) * 100
    assert torch.equal(round_to_half(x), x.half().float())
    assert round_to_half(torch.tensor([1e30, 1e-30])).log10().round().tolist() == [30, -30]


def test_the_predictor_runs_it(half_file, predictor):
    group = smooth_group(3, seed=2)
    with Predictor(half_file) as half:
        maps = half.predict_tensors(group.images, group.sisms)
    assert maps.dtype == np.float32
    assert abs(maps - predictor.predict_tensors(group.images, group.sisms)).mean() < 2e-2
