"""Pictures for the detection and the segmentation example: discs, squares and triangles drawn on photographs.

The photographs are the two that scikit-learn brings. Training pictures lie on their left two thirds, test pictures on
the rest, so no background is seen in both.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images
from torch import Tensor

SIZE = 64
CLASSES = ("background", "disc", "square", "triangle")


def pictures(number: int, *, train: bool, seed: int = 0) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Draws one to three shapes on each of some random crops.

    :param number: of pictures.
    :param train: from the training part of the photographs, or the test part.
    :param seed: of crops, places and colours.
    :return: images ``[number, 3, 64, 64]`` in [0, 1], class of every pixel ``[number, 64, 64]``, and for each picture
        its ``boxes`` ``[shapes, 4]`` (left, top, right, bottom) and ``labels`` ``[shapes]``.
    """
    random = np.random.default_rng((seed, train))
    images, masks, targets = [], [], []
    photographs = load_sample_images().images
    for _ in range(number):
        photograph = photographs[random.integers(len(photographs))]
        border = photograph.shape[1] * 2 // 3
        part = photograph[:, :border] if train else photograph[:, border:]
        top, left = (random.integers(side - 2 * SIZE) for side in part.shape[:2])
        image = Image.fromarray(part[top : top + 2 * SIZE : 2, left : left + 2 * SIZE : 2].copy())
        mask = Image.new("L", image.size)
        boxes, labels = [], []
        for _ in range(random.integers(1, 4)):
            label, side = int(random.integers(1, 4)), int(random.integers(14, 28))
            x, y = (int(v) for v in random.integers(0, SIZE - side, 2))
            box = (x, y, x + side, y + side)
            if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes):
                continue
            _draw(image, label, box, tuple(int(c) for c in random.integers(0, 256, 3)))
            _draw(mask, label, box, label)
            boxes.append(box)
            labels.append(label)
        images.append(np.asarray(image))
        masks.append(np.asarray(mask))
        targets.append({"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)})
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return pixels, torch.from_numpy(np.stack(masks)).long(), targets


def _draw(image: Image.Image, label: int, box: tuple[int, int, int, int], colour: object) -> None:
    draw, (left, top, right, bottom) = ImageDraw.Draw(image), box
    if CLASSES[label] == "disc":
        draw.ellipse(box, fill=colour)
    elif CLASSES[label] == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)
