"""Tensors that wait on disk: together they are a good part of a model, and memory holds one at a time."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import WanLiteError
from ..formats.container import read_header, read_tensor


class Shelf:
    """Tensors by name, each in a file of its own in `folder`, which is made here and removed by the caller."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes these in, in place of those that had their names. Raises WanLiteError when the disk refuses."""
        for name, tensor in tensors.items():
            try:
                save_file({name: tensor.contiguous()}, self._folder / name)
            except (OSError, SafetensorError) as error:
                raise WanLiteError(f"{name} could not be put aside ({error}).", "Weights wait on disk while a student is made of them.",
                                   "Free some disk space and try again.") from error

    def __contains__(self, name: str) -> bool:
        return (self._folder / name).is_file()

    def __getitem__(self, name: str) -> Tensor:
        path = self._folder / name
        with path.open("rb") as file, torch.inference_mode(False):
            return read_tensor(file, read_header(path).entries[name])
