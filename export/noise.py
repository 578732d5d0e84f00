"""Noise floors: how far two correct computations of the same maps differ, in each precision.

The order in which RSCF puts the pixels is discontinuous: two sums that differ in their last bit can swap two near-equal
pixels, and a swap can move a pixel of the output by 1e-2 or more. So no fixed tolerance is right. A noise floor is
measured instead: the difference between the reference, which is the network as the paper writes it in FP32, and a
variant of it that rounds as the precision does, on the same weights and inputs.

- **FP32**: the variant computes in FP64. Correct files were 0.7 to 2.7 floors away from the reference (see
  `export.proof`, which derives the bound).
- **FP16**: convolutions have their weights, inputs and outputs rounded to 11 bits. This leaves FP16's range out: a file
  whose activations overflow has no such excuse. A correct file rounds at more places, within the products of RSCF. Its
  mean was 0.7 to 2.0 floors (5 networks, two of them trained, by PyTorch and by ONNX Runtime). A file that computed the
  order of the pixels in FP16 was 29 floors away on a trained network; on random ones it did not show.
- **TF32**, which `icnet build --tf32` allows and tensor cores compute: the inputs of convolutions and matrix products,
  weights among them, are rounded to 10 bits behind the leading one, and summed in FP32.
- **INT8**: convolutions but `FLOAT_LAYERS` have their weights and inputs rounded to 8 bits. Calibrated files were 0.8
  to 1.4 floors away (three networks, one of them trained, minmax and entropy), networks of other weights 14 to 230.
- **BF16**, in which OpenVINO computes where it is allowed to: as FP16, with 8 bits.
- **Direct**, which is how OpenVINO computes FP32: as Winograd, below, with noise of `DIRECT`. OpenVINO's VGG features
  were relatively 2e-7 to 2.5e-6 away from ONNX Runtime's at widths 1/4 and 1; the noise moves them by 1e-6 to 4e-6.
- **INT8 on another engine**: the ONNX file without the rounding of its activations against the file to the letter. A
  file that OpenVINO rounds on a wrong grid was 3.2 floors away from the unrounded one, right ones 0.8 (the demo
  checkpoint).
- **Winograd**, which is how MNN computes FP32: the outputs of convolutions have random noise of `WINOGRAD`. Winograd's
  convolutions round more coarsely than direct ones, the more so the more channels there are: VGG16's features were
  relatively up to 1e-6 away from ONNX Runtime's at width 1/32, 4e-5 at width 1/4 and 1.4e-4 at width 1, where the noise
  moves them by 1e-4. MNN's files are compared with ONNX Runtime's output for the same file. There correct files were
  0.01 to 1.3 floors away (maximum and mean, all four kinds of exports, three networks). Files with an operator that MNN
  gets wrong were 9 or more away in the maximum and 18 or more in the mean.

PyTorch is imported when a variant is made: `icnet calibrate` and `icnet build` run without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from export.icnet import ICNet, Uint8Interface

# How many an exported file may be away.
ALLOWED_FLOORS = {"fp32": 4.0, "tf32": 4.0, "fp16": 3.0, "bf16": 3.0, "winograd": 4.0, "direct": 4.0, "int8": 2.0}
NEGLIGIBLE_MAX, NEGLIGIBLE_MEAN = 1e-2, 1e-4  # of maps in [0, 1]: no 8-bit map shows it
FLOAT_LAYERS = ("vgg.vgg.0", "get_pred_4.pred.0", "refine_1.pred.pred.0")  # convolutions that INT8 leaves as they are
INT8_LEVELS = 127  # on one side of 0
WINOGRAD = 3e-5  # relative rounding error of a convolution
DIRECT = 1e-6  # likewise, of one that sums the products as they are


def reference(network: "ICNet") -> "Uint8Interface":
    """The reference in FP32 with the weights of `network`, behind the file contract's uint8 inputs."""
    from export.icnet import Uint8Interface
    from export.reference import ReferenceICNet

    return Uint8Interface(ReferenceICNet.of(network))


def variant(network: "ICNet", precision: str) -> "Uint8Interface":
    """The reference that rounds as `precision` does; its difference from `reference(network)` is the noise floor.

    Args:
        network: in FP32; it is not changed.
        precision: a key of `VARIANTS`.
    """
    found = reference(network)
    vary(found, precision)
    return found


def vary(network: "nn.Module", precision: str) -> None:
    """Make a network in FP32 round as `precision`, a key of `VARIANTS`, does; in place."""
    VARIANTS[precision](network)


def _fp64(network: "nn.Module") -> None:
    network.double()


def _fp16(network: "nn.Module") -> None:
    from export.fp16 import fold_batch_norms, round_to_half

    fold_batch_norms(network)
    for conv in _convolutions(network).values():
        for parameter in conv.parameters():
            parameter.data = round_to_half(parameter.data)
        conv.register_forward_pre_hook(lambda _module, inputs: tuple(map(round_to_half, inputs)))
        conv.register_forward_hook(lambda _module, _inputs, output: round_to_half(output))


def _bf16(network: "nn.Module") -> None:
    from export.fp16 import fold_batch_norms

    def rounded(x: "Tensor") -> "Tensor":
        return x.bfloat16().float()

    fold_batch_norms(network)
    for conv in _convolutions(network).values():
        conv.weight.data = rounded(conv.weight.data)
        conv.register_forward_pre_hook(lambda _module, inputs: tuple(map(rounded, inputs)))
        conv.register_forward_hook(lambda _module, _inputs, output: rounded(output))


TF32_DROPPED = 13  # of FP32's 23 bits of mantissa


def round_to_tf32(x: "Tensor") -> "Tensor":
    """Round to TF32, which has FP32's exponents and 10 bits of mantissa; halves away from 0, as `cvt.rna` does.

    Source: PTX ISA, "cvt", `.rna` and `.tf32`. Other dtypes than float32 are returned as they are.
    """
    import torch

    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32) + (1 << (TF32_DROPPED - 1))
    return torch.where(x.isfinite(), (bits & -(1 << TF32_DROPPED)).view(torch.float32), x)


def _tf32(network: Any) -> None:
    import torch
    from torch.overrides import TorchFunctionMode

    products = {torch.conv2d, torch.nn.functional.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}

    class Rounded(TorchFunctionMode):
        """Rounds the two factors of every convolution and matrix product; the bias is added in FP32."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function in products:
                args = (*map(round_to_tf32, args[:2]), *args[2:])
                kwargs |= {k: round_to_tf32(v) for k, v in kwargs.items() if k == "weight"}
            return function(*args, **kwargs)

    forward = network.forward

    def rounded(*tensors: "Tensor") -> Any:
        with Rounded():
            return forward(*tensors)

    network.forward = rounded


def _int8(network: "nn.Module") -> None:
    """One scale per output channel for weights, one per tensor for inputs."""
    import torch

    from export.fp16 import fold_batch_norms

    def rounded(x: "Tensor", limit: "Tensor") -> "Tensor":
        scale = limit.clamp_min(torch.finfo(x.dtype).tiny) / INT8_LEVELS
        return (x / scale).round().clamp(-INT8_LEVELS, INT8_LEVELS) * scale

    fold_batch_norms(network)
    for name, conv in _convolutions(network).items():
        if name not in FLOAT_LAYERS:
            weight = conv.weight.data
            conv.weight.data = rounded(weight, weight.abs().amax(dim=(1, 2, 3), keepdim=True))
            conv.register_forward_pre_hook(lambda _module, inputs: (rounded(inputs[0], inputs[0].abs().max()),))


def _winograd(network: "nn.Module") -> None:
    import torch

    generator = torch.Generator().manual_seed(0)

    def noisy(_module: object, _inputs: object, output: "Tensor") -> "Tensor":
        return output * (1 + WINOGRAD * torch.randn(output.shape, generator=generator))

    for conv in _convolutions(network).values():
        conv.register_forward_hook(noisy)


VARIANTS = {
    "fp32": _fp64,
    "tf32": _tf32,
    "fp16": _fp16,
    "bf16": _bf16,
    "int8": _int8,
    "winograd": _winograd,
}  # by precision


def _convolutions(network: "nn.Module") -> dict[str, "nn.Conv2d"]:
    """The convolutions behind a `Uint8Interface`, by their names in the checkpoint."""
    from torch import nn

    found = network.named_modules()
    return {name.removeprefix("network."): m for name, m in found if isinstance(m, nn.Conv2d)}


def with_noise(model: Any, scale: float) -> bytes:
    """An ONNX model with relative rounding error, as seeded noise of that scale, on the output of every convolution."""
    from onnx import helper

    model = type(model).FromString(model.SerializeToString())
    nodes = []
    for seed, node in enumerate(model.graph.node):
        nodes.append(node)
        if node.op_type == "Conv":
            y = node.output[0]
            node.output[0] = f"{y}.exact"
            noise: dict[str, Any] = {"mean": 1.0, "scale": scale, "seed": float(seed)}
            nodes.append(helper.make_node("RandomNormalLike", [f"{y}.exact"], [f"{y}.factor"], **noise))
            nodes.append(helper.make_node("Mul", [f"{y}.exact", f"{y}.factor"], [y]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def with_bf16(model: Any) -> bytes:
    """An ONNX model whose convolutions have their weights, inputs and outputs rounded to BF16."""
    from onnx import TensorProto, helper

    model = type(model).FromString(model.SerializeToString())
    nodes = []

    def rounded(x: str, y: str) -> None:
        nodes.append(helper.make_node("Cast", [x], [f"{y}.bf16"], to=TensorProto.BFLOAT16))
        nodes.append(helper.make_node("Cast", [f"{y}.bf16"], [y], to=TensorProto.FLOAT))

    for i, node in enumerate(model.graph.node):
        if node.op_type != "Conv":
            nodes.append(node)
            continue
        for k in (0, 1):
            rounded(node.input[k], f"rounded.{i}.{k}")
            node.input[k] = f"rounded.{i}.{k}"
        y = node.output[0]
        node.output[0] = f"{y}.exact"
        nodes.append(node)
        rounded(f"{y}.exact", y)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def without_rounding(model: Any) -> bytes:
    """A calibrated ONNX model without the rounding of its activations: Q followed by DQ is left out."""
    model = type(model).FromString(model.SerializeToString())
    quantised = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in quantised:
            node.op_type = "Identity"
            node.input[:] = [quantised[node.input[0]]]
            del node.attribute[:]
    kept = [node for node in model.graph.node if node.op_type != "QuantizeLinear"]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return bytes(model.SerializeToString())
