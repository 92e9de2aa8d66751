# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""From the names of a published checkpoint to those of ViTReg, with an account of every tensor.

A family's rules are a table from an old name to a new one, or to several that share the tensor in equal parts along
its first dimension:

    {"norm.{param}": "layernorm.{param}", "blocks.{layer}.attn.qkv.{param}": ("…q_proj.{param}", "…", "…")}

`{layer}` and `{chunk}` stand for a number, `{param}` for `weight` or `bias`, and `[…]` may be absent. A part that goes
to `None` is dropped.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from conversion.family import ConversionError


PLACEHOLDERS = {"layer": r"\d+", "chunk": r"\d+", "param": "weight|bias"}
MAX_NAMES_SHOWN = 8

Rules = Mapping[str, str | tuple[str | None, ...]]


@dataclass
class _Account:
    """Where every tensor went, and everything that does not add up."""

    filled: dict[str, torch.Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def fill(self, new: str, part: torch.Tensor, old: str, targets: Mapping[str, torch.Size]):
        if new not in targets:
            self.unknown.append(old)
        elif new in self.origin:
            self.twice.append(f"{old} and {self.origin[new]}")
        elif part.shape != targets[new]:
            self.misfits.append(f"{old} gives {tuple(part.shape)} to {new}, which takes {tuple(targets[new])}")
        else:
            self.filled[new] = part
        self.origin.setdefault(new, old)

    def raise_if_unbalanced(self):
        categories = {
            "tensors that the model does not have": self.unknown,
            "tensors that claim the same place": self.twice,
            "shapes that do not fit": self.misfits,
            "tensors that are missing": self.missing,
        }
        # a tensor of several parts may be refused once a part
        categories = {what: list(dict.fromkeys(names)) for what, names in categories.items()}
        lines = [f"{len(names)} {what}: {shown(names)}" for what, names in categories.items() if names]
        if lines:
            raise ConversionError("The checkpoint does not fit the model.\n  " + "\n  ".join(lines))


def rename(
    tensors: Mapping[str, torch.Tensor], rules: Rules, targets: Mapping[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """Every tensor under its new name, the split ones as views: nothing is copied.

    Args:
        tensors: The checkpoint's tensors under their old names.
        rules: Old name to new name or names, see the top of this file.
        targets: Name and shape of every tensor of the model.

    Raises:
        ConversionError: unless every tensor is used exactly once, every target is filled and every shape fits. It
            names those that are not.
    """
    compiled = [(_pattern(old), (new,) if isinstance(new, str) else new) for old, new in rules.items()]
    account = _Account()
    for old, tensor in tensors.items():
        matches = [(match, new) for pattern, new in compiled if (match := pattern.fullmatch(old))]
        if len(matches) > 1:
            raise AssertionError(f"{len(matches)} rules claim {old}: a mistake in the family's table.")
        if not matches:
            account.unknown.append(old)
            continue
        match, new_names = matches[0]
        for new, part in zip(new_names, _parts(tensor, len(new_names))):
            if new is not None:
                account.fill(new.format(**match.groupdict()), part, old, targets)
    account.missing = [_old_name(name, rules) for name in targets if name not in account.origin]
    account.raise_if_unbalanced()
    return account.filled


def restore(tensors: Mapping[str, torch.Tensor], rules: Rules) -> dict[str, torch.Tensor]:
    """The inverse of `rename`: every tensor under its old name, those that were split joined again.

    Joined tensors are built one by one, the others returned as they are: where `tensors` reads a file when it is
    asked, what is returned takes the bytes of the file once. A part that goes to `None` is filled with zeros, and what
    may be absent from an old name (`[…]`) is.

    Args:
        tensors: The model's tensors under their new names.
        rules: Old name to new name or names, see the top of this file. Of several that give a new name, the first
            one whose parts are all there.

    Raises:
        ConversionError: where a tensor has no place in the old layout, or a part of one is missing. It names them.
    """
    origins: dict[str, tuple[str | None, ...]] = {}
    homeless, incomplete = [], []
    for new in tensors:
        claims = list(_claims(new, rules))
        whole = [(old, parts) for old, parts in claims if all(part is None or part in tensors for part in parts)]
        if whole:
            old, parts = whole[0]
            origins[old] = parts
        elif claims:
            absent = [part for part in claims[0][1] if part is not None and part not in tensors]
            incomplete.append(f"{new} without {', '.join(absent)}")
        else:
            homeless.append(new)
    categories = {"tensors have no place there": homeless, "tensors lack the rest of theirs": incomplete}
    lines = [f"{len(names)} {what}: {shown(names)}" for what, names in categories.items() if names]
    if lines:
        raise ConversionError("The layout to write cannot hold the model.\n  " + "\n  ".join(lines))
    return {old: _joined(tensors, parts) for old, parts in origins.items()}


def fill(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping, rules: Rules, head: Mapping = {}
) -> PreTrainedModel:
    """A model whose parameters are views of the checkpoint: it has no memory of its own.

    Args:
        model_class: A model, or a classifier around one.
        config: Its config.
        tensors: The checkpoint's tensors under their old names.
        rules: Old names to new ones: the backbone's as in `ViTRegModel`, a classifier's as in
            `ViTRegForImageClassification`.
        head: `weight` and `bias` of the classifier, where it is in another file.

    Raises:
        ConversionError: see `rename`.
    """
    with torch.device("meta"):
        model = model_class(config)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    full_names = {name.removeprefix(prefix): name for name in model.state_dict()}
    separate = {f"classifier.{name}": tensor for name, tensor in head.items()}
    targets = {name: model.state_dict()[full].shape for name, full in full_names.items() if name not in separate}
    renamed = rename(tensors, rules, targets) | separate
    model.load_state_dict({full_names[name]: _alone(tensor) for name, tensor in renamed.items()}, assign=True)
    return model.eval()


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory under a storage of its own: of tensors that share one, `save_pretrained` would make copies."""
    # flat, because a tensor without dimensions cannot be taken for bytes
    flat = tensor.contiguous().view(-1)
    return torch.from_numpy(flat.view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)


def shown(names: list[str]) -> str:
    """The first few names, and how many more."""
    more = len(names) - MAX_NAMES_SHOWN
    return ", ".join(names[:MAX_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _pattern(template: str) -> re.Pattern:
    escaped = re.escape(template).replace(r"\[", "(?:").replace(r"\]", ")?")
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda found: f"(?P<{found[1]}>{PLACEHOLDERS[found[1]]})", escaped))


def _parts(tensor: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
    """Equal parts along the first dimension. A tensor without stays whole, to be refused as a misfit."""
    if number == 1 or tensor.ndim == 0 or tensor.shape[0] % number:
        return (tensor,) * number
    return tensor.chunk(number)


def _claims(new: str, rules: Rules) -> Iterator[tuple[str, tuple[str | None, ...]]]:
    """Old names that a new one may come from, each with all of its parts."""
    for old, templates in rules.items():
        templates = (templates,) if isinstance(templates, str) else templates
        for template in filter(None, templates):
            if match := _pattern(template).fullmatch(new):
                values = match.groupdict()
                parts = tuple(each and each.format(**values) for each in templates)
                yield _without_optional(old).format(**values), parts
                break


def _joined(tensors: Mapping[str, torch.Tensor], parts: tuple[str | None, ...]) -> torch.Tensor:
    """Parts along the first dimension; those that were dropped have the shape of the others."""
    if len(parts) == 1:
        return tensors[parts[0]]
    there = {part: tensors[part] for part in parts if part is not None}
    dropped = torch.zeros_like(next(iter(there.values())))
    return torch.cat([dropped if part is None else there[part] for part in parts])


def _without_optional(old: str) -> str:
    return re.sub(r"\[.*?\]", "", old)


def _old_name(name: str, rules: Rules) -> str:
    """The name that would have filled this target, in the words of the checkpoint's owner."""
    for old, new in rules.items():
        for template in (new,) if isinstance(new, str) else filter(None, new):
            if match := _pattern(template).fullmatch(name):
                return _without_optional(old).format(**match.groupdict())
    return name
