import numpy as np
import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from export.icnet import Uint8Interface
from export.onnx_file import Node, count, total_flop
from export.reference import ReferenceICNet
from export.to_onnx import write_onnx
from runtime import ModelError


@pytest.fixture(scope="module")
def reference_file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "reference.onnx"
    write_onnx(ReferenceICNet.of(network), path)
    return path


def flop_of(module, n):
    images = torch.zeros((n, 224, 224, 3), dtype=torch.uint8)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        Uint8Interface(module)(images, images[..., 0])
    return counter.get_total_flops()


@pytest.mark.parametrize("n", [1, 3])
def test_flop_are_those_of_torchs_counter(network, model_file, reference_file, n):
    assert total_flop(model_file, n) == flop_of(network, n)
    # The paper computes the self-correlation once per polarity; the exporter sees that it is twice the same.
    channels = (round(128 * network.width), round(256 * network.width), round(256 * network.width))
    twice = sum(2 * n * c * (side * side) ** 2 for c, side in zip(channels, (7, 14, 28), strict=True))
    assert total_flop(reference_file, n) == flop_of(ReferenceICNet.of(network), n) - twice


def test_flop_of_a_packed_export_are_those_of_a_plain_one(exports):
    """One group: the mask hides nothing. Its sort takes a shape that the graph computes."""
    assert total_flop(exports.with_name("icnet.packed.onnx"), 3) == total_flop(exports, 3)


def test_bytes_of_a_small_graph(tmp_path):
    """Conv [N,3,4,4] → [N,2,4,4], ReLU, reshape: counted by hand."""
    helper = onnx.helper
    weight = onnx.numpy_helper.from_array(np.zeros((2, 3, 3, 3), np.float32), "w")
    shape = onnx.numpy_helper.from_array(np.array([0, 32]), "s")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("Relu", ["y"], ["z"], name="relu"),
        helper.make_node("Reshape", ["z", "s"], ["out"], name="view"),
    ]
    tensors = [helper.make_tensor_value_info(k, 1, s) for k, s in (("x", ["N", 3, 4, 4]), ("out", ["N", 32]))]
    model = helper.make_model(helper.make_graph(nodes, "g", tensors[:1], tensors[1:], [weight, shape]))
    onnx.save(model, tmp_path / "x.onnx")
    conv, relu, view = count(tmp_path / "x.onnx", 5)
    assert conv == Node("conv", "Conv", "", 5 * 2 * (3 * 9) * 32, 0, 4 * (5 * 48 + 54 + 5 * 32))
    assert relu == Node("relu", "Relu", "", 0, 160, 4 * 2 * 160)
    assert view == Node("view", "Reshape", "", 0, 0, 0)
    assert relu.level == "rest"


def test_what_picks_reads_as_much_as_it_writes(tmp_path):
    """Gather of 2 of 1000 columns: not all of them are read."""
    helper = onnx.helper
    indices = onnx.numpy_helper.from_array(np.array([5, 900]), "i")
    node = helper.make_node("Gather", ["x", "i"], ["y"], axis=1)
    tensors = [helper.make_tensor_value_info(k, 1, s) for k, s in (("x", ["N", 1000]), ("y", ["N", 2]))]
    onnx.save(
        helper.make_model(helper.make_graph([node], "g", tensors[:1], tensors[1:], [indices])), tmp_path / "x.onnx"
    )
    (gather,) = count(tmp_path / "x.onnx", 3)
    assert (gather.flop, gather.other, gather.bytes) == (0, 0, 4 * (3 * 2) + 8 * 2 + 4 * (3 * 2))


@pytest.mark.parametrize(
    ("op", "attributes", "first", "flop", "other"),
    [
        ("Gemm", {}, [3, 5], 2 * 3 * 5 * 7, 0),
        ("Gemm", {"transA": 0}, [3, 5], 2 * 3 * 5 * 7, 0),
        ("Gemm", {"transA": 1}, [5, 3], 2 * 3 * 5 * 7, 0),
        (
            "ReduceSum",
            {"keepdims": 1},
            [3, 5],
            0,
            3 * 5,
        ),  # of what it reads, not of the one that it writes
    ],
)
def test_operations_of_one_node(tmp_path, op, attributes, first, flop, other):
    helper = onnx.helper
    inputs = [helper.make_tensor_value_info("a", 1, first), helper.make_tensor_value_info("b", 1, [5, 7])]
    inputs = inputs if op == "Gemm" else inputs[:1]
    node = helper.make_node(op, [value.name for value in inputs], ["y"], **attributes)
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", 1, None)])
    onnx.save(helper.make_model(graph), tmp_path / "x.onnx")
    (found,) = count(tmp_path / "x.onnx", 3)
    assert (found.flop, found.other) == (flop, other)


def test_what_can_not_be_counted(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_text("no model")
    with pytest.raises(ModelError, match="not an ONNX model"):
        count(path, 1)
    helper = onnx.helper
    node = helper.make_node("NonZero", ["x"], ["y"])
    tensors = [helper.make_tensor_value_info("x", 1, ["N", 3]), helper.make_tensor_value_info("y", 7, [2, "9**9**9"])]
    onnx.save(helper.make_model(helper.make_graph([node], "g", tensors[:1], tensors[1:])), path)
    with pytest.raises(ModelError, match=r"the shape of y \(NonZero\) does not follow from the group's size"):
        count(path, 1)
