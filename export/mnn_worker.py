"""python export/mnn_worker.py FOLDER OUTPUT: MNN's part of `export.to_mnn`.

It is a process of its own because MNN's converter prints without restraint and crashes on some graphs. FOLDER has
model.onnx; notes.json, which the file will carry; and calls.npz with an array `NUMBER/TENSOR` for each input of each
call. The converted model goes to model.mnn, what its OUTPUT is for the calls to outputs.npz, as `NUMBER`.
"""

import os
import sys
from pathlib import Path

import numpy as np


def main(folder: Path, output_name: str) -> None:
    """Convert the model, then run the calls; ends with exit code 1 and a message if either fails."""
    import _tools  # MNN's converter; its command line would install a package and report to its makers
    import MNN

    output = folder / "model.mnn"
    arguments = {"-f": "ONNX", "--modelFile": folder / "model.onnx", "--MNNModel": output}
    arguments["--bizCode"] = (folder / "notes.json").read_text(encoding="utf-8")
    _tools.mnnconvert(["", *(str(text) for pair in arguments.items() for text in pair)])
    if not output.is_file() or not output.stat().st_size:
        sys.exit("MNN's converter refused it")
    interpreter = MNN.Interpreter(str(output))
    session = interpreter.createSession({"backend": "CPU", "numThread": os.cpu_count() or 1, "precision": "normal"})
    tensors = interpreter.getSessionInputAll(session)
    calls: dict[str, dict[str, np.ndarray]] = {}
    with np.load(folder / "calls.npz") as file:
        for key, array in file.items():
            number, name = key.split("/")
            calls.setdefault(number, {})[name] = array
    outputs = {}
    for number, call in calls.items():
        for name, array in call.items():
            interpreter.resizeTensor(tensors[name], array.shape)
        interpreter.resizeSession(session)
        for name, array in call.items():
            np.copyto(tensors[name].getNumpyData(), array)
        if code := interpreter.runSession(session):
            sys.exit(f"MNN's error {code}")
        outputs[number] = interpreter.getSessionOutput(session, output_name).getNumpyData().copy()
    np.savez(folder / "outputs.npz", **outputs)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
