"""Build a random model from a tiny configuration: float64 by default, in training mode, without dropout."""

import inspect

import torch


class CannotBuildError(Exception):
    """No tiny model of a model type can be built; the message says why."""


def initialised(model_class, config, dtype=torch.float64):
    """
    Return a random model of a tiny configuration, in training mode, without dropout.

    Raises:
        CannotBuildError: If the configuration is not tiny.
    """
    torch.manual_seed(0)
    experts = {"experts_implementation": "eager"} if model_class._can_set_experts_implementation() else {}
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > 3e6:
        raise CannotBuildError(f"its smallest configuration has {size / 1e6:.0f} million parameters")
    model = model_class._from_config(config, dtype=torch.float32, **experts)
    for parameter in model.parameters():
        if (parameter.numel() and not parameter.isfinite().all()) or (parameter == 0).all():
            torch.nn.init.normal_(parameter, std=0.2)
    without_dropout(model)
    text = model.config.get_text_config()
    if has_auxiliary_loss(model):
        text.output_router_logits, text.router_aux_loss_coef = True, 0.1
    return model.to(dtype).train()


def has_auxiliary_loss(model):
    """Whether a model computes a load-balancing loss over its experts."""
    forward = inspect.unwrap(type(model).forward)
    is_mixture = any("router" in name or "experts" in name for name, _ in model.named_modules())
    return is_mixture and "load_balancing_loss_func" in forward.__code__.co_names


def without_dropout(model):
    """Set every probability of dropout, drop path and jitter to 0, in whatever attribute modules keep it."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and any(
                word in name for word in ("dropout", "drop_prob", "jitter", "layerdrop")
            ):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
