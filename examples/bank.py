"""One image at a time against a kept bank: the images of a folder make the bank, or are compared with it.

python examples/bank.py icnet.onnx make PHOTOS SISMS bank.npz
python examples/bank.py icnet.onnx compare NEW_PHOTOS NEW_SISMS bank.npz

icnet.intra.onnx and icnet.banked.onnx lie beside icnet.onnx: `icnet export --banked` wrote them.
"""

import sys
from pathlib import Path

from runtime import Bank, InputError, Predictor


def main(model: Path, action: str, photos: Path, sisms: Path, file: Path) -> None:
    """Write a bank, or print how much of each new image it marks."""
    images = sorted(photos.iterdir())
    sism_files = [sisms / f"{image.stem}.png" for image in images]
    files = model.with_suffix(".intra.onnx"), model.with_suffix(".banked.onnx")
    with Predictor(bank_export=files) as predictor:
        if action == "make":
            bank = predictor.bank(images, sism_files)
            bank.save(file)
            print(f"{file}: {len(bank)} images, {bank.sivs.shape[1]} numbers each")
        elif action == "compare":
            bank = Bank.load(file)
            for image, sism in zip(images, sism_files, strict=True):  # each by itself: no group is needed any more
                (found,) = predictor.against(bank, [image], [sism])
                print(f"{image.name}: {(found > 0.5).mean():.0%} marked")
        else:
            raise InputError(f"{action}: expected make or compare")


if __name__ == "__main__":
    model, action, *rest = sys.argv[1:6]
    main(Path(model), action, *map(Path, rest))
