# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Register neurons as they are kept beside a model: as JSON, and as a picture of all scores."""

import io
import json

import numpy as np

from .register_neurons import RegisterNeurons


def neurons_json(found: RegisterNeurons) -> str:
    """What was found, with scores, and what was measured on the way. Layers and neurons are counted from 0."""
    record = {
        "neurons": [
            {"layer": layer, "neuron": neuron, "score": found.scores[layer, neuron].item()}
            for layer, neuron in found.ranking
        ],
        "threshold": found.threshold,
        "detect_layer": found.detect_layer,
        "highest_layer": found.highest_layer,
        "num_images": found.num_images,
        "num_images_with_outliers": found.num_images_with_outliers,
        "outlier_share": found.outlier_share,
        "target_share": found.target_share,
        "share_by_number": {str(number): share for number, share in sorted(found.tried.items())},
    }
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def neurons_picture(found: RegisterNeurons) -> bytes:
    """A PNG: the scores of all neurons layer by layer, those that were chosen marked."""
    # matplotlib takes a second to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from ..analysis import figures

    scores = found.scores.numpy()
    num_layers, num_neurons = scores.shape
    layers = np.repeat(np.arange(num_layers), num_neurons)
    figure = Figure(figsize=(figures.WIDTH, 0.68 * figures.WIDTH), layout="constrained")
    axes = figure.subplots()
    kinds = [
        (np.ones(scores.size, dtype=bool), figures.BLUE, ".", "all neurons"),
        (_chosen(found), figures.VERMILION, "o", f"{len(found.ranking)} register neurons"),
    ]
    for is_shown, colour, marker, label in kinds:
        size = 9 if marker == "." else 26
        axes.scatter(
            layers[is_shown],
            scores.ravel()[is_shown],
            s=size,
            color=colour,
            marker=marker,
            alpha=0.5 if marker == "." else 1,
            linewidths=0,
            label=label,
        )
    axes.axvline(found.highest_layer + 0.5, color=figures.BLACK, linestyle=":", linewidth=1, label="highest layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.5, num_layers - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer, from 0", fontsize=8)
    axes.set_ylabel("mean magnitude at outliers", fontsize=8)
    axes.set_title("Activation of neurons where outliers are", fontsize=9)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=figures.DPI, metadata={"Software": None})
    return content.getvalue()


def _chosen(found: RegisterNeurons) -> np.ndarray:
    """Which of all neurons, layer by layer, `(num_layers * num_neurons,)`."""
    chosen = np.zeros(tuple(found.scores.shape), dtype=bool)
    for layer, neuron in found.ranking:
        chosen[layer, neuron] = True
    return chosen.ravel()
