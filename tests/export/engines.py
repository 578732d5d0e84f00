"""What the tests of engines share: sizes, other models, and a progress bar that remembers."""

import io

import onnx
from onnx import TensorProto, helper
from rich.console import Console
from rich.progress import Progress

from export.tensorrt_engine import Profile

ONE = (Profile(1, 2, 4),)
SIZES = ("--min", 1, "--opt", 2, "--max", 4)


def foreign_model(path, operator="Relu", node_name="the_node"):
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 7]) for n in "xy"]
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], node_name)], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


class Spy(Progress):
    """Records what a progress bar is told, and calls `hook` at every step."""

    def __init__(self, hook=lambda: None):
        super().__init__(console=Console(file=io.StringIO()))
        self.started, self.steps, self.hook = {}, 0, hook

    def add_task(self, description, **kwargs):
        self.started[description] = kwargs["total"]
        return super().add_task(description, **kwargs)

    def update(self, task, **kwargs):
        self.steps += 1
        super().update(task, **kwargs)
        self.hook()
