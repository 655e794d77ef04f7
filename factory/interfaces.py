"""The seven kinds of component: the one page a component author reads.

Inherit from exactly one kind, and give every option of ``__init__`` a name, a type and (where one makes sense) a default:
the constructor is the schema that YAML is checked against. ``**kwargs`` and positional options are refused. An option
annotated with a kind (``score: Metric``) takes a node of its own and receives the built component.
Arguments called *given* below come from the engine by keyword and are never written in YAML.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mllm_factory.types import Batch, Output, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mllm_factory.model import MultimodalModel
    from mllm_factory.trainer import TrainState


class Encoder(nn.Module, ABC):
    """Media items to features. One item gives a fixed number of tokens; a tiled picture is several items.

    ``__init__`` sets:
        modality: ``"vision"`` or ``"audio"``.
        dim: width of a feature.
        num_tokens: features of one item.
        transform: one raw item (a PIL picture in RGB; for audio a ``(waveform [channels, time], sample rate)`` pair)
            -> [m, *item_shape], m >= 1 items. Deterministic, called in loader workers.
        absent: when built without memory, what its weights await, in words for the notes of ``check``; None for nothing, and
            for what lies on the hub, which ``check`` sees by itself.
    """

    absent: str | None = None
    modality: str
    dim: int
    num_tokens: int
    transform: Callable[[Any], Tensor]

    @abstractmethod
    def forward(self, items: Tensor) -> Tensor:
        """[n, *item_shape] -> [n, num_tokens, dim]"""


class Projector(nn.Module, ABC):
    """Features to backbone embeddings. Given: ``in_dim``, ``out_dim``, ``in_tokens``.

    ``__init__`` sets:
        num_tokens: tokens of one item after projection.
    """

    num_tokens: int

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, num_tokens, out_dim]"""


class Backbone(nn.Module, ABC):
    """A decoder-only language model that starts from embeddings.

    ``__init__`` sets:
        dim: width D of an embedding.
        tokenizer: a transformers tokenizer with a chat template.
        max_positions: longest sequence it accepts, or None where nothing limits it.
    """

    dim: int
    tokenizer: PreTrainedTokenizerBase
    max_positions: int | None

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last: where steering attaches and sharding cuts."""

    @abstractmethod
    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]"""

    @abstractmethod
    def forward(self, embeds: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """[B, T, D], [B, T] bool -> hidden states after the final norm [B, T, D]; None means no padding.

        ``positions`` [B, T] int64 is given where a row holds several samples, one after the other: it starts again from 0 with
        each, and no sample may see another. A backbone that cannot do this leaves the argument out; ``packing`` is then refused.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""

    @abstractmethod
    def generate(
        self,
        embeds: Tensor,
        attention_mask: Tensor,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        use_cache: bool = True,
    ) -> Tensor:
        """Greedy continuation of left-padded prompts: [B, T, D], [B, T] -> new token ids [B, <= max_new_tokens].

        A row that met one of ``stop_ids`` is filled up with the padding id after it.
        """


class Stepping:
    """What may take part in every step of a training; nothing happens by default."""

    def before_step(self, state: TrainState) -> None:
        """Between backward and clipping; may edit gradients."""

    def after_step(self, state: TrainState) -> None:
        """After the update, while gradients are still there; ``state.step`` counts the steps before this one."""

    def readings(self) -> dict[str, float]:
        """Flat keys to numbers for the run's log; NaN for what was not measured."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values besides parameters that ``load_state_dict`` needs to continue."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` gave; the model is built, tuned and on its device."""


_HOOKS = [name for name in vars(Stepping) if not name.startswith("_")]


def takes_part(strategy: Stepping) -> bool:
    """Whether a class overrides a method of ``Stepping``."""
    return any(getattr(type(strategy), hook) is not getattr(Stepping, hook) for hook in _HOOKS)


class Tuning(Stepping, ABC):
    """How one part learns.

    A strategy that overrides a method of ``Stepping`` takes part in every step of a training: it is called before
    the schedule, its readings are logged and its state is saved. In several processes each calls its own, after gradients
    were averaged: what a strategy decides must follow from what is equal in all of them.

    ``apply`` sets:
        resolved: full names, inside the part, of the modules that the strategy adapts, trains or steers; none where it means
            the part as a whole. ``check`` prints them, so that a user sees what a short name in a config came to.
    """

    resolved: Sequence[str] = ()

    @abstractmethod
    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Insert modules into ``part`` and set ``requires_grad`` of its parameters; change nothing else.

        ``requires_grad`` is the only record of what trains: optimizer, checkpoint and reports read it. All state of an
        inserted module lives in parameters. Strategies of one part are applied in order, each on what the former left.
        """


class Schedule(Stepping, ABC):
    """Learning rates per part, step by step. Readings are those besides the rates.

    Optimizer groups carry the part's name in ``group["part"]``, and in ``group["name"]`` the name that rates go by, which is
    ``projector`` for both projectors.

    Class or instance attributes say what it needs:
        reads_media: True if it looks at the items in ``state.batches[i].media``; else, where features are cached, these may be
            places in the cache, [n] int64, which only the encoder understands.
    """

    reads_media: bool = False

    @abstractmethod
    def before_step(self, state: TrainState) -> None:
        """Between backward and clipping: set ``group["lr"]`` of every group; may edit gradients."""


class Metric(ABC):
    """A number or several from a pass over a data set. One instance serves one pass.

    Class or instance attributes say what it needs:
        max_new_tokens: 0, or how many tokens of answer to generate; then ``output.texts`` is set and the batch holds prompts.
        teacher_forced: True to be given the whole conversations with ``output.loss_sum`` and ``output.logits`` instead.
    """

    max_new_tokens: int = 0
    teacher_forced: bool = False

    @abstractmethod
    def update(self, model: MultimodalModel, batch: Batch, output: Output) -> None:
        """Take in one batch. The model is in eval mode and no graph is kept."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Flat keys to numbers; the first key is the main one."""

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """After ``compute``: tables by name, such as ``samples``, each a list of rows; for what a mean cannot tell."""
        return {}


class Source(ABC):
    """A data set of conversations.

    ``__init__`` sets:
        modalities: the media modalities its samples may carry, such as ``{"vision"}``.
        near: where samples that follow one another lie in one large file: how many each file holds, in order, and how many
            samples an epoch mixes at a time, so that few files are read at once. None: an epoch mixes all.
    """

    modalities: frozenset[str]
    near: tuple[Sequence[int], int] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``. Cheap: media stay paths or bytes, the collator decodes them."""


KINDS: dict[str, type] = {
    kind.__name__: kind for kind in (Encoder, Projector, Backbone, Tuning, Schedule, Metric, Source)
}
"""Every kind by its name."""
