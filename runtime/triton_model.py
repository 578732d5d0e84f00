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
from runtime.contract import OUTPUTS, RGBS
from runtime.errors import DependencyError, ICNetError, InputError
from runtime.predictor import Predictor


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
            providers=[(name_of(one), {"device_id": number}) for one in PROVIDERS[settings.get("device", "cpu")]],
            device=number,
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """The response of each request: `maps`, or why there are none. Groups of all of them share calls."""
        asked = [self._rgbs(pb_utils.get_input_tensor_by_name(request, RGBS.name)) for request in requests]
        groups = [
            (group[..., :3], group[..., 3]) for rgbs in asked if not isinstance(rgbs, ICNetError) for group in rgbs
        ]
        outcomes = iter(self.predictor.predict_tensor_groups(groups, on_error="return"))
        return [_response(rgbs, outcomes) for rgbs in asked]

    def finalize(self) -> None:
        """Give the model's memory back."""
        self.predictor.close()

    def _rgbs(self, tensor: Any) -> NDArray[np.uint8] | InputError:
        """The groups of a request that have images, uint8 [b, n, 224, 224, 4]. Triton has checked all but n."""
        rgbs: NDArray[np.uint8] = tensor.as_numpy()
        if rgbs.shape[1] > self.most:
            return InputError(f"{rgbs.shape[1]} images in a group: this server takes at most {self.most}")
        return rgbs


def _response(rgbs: NDArray[np.uint8] | ICNetError, outcomes: Iterator[NDArray[np.float32] | ICNetError]) -> Any:
    found = [rgbs] if isinstance(rgbs, ICNetError) else [next(outcomes) for _ in rgbs]
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
