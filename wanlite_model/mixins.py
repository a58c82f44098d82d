"""diffusers' ModelMixin and ConfigMixin where diffusers is installed, else small stand-ins with the same methods.

diffusers is optional: installing it beside the transformers that ComfyUI needs can upgrade packages under it. Which of the two
a student inherits changes neither its files nor its maths.
"""
from __future__ import annotations

import functools
import inspect
import logging
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)


class PlainConfigMixin:
    """Remembers the constructor's arguments, as diffusers' ConfigMixin does."""
    config_name = "config.json"

    def register_to_config(self, **arguments: Any) -> None:
        self.__dict__["_internal_dict"] = MappingProxyType({**self.__dict__.get("_internal_dict", {}), **arguments})

    @property
    def config(self) -> MappingProxyType:
        return self.__dict__["_internal_dict"]

    @classmethod
    def from_config(cls, config: Any, **arguments: Any) -> Any:
        """Builds from a dict of constructor arguments; names that are not arguments are left out."""
        accepted = inspect.signature(cls.__init__).parameters
        return cls(**{key: value for key, value in {**config, **arguments}.items() if key in accepted and key != "self"})


class PlainModelMixin(nn.Module):
    """The part of diffusers' ModelMixin that people call on a model."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)


def plain_register_to_config(init: Any) -> Any:
    """Decorates __init__ so that its arguments, defaults included, are in `self.config`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        self.register_to_config(**{key: value for key, value in bound.arguments.items() if key != "self"})
        init(self, *args, **kwargs)

    return wrapped


try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
except ImportError:
    ConfigMixin, ModelMixin, register_to_config = PlainConfigMixin, PlainModelMixin, plain_register_to_config
except Exception as error:      # a diffusers that is there and broken must not take a working pack down with it
    log.warning("diffusers is installed but cannot be imported (%s); WanLite goes on without it.", error)
    ConfigMixin, ModelMixin, register_to_config = PlainConfigMixin, PlainModelMixin, plain_register_to_config
