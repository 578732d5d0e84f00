"""The model that Triton's Python back end runs: a `Predictor` for the groups of several requests.

The model.py that `icnet triton` writes imports this module, in a process of Triton's: only there is the package
triton_python_backend_utils.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from runtime.backends.onnx_gpu import name_of
from runtime.commands.device import PROVIDERS
from runtime.contract import FILES, OUTPUTS, RGBS
from runtime.errors import DependencyError, ICNetError, InputError
from runtime.predictor import Predictor
from runtime.stream import Task


class TritonPythonModel:
    """What Triton calls. The settings are the `parameters` in config.pbtxt."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model.

        Raises:
            ICNetError: it can't be run here; Triton then reports that the model could not be loaded.
        """
        _check_numpy()
        settings = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        folder = Path(args["model_repository"], args["model_version"])
        files = {role: folder / settings[role] for role in ("model", "intra", "banked") if role in settings}
        number = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0
        self.most = int(settings["max_images"])
        self.predictor = Predictor(
            files.get("model"),
            bank_export=(files["intra"], files["banked"]) if "banked" in files else None,
            threads=int(settings["threads"]) if "threads" in settings else None,
            sism_model=folder / settings["detector"] if "detector" in settings else None,
            sism_normalise=settings.get("sism_normalise"),
            sism_minmax=settings["sism_minmax"] == "True" if "sism_minmax" in settings else None,
            providers=[(name_of(one), {"device_id": number}) for one in PROVIDERS[settings.get("device", "cpu")]],
            device=number,
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """The response of each request: `maps`, or why there are none. Groups of all of them share calls."""
        detects = self.predictor.detector is not None
        name = FILES if detects else RGBS.name
        asked = [self._input(pb_utils.get_input_tensor_by_name(request, name)) for request in requests]
        groups = [group for of_request in asked if not isinstance(of_request, ICNetError) for group in of_request]
        outcomes = self._from_files(groups) if detects else self._from_tensors(groups)
        return [_response(of_request, outcomes) for of_request in asked]

    def _from_tensors(self, groups: Sequence[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32] | ICNetError]:
        tensors = [(group[..., :3], group[..., 3]) for group in groups]
        return iter(self.predictor.predict_tensor_groups(tensors, on_error="return"))

    def _from_files(self, groups: Sequence[NDArray[np.object_]]) -> Iterator[NDArray[np.float32] | ICNetError]:
        """The maps of groups of image files, whose SISMs the detector makes."""
        pipeline = self.predictor.pipeline

        def tasks() -> Iterator[Task[NDArray[np.float32]] | ICNetError]:
            for group in groups:
                try:
                    task = Task(pipeline.reads([bytes(file) for file in group], None), lambda _, maps: [lambda: maps])
                except ICNetError as error:
                    yield error
                else:
                    yield task

        for outcome in pipeline.stream(tasks()):
            yield outcome if isinstance(outcome, ICNetError) else outcome[0]

    def finalize(self) -> None:
        """Give the model's memory back."""
        self.predictor.close()

    def _input(self, tensor: Any) -> NDArray[Any] | InputError:
        """A request's groups, uint8 [b, n, 224, 224, 4] or files [b, n]. Triton has checked all but n."""
        found: NDArray[Any] = tensor.as_numpy()
        if found.shape[1] > self.most:
            return InputError(f"{found.shape[1]} images in a group: this server takes at most {self.most}")
        return found


def _response(asked: NDArray[Any] | ICNetError, outcomes: Iterator[NDArray[np.float32] | ICNetError]) -> Any:
    found = [asked] if isinstance(asked, ICNetError) else [next(outcomes) for _ in asked]
    maps = [one for one in found if not isinstance(one, ICNetError)]
    error = next((one for one in found if isinstance(one, ICNetError)), None)
    if error is None:
        return pb_utils.InferenceResponse([pb_utils.Tensor(OUTPUTS[0].name, np.stack(maps))])
    code = pb_utils.TritonError.INVALID_ARG if isinstance(error, InputError) else pb_utils.TritonError.INTERNAL
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


def _check_numpy() -> None:
    """Some releases of Triton's Python back end were built for NumPy 1, and give empty outputs with NumPy 2."""
    numbers = np.arange(6, dtype=np.float32)
    tensor = pb_utils.Tensor("numbers", numbers)
    if not np.array_equal(pb_utils.Tensor.from_dlpack("numbers", tensor.to_dlpack()).as_numpy(), numbers):
        raise DependencyError(
            f"numpy {np.__version__} does not fit this Triton's Python back end, which reads its arrays wrongly: "
            "install 'numpy<2' into the environment that the model runs in"
        )
