"""Where SISMs come from, for those who have none."""

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DependencyError, InputError


def builtin_sism(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A weak stand-in for a salient-object detector that needs no weights: OpenCV's fine-grained static saliency.

    It marks whatever differs from its surroundings (Montabone and Soto, "Human detection using a mobile platform and
    novel features derived from a visual saliency mechanism", 2010). A trained detector marks objects; ICNet was
    trained on the maps of one (the paper: EGNet), and is only as good as its SISMs.

    Args:
        image: RGB uint8 [H, W, 3].

    Returns:
        uint8 [H, W], stretched so that the most salient pixel is 255 (all 0 where nothing stands out).

    Raises:
        DependencyError: OpenCV with its contrib modules is not installed.
        InputError: OpenCV can't take the image.
    """
    try:
        import cv2

        detector = cv2.saliency.StaticSaliencyFineGrained.create()
    except (ImportError, AttributeError) as error:
        raise DependencyError(
            "built-in SISMs need OpenCV's contrib modules: pip install 'icnet-deploy[opencv]' "
            "(uninstall other opencv-python packages first)"
        ) from error
    ok, saliency = detector.computeSaliency(np.ascontiguousarray(image[:, :, ::-1]))
    if not ok:
        raise InputError(f"OpenCV found no saliency in an image of shape {image.shape}")
    levels: NDArray[np.float32] = np.asarray(saliency, dtype=np.float32)
    levels *= 255 / max(float(levels.max()), 1e-6)
    return np.rint(levels).astype(np.uint8)
