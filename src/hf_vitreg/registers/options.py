# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What can be set when a model is given registers, and which method reads it."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

from ..analysis.norms import Side
from ..analysis.outliers import ThresholdMethod
from .effect import CLS_TOLERANCE, MIN_FALL, require_limits
from .register_neurons import PUBLISHED


AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class RegisterOptions:
    """Settings of all methods. What a method does not read must be left as it is; `None` is the method's own choice.

    Attributes:
        num_registers: How many: by default 1 at test time, 4 for a warm start, and what the recipe says to distill.
        preset: A key of `register_neurons.PUBLISHED`, or `"auto"`.
        highest_layer, count, target_share, reduce, only_sparse: Of `find_register_neurons`, in place of the preset's;
            `count` is its `num_neurons`.
        threshold: Norm of an outlier, or how it is found, in the search for neurons and in the comparison. By default
            the preset's; without one `"mean+3std"` in the search, as it is published, and `"mad"` in the comparison,
            as `inspect` has it.
        detect_layer: After which layer outliers are looked for, in both: from 0, or from the end with -1 the last. By
            default the preset's, or the last.
        register_init_std: Standard deviation of new registers; by default of a warm start what the model's config
            says, to distill what the recipe says.
        recipe: For pretrain.py, by default that of the repository.
        arguments: Further flags of pretrain.py.
        side, size, max_images, batch_size, seed: Of images and comparison, as for `inspect_model`; the seed is that of
            new registers too.
        cls_tolerance, min_fall: What a success is, see `measure_effect`.
        license: Of the new model; by default that of the card of the old one.
    """

    num_registers: int | None = None
    preset: str = AUTO
    highest_layer: int | None = None
    count: int | None = None
    target_share: float | None = None
    reduce: str = "neuron"
    only_sparse: bool = False
    threshold: float | ThresholdMethod | None = None
    detect_layer: int | None = None
    register_init_std: float | None = None
    recipe: Path | None = None
    arguments: tuple[str, ...] = ()
    side: Side = "high"
    size: tuple[int, int] | None = None
    max_images: int | None = 500
    batch_size: int = 16
    seed: int = 0
    cls_tolerance: float = CLS_TOLERANCE
    min_fall: float = MIN_FALL
    license: str | None = None

    def changed(self) -> dict[str, object]:
        """What is not as it is by default."""
        return {
            option.name: getattr(self, option.name)
            for option in dataclasses.fields(self)
            if getattr(self, option.name) != option.default
        }

    def published(self) -> dict[str, object]:
        """The preset's arguments of `find_register_neurons`; nothing for `"auto"`."""
        return {} if self.preset == AUTO else dict(PUBLISHED[self.preset])

    def flags(self) -> str:
        """What was changed as the command line has it."""
        words = []
        for name, value in self.changed().items():
            if name != "arguments":
                value = "x".join(map(str, value)) if isinstance(value, tuple) else value
                words += [_flag(name), *([] if value is True else [str(value)])]
        return shlex.join([*words, *(["--", *self.arguments] if self.arguments else [])])


EVERY_METHOD = {"num_registers", "threshold", "detect_layer", "size", "max_images", "batch_size", "seed"}
EVERY_METHOD |= {"cls_tolerance", "min_fall", "license"}
READ_BY = {
    "test-time": {"preset", "highest_layer", "count", "target_share", "reduce", "only_sparse"},
    "distill": {"register_init_std", "recipe", "arguments", "side"},
    "warm-start": {"register_init_std", "side"},
}


def require_options_of(method: str, options: RegisterOptions, has_images: bool) -> None:
    """Before anything is loaded.

    Raises:
        ValueError: for a method that there is not, an option that it would not read, a value that there cannot be, and
            a method that needs images and has none.
    """
    if method not in READ_BY:
        raise ValueError(f"There is no method {method!r}, only {', '.join(READ_BY)}.")
    for name in options.changed():
        if name not in READ_BY[method] | EVERY_METHOD:
            readers = ", ".join(other for other, names in READ_BY.items() if name in names)
            what = "Arguments behind `--`" if name == "arguments" else _flag(name)
            raise ValueError(f"The method {method} does not read {what}; {readers} does.")
    if not has_images and method != "warm-start":
        raise ValueError(f"The method {method} needs images: give --images.")
    if options.preset != AUTO and options.preset not in PUBLISHED:
        raise ValueError(f"There is no preset {options.preset!r}, only {', '.join((AUTO, *PUBLISHED))}.")
    if options.target_share is not None and (options.count is not None or options.preset != AUTO):
        raise ValueError(
            "--target-share is for the search for a number of neurons, which --count and a preset give. Leave one of "
            "them out."
        )
    if options.num_registers is not None and options.num_registers < 1:
        raise ValueError(f"--num-registers must be 1 or more, got {options.num_registers}.")
    if options.reduce not in ("neuron", "layer"):
        raise ValueError(f"--reduce must be neuron or layer, got {options.reduce!r}.")
    require_limits(options.cls_tolerance, options.min_fall)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
