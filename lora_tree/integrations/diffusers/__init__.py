"""A tree over a diffusion pipeline: its UNet or transformer and its text encoders, as one base.

    from lora_tree.integrations.diffusers import attach_pipeline
    model = attach_pipeline(tree, pipe)
    model.activate("style/knight"); pipe("a castle")
    with model.route(["style/knight", "style/wizard"]): pipe(["a castle", "a tower"])

The caller keeps calling the pipeline. How the rows of a batch lie in each component is found from
the pipeline's own call (`rows.py`), and names of other programs are looked up among the pipeline's
modules (`module_names.py`).
"""

from .components import components_of, is_pipeline, pipeline_skeleton
from .pipeline_model import PipelineModel, attach, attach_pipeline

__all__ = [
    "PipelineModel",
    "attach",
    "attach_pipeline",
    "components_of",
    "is_pipeline",
    "pipeline_skeleton",
]
