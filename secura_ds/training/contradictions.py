"""What a DeepSpeed configuration and a recipe both say: where they differ, neither may win silently."""

from __future__ import annotations

from typing import Any, NamedTuple

from secura_ds.recipe import Recipe

AUTO = "auto"
SECTIONS = {
    "zero_optimization": '{"stage": 3}',
    "bf16": '{"enabled": "auto"}',
    "fp16": '{"enabled": "auto"}',
}
# What the recipe decides and a configuration would decide again, in ways that no value of the recipe equals.
REPLACED = {
    "optimizer": "training.optimizer, learning_rate and weight_decay",
    "scheduler": "training.scheduler and warmup_ratio",
    "elasticity": "training.micro_batch_size and gradient_accumulation_steps",
    "amp": "backbone.dtype",
    "torch_autocast": "backbone.dtype",
}


class _Said(NamedTuple):
    """What a configuration says at `place`, and what the recipe comes to there, in words and as a value."""

    place: str
    value: Any
    meaning: str


def misshapen(settings: Any) -> list[str]:
    """What is no JSON object where DeepSpeed reads one."""
    if not isinstance(settings, dict):
        return [f"a DeepSpeed configuration is a JSON object, this is {settings!r}"]
    return [
        f"{key} is {settings[key]!r}, which should be an object such as {example}"
        for key, example in SECTIONS.items()
        if not isinstance(settings.get(key, {}), dict)
    ]


def contradictions(settings: dict[str, Any], recipe: Recipe, ranks: int) -> list[str]:
    """What `settings` say otherwise than `recipe` on this many ranks, one line each with both values.

    The value "auto", or none, is the recipe's; a value that equals it is in order.
    """
    problems = [
        f"{key} is set, but the recipe says it with {place}: remove it here"
        for key, place in REPLACED.items()
        if _is_on(settings.get(key))
    ]
    for said in _said_twice(recipe, ranks):
        given = _at(settings, said.place)
        if given not in (None, AUTO) and given != said.value:
            remedy = _what_fits(given, recipe, ranks) if said.place == "train_batch_size" else ""
            problems.append(f'{said.place} is {given!r}, but {said.meaning}: write "auto" here{remedy}')
    return problems


def follow_recipe(settings: dict[str, Any], recipe: Recipe, ranks: int) -> dict[str, Any]:
    """A copy of `settings` in which everything that the recipe says, too, is filled in from it."""
    filled = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for said in _said_twice(recipe, ranks):
        section, _, key = said.place.rpartition(".")
        (filled.setdefault(section, {}) if section else filled)[key] = said.value
    return filled


def _said_twice(recipe: Recipe, ranks: int) -> list[_Said]:
    training, dtype = recipe.training, recipe.backbone.dtype
    micro, passes = training.micro_batch_size, training.gradient_accumulation_steps
    product = f"{micro} x {passes} x {ranks} (micro_batch_size, gradient_accumulation_steps, ranks)"
    return [
        _Said("train_micro_batch_size_per_gpu", micro, f"training.micro_batch_size is {micro}"),
        _Said("gradient_accumulation_steps", passes, f"training.gradient_accumulation_steps is {passes}"),
        _Said("train_batch_size", micro * passes * ranks, f"{product} is {micro * passes * ranks}"),
        _Said(
            "gradient_clipping", training.max_grad_norm, f"training.max_grad_norm is {training.max_grad_norm}"
        ),
        _Said("bf16.enabled", dtype == "bfloat16", f'backbone.dtype is "{dtype}"'),
        _Said("fp16.enabled", dtype == "float16", f'backbone.dtype is "{dtype}"'),
    ]


def _is_on(section: Any) -> bool:
    """True for a section that DeepSpeed would act on; some can be written down and switched off."""
    return section.get("enabled", True) is not False if isinstance(section, dict) else section is not None


def _what_fits(batch: Any, recipe: Recipe, ranks: int) -> str:
    """How many ranks or passes make the batch that a configuration asks for, where a number does."""
    if not isinstance(batch, int) or batch <= 0:
        return ""
    micro, passes = recipe.training.micro_batch_size, recipe.training.gradient_accumulation_steps
    remedies = []
    if batch % (micro * passes) == 0:
        count = batch // (micro * passes)
        remedies.append(f", or launch {count} rank{'s' if count > 1 else ''}")
    if batch % (micro * ranks) == 0:
        remedies.append(f", or set training.gradient_accumulation_steps={batch // (micro * ranks)}")
    return "".join(remedies)


def _at(settings: Any, place: str) -> Any:
    for key in place.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings
