"""A tree over a diffusion pipeline: its UNet or transformer and its text encoders, as one base.

    from lora_tree.integrations.diffusers import attach
    model = attach(tree, pipe)
    model.activate("style/knight"); pipe("a castle")
    with model.route(["style/knight", "style/wizard"]): pipe(["a castle", "a tower"])

The caller keeps calling the pipeline. In it a component sees the batch in a form of its own: with guidance a text
encoder is called on n rows, twice, and the UNet on 2n, the negative prompts first; `num_images_per_prompt` repeats
every prompt in place. So how rows lie is found out for each call of a component, from the pipeline's own call:

    images a prompt · prompts · guidance      (repeat, tile) of the rows that a component is given
"""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..assembly import Assembly
from ..blend import Blend
from ..cache import Frequency, Policy
from ..callers import locals_of_call
from ..engine.batch_axis import BatchAxis, SeenSites
from ..engine.pristine import Place
from ..engine.routed import Strategy
from ..errors import BaseMismatch, LoraTreeError, SpecError, StateError, listing
from ..extras import foreign, need, open_pretrained
from ..formats import diffusers as diffusers_format
from ..formats import kohya
from ..lowrank import LowRank
from ..model import TreeModel, attach_as
from ..sites import Site
from ..storage import as_path
from ..system.reading import is_file
from ..tree import AdapterTree

__all__ = ["PipelineModel", "attach", "components_of", "is_pipeline", "skeleton"]

ADAPTABLE = re.compile(r"(?:unet|transformer|text_encoder)(?:_[23])?\Z")
MODEL_INDEX = "model_index.json"
MAIN_INPUTS = ("hidden_states", "sample", "input_ids")

_HELD: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PipelineModel]]
_HELD = weakref.WeakKeyDictionary()


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that adapters change: name → model, in the pipeline's own order.

    Raises:
        SpecError: it is no pipeline, or has none.
    """
    held = getattr(pipe, "components", None)
    if not isinstance(held, Mapping):
        raise SpecError(
            f"expected a DiffusionPipeline, got {type(pipe).__name__}",
            "a single model is attached by lora_tree.attach(tree, model)",
        )
    found: dict[str, nn.Module] = {}
    for name, component in held.items():
        if ADAPTABLE.match(name) and isinstance(component, nn.Module):
            found[name] = component
    if not found:
        raise SpecError(
            f"{type(pipe).__name__} has no component that takes adapters: it has {listing(held)}",
            "a pipeline's unet, transformer and text_encoder do",
        )
    return found


def attach(
    tree: AdapterTree,
    pipe: Any,
    *,
    pristine: Place = "auto",
    compute_dtype: torch.dtype | None = None,
    host_budget: int | str | None = None,
    device_budget: int | str | None = None,
    eviction: Callable[[], Policy] = Frequency,
) -> PipelineModel:
    """Bind a tree to a diffusion pipeline. Nothing of the pipeline is changed until a path is activated.

    Args:
        tree: its nodes' modules are named by component: ``unet.mid_block.….to_q``, ``text_encoder.….q_proj``.
        pipe: a ``diffusers.DiffusionPipeline``; call ``enable_model_cpu_offload`` and its kin not at all, because they
            move weights behind the tree's back.
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
    base = _assembled(components, type(pipe), name=_name_of(pipe))
    model = attach_as(
        PipelineModel,
        tree,
        base,
        pristine=pristine,
        compute_dtype=compute_dtype,
        host_budget=host_budget,
        device_budget=device_budget,
        eviction=eviction,
    )
    model.bind(pipe)
    return model


def skeleton(folder: str | os.PathLike[str]) -> Assembly:
    """A pipeline's adaptable components, with shapes and no memory, from the configs in its folder.

    Args:
        folder: as ``pipe.save_pretrained`` writes it; with a ``model_index.json``.

    Raises:
        MissingExtra: diffusers or transformers is not installed.
        SpecError: it is no such folder, or names what they do not have.
    """
    diffusers = need("diffusers", extra="diffusers", what="the components of a pipeline")
    transformers = need("transformers", extra="transformers", what="a pipeline's text encoders")
    with foreign(f"{folder}: diffusers can't read its {MODEL_INDEX}"), torch.device("meta"):
        index = diffusers.DiffusionPipeline.load_config(folder, local_files_only=True)
        made: dict[str, nn.Module] = {}
        for name, said in index.items():
            if not ADAPTABLE.match(name) or None in (said or [None]):
                continue  # a component that this pipeline does without
            library, kind = said
            if library == "diffusers":
                model = getattr(diffusers, kind)
                config = model.load_config(folder, subfolder=name, local_files_only=True)
                made[name] = model.from_config(config).eval()
            else:
                model = getattr(transformers, kind)
                config = open_pretrained(
                    transformers.AutoConfig, folder, failed=f"no config of {name}", subfolder=name
                )
                made[name] = model(config).eval()
        pipeline = getattr(diffusers, index["_class_name"])
    return _assembled(made, pipeline, name=os.fspath(folder))


def is_pipeline(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a pipeline, as ``pipe.save_pretrained`` writes it."""
    return is_file(as_path(folder) / MODEL_INDEX)


def _assembled(components: dict[str, nn.Module], kind: Any, *, name: str) -> Assembly:
    """The components as one base, which knows the names that files give to them."""
    return Assembly(
        components,
        name_or_path=name,
        aliases=_aliases(components),
        prefixes=_prefixes(components),
        convert=partial(_converted, kind, components.get("unet")),
    )


class PipelineModel(TreeModel):
    """A tree bound to a pipeline; made by `attach`. The pipeline stays the one to call.

    `base` is the components side by side. Its forward is refused; a training loop calls `pipe.unet` itself, inside
    ``using`` or ``route``.
    """

    def bind(self, pipe: Any) -> None:
        """Note the pipeline whose components these are; `attach` calls it once."""
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

        Inside, call the pipeline as ever: guidance, negative prompts and ``num_images_per_prompt`` are seen from its
        own call. Where a component is called by itself, ``repeat`` and ``tile`` say how its rows lie.

        Args:
            paths: one for each prompt; or one for each image (``num_images_per_prompt`` for each prompt in turn), where
                the paths of one prompt's images agree on the text encoders.
            strategy, repeat, tile, batch_first: as for `TreeModel.route`.

        Raises:
            PathError, SpecError, FolderError, FormatError, StateError: as `TreeModel.route`.
            BaseMismatch: in the pipeline's call: it makes another number of images than paths were given.
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
                begins = partial(rows.axis.begins, name)
                # The hook goes with the block: outside of it the pipeline has none of ours.
                handle = component.register_forward_pre_hook(begins, with_kwargs=True)
                stack.callback(handle.remove)
            yield model

    def detach(self) -> None:
        """Make the pipeline bare and let go of it; see `TreeModel.detach`."""
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


class PipelineAxis(BatchAxis):
    """How the rows of one batch lie in what each component is given.

    Args:
        pipe: whose call is looked at.
        rows: how many paths were given.
        repeat, tile, batch_first, seen: as for `BatchAxis`.
    """

    def __init__(
        self,
        pipe: Any,
        rows: int,
        *,
        repeat: int,
        tile: int,
        batch_first: bool,
        seen: SeenSites,
    ) -> None:
        super().__init__(rows, repeat=repeat, tile=tile, batch_first=batch_first, seen=seen)
        self._pipe = pipe
        self._lie: dict[str, tuple[int, tuple[int, int] | None]] = {}

    def begins(
        self, name: str, component: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note how the rows lie in a component's forward that begins now.

        Raises:
            BaseMismatch: they are not as many as paths, prompts and images make.
        """
        self._lie.pop(name, None)
        # How many images a prompt makes is said in the pipeline's own call, and nowhere else.
        call = locals_of_call("__call__", self._pipe, ("batch_size", "num_images_per_prompt"))
        given = _rows_given(args, kwargs)
        if call is None or given is None:
            return  # the component was called by itself: `spread` goes by what the caller declared
        if name.startswith("text_encoder"):
            self._lie[name] = given, self._of_prompts(given)
        else:
            self._lie[name] = given, self._of_images(name, given, call)

    def spread(self, site: Site, x: Tensor, out: Tensor) -> tuple[int, int]:
        """How often every row stands in place in a site's input, and the batch as a whole.

        Raises:
            BaseMismatch: the first axis is not the rows; names the site.
        """
        component = site.name.partition(".")[0]
        known = self._lie.get(component)
        if known is None:
            return super().spread(site, x, out)
        given, lie = known
        if lie is None:
            raise BaseMismatch(
                f"{site.name}: {component} was given {given} prompts, and the route is for {self.rows} rows, which "
                "differ in it: the images of one prompt share its text",
                "repeat the prompt, one for each path: pipe([prompt] * n)",
            )
        if x.shape[:1] != (given,) or out.shape[:1] != (given,):
            raise BaseMismatch(
                f"{site.name}: its input is {tuple(x.shape)}, and the first axis should be the {given} rows of "
                f"{component}"
            )
        return lie

    def _of_prompts(self, given: int) -> tuple[int, int] | None:
        """(repeat, tile) for a text encoder; None where a prompt has several paths."""
        if given % self.rows:
            return None
        return 1, given // self.rows

    def _of_images(self, name: str, given: int, call: Mapping[str, Any]) -> tuple[int, int]:
        """(repeat, tile) for the UNet or transformer."""
        each = call.get("num_images_per_prompt") or 1
        prompts = call.get("batch_size")
        if not isinstance(prompts, int):
            prompts = self.rows
        repeat = each if self.rows == prompts else 1
        if self.rows not in (prompts, prompts * each) or given % (self.rows * repeat):
            raise BaseMismatch(
                f"{name}: the pipeline makes {each} images for each of {prompts} prompts ({given} rows at once), and "
                f"the route is for {self.rows} rows",
                "give route one path for each prompt, or one for each image",
            )
        return repeat, given // (self.rows * repeat)


def _rows_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The first axis of a component's main input."""
    main = [kwargs[name] for name in MAIN_INPUTS if name in kwargs]
    found = next((x for x in [*args, *main] if isinstance(x, Tensor) and x.ndim > 1), None)
    return None if found is None else found.shape[0]


def _check_free(components: Mapping[str, nn.Module]) -> None:
    """Refuse components that another tree, diffusers' own LoRAs or an offloading hook change as well."""
    for name, component in components.items():
        held = _HELD.get(component)
        if held is not None and held() is not None:
            raise StateError(
                f"a tree is attached to this pipeline's {name} already",
                "use that model, or call its detach() first",
            )
        if getattr(component, "_hf_hook", None) is not None:
            raise StateError(
                f"{name}: the pipeline is offloaded: its weights are moved at every call",
                "pipe.remove_all_hooks(), and pipe.to(device) instead",
            )
        if any(type(module).__module__.startswith("peft.") for module in component.modules()):
            raise StateError(
                f"{name}: LoRAs are loaded into the pipeline",
                "pipe.unload_lora_weights() first; their files can be nodes of the tree",
            )


def _name_of(pipe: Any) -> str:
    """The pipeline's own name of its base, where it has one."""
    config = getattr(pipe, "config", None)
    name = config.get("_name_or_path") if isinstance(config, Mapping) else None
    return name if isinstance(name, str) else ""


def _aliases(components: Mapping[str, nn.Module]) -> dict[str, str]:
    """Words that files use for components which this pipeline calls otherwise."""
    aliases: dict[str, str] = {}
    if "unet" not in components and "transformer" in components:
        aliases["unet"] = "transformer"
    second = components.get("text_encoder_2")
    if "text_encoder_3" not in components and "T5" in type(second).__name__:
        aliases["text_encoder_3"] = "text_encoder_2"  # kohya counts T5 as the third everywhere
    return aliases


def _prefixes(components: Mapping[str, nn.Module]) -> dict[str, str]:
    """The ``text_model`` that CLIP's names began with before transformers 5, where it is gone."""
    found: dict[str, str] = {}
    for name, component in components.items():
        is_clip = type(component).__name__.startswith("CLIPText")
        if is_clip and "text_model" not in component._modules:
            found[name] = "text_model"
    return found


def _converted(
    kind: Any, unet: nn.Module | None, name: str, value: LowRank
) -> Mapping[str, LowRank]:
    """What diffusers' own conversion makes of one module of another program's UNet or transformer.

    Each module is converted by itself, because diffusers drops what it does not know of a whole file in silence, and a
    module of which nothing comes back is an error here.
    """
    if not name.startswith("unet.") or not hasattr(kind, "lora_state_dict"):
        return {}
    try:
        keys = _keys_for_diffusers(name, value)
        options = {} if unet is None else {"unet_config": getattr(unet, "config", None)}
        made = kind.lora_state_dict(keys, **options)
        state = made[0] if isinstance(made, tuple) else made
        if not state:
            return {}
        back = diffusers_format.read(state, {}, name)
    except LoraTreeError:
        raise
    except Exception as error:  # whatever it raises: it is another library's
        raise BaseMismatch(
            f"{name}: diffusers can't convert it for a {kind.__name__}: {type(error).__name__}: {error}"
        ) from error
    if value.A.is_meta:
        return {
            own: one.with_tensors(lambda tensor: tensor.to("meta"))
            for own, one in back.modules.items()
        }
    return back.modules


def _keys_for_diffusers(name: str, value: LowRank) -> dict[str, Tensor]:
    """The module's tensors under kohya's keys, with a scale of 1.

    The scale is folded first and alpha is the rank, in fp64: diffusers would multiply with a rounded one.
    """
    if value.A.is_meta:
        # Numbers are looked at in the conversion, so an outline gets some; they take no memory.
        value = value.with_tensors(lambda t: torch.ones((), dtype=t.dtype).expand(t.shape))
    else:
        value = value.folded()
    keys = kohya.keys_of(name, value)
    alpha = next(key for key in keys if key.endswith(".alpha"))
    keys[alpha] = torch.tensor(float(value.rank), dtype=torch.float64)
    return keys
