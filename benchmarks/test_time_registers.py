# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What test-time registers cost at ViT-B, 224 px: `python benchmarks/test_time_registers.py`.

- The shift beside the plain forward: the bound is 3 %. A model with a trained register in its place shows what of it
  the token costs and what the neurons. As many neurons are shifted as in DINOv2-L, 45 in six layers.
- The pass that scores neurons beside the plain forward over the same images: the bound is 1.2. The threshold is set so
  that 2.4 % of the patches are outliers, as in the models of "Vision Transformers Need Registers".
"""

from functools import partial
from typing import Annotated

import torch
import typer
from timing import save, show

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.analysis.norms import token_norms
from hf_vitreg.deployment.timing import alternate, summary
from hf_vitreg.features import VisionEncoder
from hf_vitreg.registers.neuron_scores import NeuronScores
from hf_vitreg.registers.test_time import with_test_time_registers
from hf_vitreg.registers.warm_start import add_registers


IMAGE_SIZE, OUTLIER_SHARE = 224, 0.024
NEURONS_BY_LAYER = {6: 1, 7: 1, 8: 8, 9: 9, 10: 9, 11: 17}
SHIFT_BOUND, FIND_BOUND = 1.03, 1.2


def random_model(patch_size: int) -> ViTRegModel:
    torch.manual_seed(0)
    config = ViTRegConfig(patch_size=patch_size, image_size=IMAGE_SIZE, num_register_tokens=0)
    model = ViTRegModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.03)
    return model


def main(
    patch_size: int = 16,
    batch_size: int = 8,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: int = 20,
    threads: Annotated[int, typer.Option(help="0 leaves torch's own choice.")] = 0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
):
    if threads:
        torch.set_num_threads(threads)
    device, dtype = torch.device(device), getattr(torch, dtype)
    plain = random_model(patch_size).to(device, dtype)
    pixel_values = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device, dtype=dtype)
    # far apart, as they are in a trained model
    neurons = {layer: list(range(5, 3072, 3072 // number))[:number] for layer, number in NEURONS_BY_LAYER.items()}
    models = {
        "plain": plain,
        "a trained register": add_registers(plain, 1),
        "a test-time register": with_test_time_registers(plain, neurons),
        "one scalar per layer": with_test_time_registers(plain, neurons, reduce="layer"),
    }

    @torch.no_grad()
    def forward(model: ViTRegModel) -> torch.Tensor:
        return model(pixel_values).last_hidden_state

    check(models["a test-time register"], pixel_values)
    seconds = alternate({name: partial(forward, model) for name, model in models.items()}, rounds, device)
    shift = summary(seconds, ours="plain")
    show(f"Forward (bound {SHIFT_BOUND})", shift, ratio="of the plain forward")

    encoder = VisionEncoder.wrap(plain, "random")
    norms = token_norms(encoder.layers(pixel_values, [-1])[-1][:, encoder.patch_slice])
    threshold = norms.float().quantile(1 - OUTLIER_SHARE).item()

    def find() -> NeuronScores:
        scores = NeuronScores(encoder, threshold, encoder.num_layers - 1)
        scores.update(pixel_values)
        return scores

    if not 0.5 * OUTLIER_SHARE < find().outlier_share < 2 * OUTLIER_SHARE:
        raise AssertionError(f"{find().outlier_share:.4f} of the patches are outliers.")
    seconds = alternate({"find": find, "plain": lambda: encoder.observe(pixel_values)}, rounds, device)
    finding = summary(seconds, ours="plain")
    show(f"Scores of all neurons (bound {FIND_BOUND})", finding, ratio="of the plain forward")
    setting = (
        f"ViT-B/{patch_size}, {IMAGE_SIZE} px, batch {batch_size}, {str(dtype).removeprefix('torch.')}, "
        f"{torch.get_num_threads()} threads"
    )
    save(
        f"test_time_registers_{device.type}",
        device,
        setting=setting,
        rounds=rounds,
        num_neurons=sum(NEURONS_BY_LAYER.values()),
        shift=shift,
        shift_bound=SHIFT_BOUND,
        finding=finding,
        finding_bound=FIND_BOUND,
    )


@torch.no_grad()
def check(model: ViTRegModel, pixel_values: torch.Tensor) -> None:
    """Raises `AssertionError` unless a batch is its images, and the shift does something."""
    tokens = model(pixel_values).last_hidden_state.float()
    alone = torch.cat([model(image[None]).last_hidden_state for image in pixel_values]).float()
    tolerance = 1e-4 if pixel_values.dtype == torch.float32 else 5e-2
    error = ((tokens - alone).norm() / tokens.norm()).item()
    if not error < tolerance:
        raise AssertionError(f"A batch differs from its images by {error:.2g}.")


if __name__ == "__main__":
    typer.run(main)
