"""SISMs for photographs that have none."""

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DependencyError, InputError, how_to_install


def builtin_sism(image: NDArray[np.uint8], name: str = "image") -> NDArray[np.uint8]:
    """A weak stand-in for a salient-object detector that needs no weights: OpenCV's fine-grained static saliency.

    It marks whatever differs from its surroundings (Montabone and Soto, "Human detection using a mobile platform and
    novel features derived from a visual saliency mechanism", 2010). A trained detector marks objects; ICNet was
    trained on the maps of one (the paper: EGNet), and is only as good as its SISMs.

    Args:
        image: RGB uint8 [H, W, 3].
        name: what messages call it.

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
            f"built-in SISMs need OpenCV's contrib modules: {how_to_install('opencv')} "
            "(uninstall other opencv-python packages first)"
        ) from error
    ok, saliency = detector.computeSaliency(np.ascontiguousarray(image[:, :, ::-1]))
    if not ok:
        raise InputError(f"{name}: OpenCV can't compute a built-in SISM of it; give a SISM file")
    levels: NDArray[np.float32] = np.asarray(saliency, dtype=np.float32)
    levels *= 255 / max(float(levels.max()), 1e-6)
    return np.rint(levels).astype(np.uint8)
