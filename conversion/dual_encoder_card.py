# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The model card of a dual encoder: two towers that put images and texts into one space."""

from huggingface_hub import ModelCard, ModelCardData
from transformers import CLIPTextConfig, PreTrainedModel

from hf_vitreg import ViTRegConfig
from hf_vitreg.hub.card import MODEL_ID, CardFacts


TEMPLATE = """---
{{ card_data }}
---

# {{ facts.name }}

CLIP: a vision transformer and a text transformer that turn images and texts into vectors of one space, where an image
is near the texts that fit it.

## The model

| | |
| --- | --- |
| Class | `{{ model_class }}` |
| Vision tower | `{{ vision_class }}`: {{ vision_size }} |
| Text tower | `{{ text_class }}`: {{ text_size }} |
| Parameters | {{ parameters }} |
| Common space | {{ projection_dim }} dimensions |
| Image size | {{ image_size }} x {{ image_size }} pixels, patches of {{ patch_size }} x {{ patch_size }} |
| Text | up to {{ text.max_position_embeddings }} tokens out of {{ text.vocab_size }} |

Images of another size work too where both sides are multiples of {{ patch_size }} pixels: the position
embeddings are interpolated.

## How to use it

The vision tower is of the package `hf_vitreg`, which must be imported first.
{% if has_tokenizer %}
```python
import hf_vitreg
from PIL import Image
from transformers import pipeline

image = Image.new("RGB", (640, 480))  # yours: Image.open("photo.jpg").convert("RGB")
classify = pipeline("zero-shot-image-classification", model="{{ model_id }}")
print(classify(image, candidate_labels=["a cat", "a dog", "an empty room"]))
```

The pipeline logs that its list of classes has no `VisionTextDualEncoderModel`, and works with it.

The vectors themselves:

```python
import hf_vitreg
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, VisionTextDualEncoderModel

image = Image.new("RGB", (640, 480))  # yours: Image.open("photo.jpg").convert("RGB")
model = VisionTextDualEncoderModel.from_pretrained("{{ model_id }}")
processor = AutoImageProcessor.from_pretrained("{{ model_id }}")
tokenizer = AutoTokenizer.from_pretrained("{{ model_id }}")
images = processor(image, return_tensors="pt")
texts = tokenizer(["a photo of a cat", "a photo of a dog"], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    image_embeds = model.get_image_features(**images).pooler_output  # (1, {{ projection_dim }})
    text_embeds = model.get_text_features(**texts).pooler_output  # (2, {{ projection_dim }})
    patch_tokens = model.vision_model(**images).patch_tokens  # (1, rows * cols, {{ vision.hidden_size }})
```

Texts get the ids that OpenCLIP's tokenizer gives them, with two exceptions: that one mends broken Unicode, curly
quotes and HTML entities first, and pads with 0 where this one pads with the end of text and masks it. The vectors do
not depend on the padding.
{% else %}
```python
import hf_vitreg
from transformers import VisionTextDualEncoderModel

model = VisionTextDualEncoderModel.from_pretrained("{{ model_id }}")
```

There is no tokenizer, because its vocabulary is not CLIP's.
{% endif %}
{%- if facts.base_model %}
## How it was made

The weights are those of [{{ facts.base_model }}](https://huggingface.co/{{ facts.base_model }}).
{% endif %}
## Notes

{{ facts.notes }}

## Citation

```bibtex
@inproceedings{radford2021clip,
  title     = {Learning Transferable Visual Models From Natural Language Supervision},
  author    = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and others},
  booktitle = {International Conference on Machine Learning},
  year      = {2021},
  url       = {https://arxiv.org/abs/2103.00020}
}

@inproceedings{cherti2023openclip,
  title     = {Reproducible Scaling Laws for Contrastive Language-Image Learning},
  author    = {Cherti, Mehdi and Beaumont, Romain and Wightman, Ross and Wortsman, Mitchell and others},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2023},
  url       = {https://arxiv.org/abs/2212.07143}
}
```
"""


def dual_encoder_card(model: PreTrainedModel, facts: CardFacts, has_tokenizer: bool) -> ModelCard:
    """The card of a `VisionTextDualEncoderModel` around a ViTReg.

    Args:
        model: It, with its weights.
        facts: Name, licence, origin and notes; what is measured in training has no place here.
        has_tokenizer: Whether there is one beside it, without which no pipeline loads.

    Metadata: https://huggingface.co/docs/hub/model-cards
    """
    metadata = ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        base_model=facts.base_model,
        tags=["vitreg", "vision-transformer", "clip"],
    )
    config = model.config
    return ModelCard.from_template(
        metadata,
        template_str=TEMPLATE,
        facts=facts,
        model_id=MODEL_ID,
        has_tokenizer=has_tokenizer,
        model_class=type(model).__name__,
        vision=config.vision_config,
        image_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        vision_class=type(model.vision_model).__name__,
        vision_size=_size(config.vision_config),
        text=config.text_config,
        text_class=type(model.text_model).__name__,
        text_size=_size(config.text_config),
        projection_dim=config.projection_dim,
        parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
    )


def _size(config: ViTRegConfig | CLIPTextConfig) -> str:
    return (
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_attention_heads} "
        f"{'heads' if config.num_attention_heads > 1 else 'head'}, MLP "
        f"(`{config.hidden_act}`) of width {config.intermediate_size}"
    )
