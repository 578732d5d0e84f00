import numpy as np
import pytest
from PIL import Image

from calibration.graph import ExportedModel
from calibration.groups import open_groups
from calibration.ranges import collect
from export.fp16 import half_precision
from export.samples import smooth_group
from export.to_onnx import write_onnx
from runtime import Predictor
from tests.helpers import random_network

NARROW = 1 / 16


@pytest.fixture(scope="session")
def narrow(tmp_path_factory):
    """An FP32 export of a narrow network."""
    path = tmp_path_factory.mktemp("narrow") / "icnet.onnx"
    write_onnx(random_network(NARROW), path, provenance={"precision": "fp32", "width": "0.0625"})
    return path


@pytest.fixture(scope="session")
def narrow_fp16(tmp_path_factory):
    path = tmp_path_factory.mktemp("narrow") / "icnet.fp16.onnx"
    write_onnx(half_precision(random_network(NARROW)), path)
    return path


def save_group(folder, name, group, masks=None):
    for kind, pixels in {"img": group.images, "sism": group.sisms, "gt": masks}.items():
        for i, image in enumerate(() if pixels is None else pixels):
            path = folder / kind / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


@pytest.fixture(scope="session")
def groups(tmp_path_factory):
    """Three groups of two images, in the layout of the co-saliency data sets."""
    folder = tmp_path_factory.mktemp("groups")
    for seed, name in enumerate(("a", "b", "c")):
        save_group(folder, name, smooth_group(2, seed))
    return folder


@pytest.fixture(scope="session")
def validation(narrow, tmp_path_factory):
    """A group whose ground truths are what the network itself finds, so that it scores well."""
    folder = tmp_path_factory.mktemp("validation")
    group = smooth_group(2, 9)
    with Predictor(narrow) as predictor:
        maps = predictor.predict_tensors(group.images, group.sisms)
    levels = np.stack([np.where(m > np.median(m), 255, 0) for m in maps]).astype(np.uint8)
    save_group(folder, "v", group, levels)
    return folder


@pytest.fixture(scope="session")
def calibrated(narrow, groups):
    """The export and its min–max ranges."""
    model = ExportedModel(narrow)
    chosen = open_groups(groups, groups / "sism")
    return model, collect(narrow, model.model, model.tensors(), lambda _: chosen.feeds(), "minmax")


@pytest.fixture(scope="session")
def calibrated_fp16(narrow_fp16, groups):
    model = ExportedModel(narrow_fp16)
    chosen = open_groups(groups, groups / "sism")
    return model, collect(narrow_fp16, model.model, model.tensors(), lambda _: chosen.feeds(), "minmax")
