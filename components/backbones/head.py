"""The scores of given hidden states, by the model's own code: everything between the final norm and the logits.

Architectures differ there (Cohere multiplies, Granite divides, Gemma caps, MiniCPM divides before the head), so nothing of it
is written again. A shell of the model, a shallow copy that shares every module, runs the model's own forward with a stand-in at the
decoder's place that answers with the hidden states. The model itself is left untouched.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


class _Decoded:
    """What a decoder returns, with hidden states and nothing else: no cache, no attentions, no router scores."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: int | slice) -> Any:
        return (self.last_hidden_state,)[place]


class _StandIn(nn.Module):
    """Takes whatever a decoder takes and returns the hidden states it was made with."""

    def __init__(self, decoder: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self._decoder = [decoder]  # in a list: not a submodule
        self._decoded = _Decoded(hidden)

    def __getattr__(self, name: str) -> Any:
        """Plain values that a head reads from its decoder, such as a multiplier."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_decoder"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> _Decoded:
        """The hidden states, whatever is asked."""
        return self._decoded


def scores(model: nn.Module, decoder: str, hidden: Tensor) -> Tensor:
    """[..., D] -> [..., V], by the forward of ``model`` behind its submodule ``decoder`` (a dotted name)."""
    rows = hidden if hidden.ndim == 3 else hidden.reshape(1, -1, hidden.shape[-1])  # heads want [B, T, D]
    shell: Any = _with(model, decoder.split("."), rows)
    logits = shell.forward(inputs_embeds=rows, use_cache=False, return_dict=True).logits
    return logits if hidden.ndim == 3 else logits.reshape(*hidden.shape[:-1], logits.shape[-1])


def _with(module: nn.Module, path: list[str], hidden: Tensor) -> nn.Module:
    """``module`` with a stand-in at ``path``; whatever is not on the way there is shared."""
    if not path:
        return _StandIn(module, hidden)
    shell = copy.copy(module)
    children = dict(module._modules)
    children[path[0]] = _with(module.get_submodule(path[0]), path[1:], hidden)
    shell.__dict__["_modules"] = children
    return shell
