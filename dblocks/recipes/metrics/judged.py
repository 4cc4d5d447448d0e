"""Metrics of generated images by a classifier, and of training images for comparison."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dblocks.recipes.data.splits import Images, values
from dblocks.recipes.metrics.classes import accuracy
from dblocks.recipes.metrics.images import frechet_distance, in_batches, spread
from dblocks.recipes.metrics.judge import FEATURES, ImageClassifier
from dblocks.recipes.metrics.neighbours import NEIGHBOURS, PrecisionRecall, precision_recall


def judged(
    judge: ImageClassifier,
    guided: Tensor,
    unguided: Tensor,
    labels: Tensor,
    training: Images,
    held_out: Images,
) -> dict[str, Any]:
    """Distances, precision, recall and accuracies, as JSON values.

    Distances are None if there are not more images than features; precision and recall are None if
    there are not more images than neighbours.

    Args:
        judge: the classifier.
        guided: generated images [n, C, H, W].
        unguided: images generated without guidance, of the same classes.
        labels: the classes, int64 [n].
        training: the training images.
        held_out: the images to compare with.
    """
    device = next(judge.parameters()).device

    def features(images: Tensor) -> Tensor:
        return in_batches(lambda x: judge.features(values(x).to(device)), images)

    def correct(images: Tensor, classes: Tensor) -> float:
        return accuracy(in_batches(lambda x: judge(values(x).to(device)), images), classes)

    real = features(held_out.images)

    def distance(images: Tensor) -> float | None:
        if min(len(images), len(real)) <= FEATURES:  # too few for the covariance
            return None
        return frechet_distance(features(images), real)

    def among(images: Tensor) -> PrecisionRecall | None:
        """Precision and recall, with as many held-out images as samples, evenly spaced."""
        n = min(len(guided), len(real), len(images))
        if n <= NEIGHBOURS:
            return None
        return precision_recall(spread(real, n), features(spread(images, n)))

    found, usual = among(guided), among(training.images)
    return {
        "precision": found and found.precision,
        "recall": found and found.recall,
        "precision_of_training_images": usual and usual.precision,
        "recall_of_training_images": usual and usual.recall,
        "distance": distance(guided),
        "distance_unguided": distance(unguided),
        "distance_of_training_images": distance(training.images),
        "accuracy": correct(guided, labels),
        "accuracy_unguided": correct(unguided, labels),
        "accuracy_on_held_out": correct(held_out.images, held_out.labels),
    }
