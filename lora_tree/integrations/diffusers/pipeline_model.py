"""PipelineModel: a tree bound to the components of a pipeline, which the caller goes on calling.

    pipe.unet, pipe.text_encoder, … ──▶ one base, an `Assembly` ──▶ PipelineModel
    pipe([prompt, prompt])          ──▶ each component's rows, found inside route (`rows.py`)

Law: a component that another tree, a LoRA in diffusers or an offloading hook changes is refused.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...attachment import Attachment
from ...blend import Blend
from ...cache import Frequency, Policy
from ...engine.hook import Hook
from ...engine.routing.forms import Strategy
from ...engine.rows.batch_axis import BatchAxis
from ...engine.switching.copy_place import CopyPlace
from ...errors import StateError
from ...extras import need
from ...model import TreeModel
from ...tree import AdapterTree
from .components import components_of
from .module_names import assembled
from .rows import PipelineAxis

__all__ = ["PipelineModel", "attach", "attach_pipeline"]

# Both sides are weak: this table keeps neither a component nor a model alive. So a model that was
# dropped without `detach` leaves its pipeline free for another tree.
_HELD: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PipelineModel]]
_HELD = weakref.WeakKeyDictionary()


def attach_pipeline(
    tree: AdapterTree,
    pipe: Any,
    *,
    pristine: CopyPlace = "auto",
    compute_dtype: torch.dtype | None = None,
    host_budget: int | str | None = None,
    device_budget: int | str | None = None,
    eviction: Callable[[], Policy] = Frequency,
) -> PipelineModel:
    """Bind a tree to a diffusion pipeline. Nothing of it is changed until a path is activated.

    Args:
        tree: its nodes' modules are named by component: ``unet.mid_block.….to_q``.
        pipe: a ``diffusers.DiffusionPipeline`` that is not offloaded: offloading moves weights at
            every call, without the tree noticing.
        pristine, compute_dtype, host_budget, device_budget, eviction: as for `lora_tree.attach`.

    Raises:
        MissingExtra: diffusers is not installed.
        SpecError: ``pipe`` is no pipeline, or none of its components takes adapters.
        StateError: a tree is attached to it already, LoRAs are loaded into it, or it is offloaded.
        BaseMismatch: a fresh node targets nothing in this base; names the node.
    """
    need("diffusers", extra="diffusers", what="a tree over a pipeline")
    components = components_of(pipe)
    _check_free(components)
    base = assembled(components, type(pipe), name=_name_of(pipe))
    how = Attachment(pristine, compute_dtype, host_budget, device_budget, eviction)
    model = PipelineModel(tree, base, how)
    model.bind(pipe)
    return model


attach = attach_pipeline
"""The same function, by a name that reads well with the module's: ``diffusers.attach(tree, pipe)``.
"""


class PipelineModel(TreeModel):
    """A tree bound to a pipeline; made by `attach_pipeline`. The pipeline stays the one to call.

    `base` is the components side by side. Its forward is refused; a training loop calls `pipe.unet`
    itself, inside ``using`` or ``route``.
    """

    def bind(self, pipe: Any) -> None:
        """Note the pipeline whose components these are; `attach_pipeline` calls it once."""
        self._pipe = pipe
        for component in self.base.children():
            _HELD[component] = weakref.ref(self)

    @contextlib.contextmanager
    def route(
        self,
        paths: Iterable[Blend],
        *,
        strategy: Strategy = "auto",
        repeat: int = 1,
        tile: int = 1,
        batch_first: bool = True,
    ) -> Iterator[TreeModel]:
        """Give every prompt, or every image, its own path, for the length of a ``with``.

        Inside, call the pipeline as always: guidance, negative prompts and
        ``num_images_per_prompt`` are read from its own call. If you call a component by itself,
        ``repeat`` and ``tile`` say how its rows lie.

        Args:
            paths: one for each prompt; or one for each image, those of the first prompt first, if
                the paths of one prompt agree on the text encoders.
            strategy, repeat, tile, batch_first: as for `TreeModel.route`.

        Raises:
            PathError, SpecError, FolderError, FormatError, StateError: as `TreeModel.route`.
            BaseMismatch: in the pipeline's call: it makes another number of images than there are
                paths.
        """
        with contextlib.ExitStack() as stack:
            model = stack.enter_context(
                super().route(
                    paths, strategy=strategy, repeat=repeat, tile=tile, batch_first=batch_first
                )
            )
            rows = self._stage.current.request.rows
            assert rows is not None
            assert isinstance(rows.axis, PipelineAxis)
            for name, component in self.base.named_children():
                # The stack unwinds in reverse order, so the hooks are removed before the route
                # ends whose rows they read.
                begins = Hook(rows.axis.begins, name)
                # The hook is removed with the block: outside of it the pipeline has none of ours.
                handle = component.register_forward_pre_hook(begins, with_kwargs=True)
                stack.callback(handle.remove)
            yield model

    def detach(self) -> None:
        """Make the pipeline bare and release it; see `TreeModel.detach`."""
        super().detach()
        for component in self.base.children():
            _HELD.pop(component, None)

    # ------------------------------------------------------------------ private
    def _row_axis(self, rows: int, *, repeat: int, tile: int, batch_first: bool) -> BatchAxis:
        return PipelineAxis(
            self._pipe,
            rows,
            repeat=repeat,
            tile=tile,
            batch_first=batch_first,
            seen=self._seen_sites,
        )

    def _usable(self) -> None:
        """Refuse to switch components that the pipeline does not call any more."""
        super()._usable()
        for name, component in self.base.named_children():
            if getattr(self._pipe, name, None) is not component:
                raise StateError(
                    f"the pipeline's {name} was replaced since the tree was attached",
                    "put it back, or model.detach() and attach the tree again",
                )


def _check_free(components: Mapping[str, nn.Module]) -> None:
    """Refuse components that another tree, diffusers' LoRAs or an offloading hook change too."""
    for name, component in components.items():
        held = _HELD.get(component)
        if held is not None and held() is not None:
            raise StateError(
                f"a tree is attached to this pipeline's {name} already",
                "use that model, or call its detach() first",
            )
        # accelerate, by which diffusers offloads, keeps its hook in this attribute.
        if getattr(component, "_hf_hook", None) is not None:
            raise StateError(
                f"{name}: the pipeline is offloaded: its weights are moved at every call",
                "pipe.remove_all_hooks(), and pipe.to(device) instead",
            )
        # PEFT's classes are recognised by the name of their module, so that PEFT need not be
        # imported.
        if any(type(module).__module__.startswith("peft.") for module in component.modules()):
            raise StateError(
                f"{name}: LoRAs are loaded into the pipeline",
                "pipe.unload_lora_weights() first; their files can be nodes of the tree",
            )


def _name_of(pipe: Any) -> str:
    """Return the pipeline's name for its base; empty if it has none."""
    config = getattr(pipe, "config", None)
    name = config.get("_name_or_path") if isinstance(config, Mapping) else None
    return name if isinstance(name, str) else ""
