"""The two files by which diffusers draws with an adapter: its index of a pipeline, and the pipeline's code."""

from __future__ import annotations

import json
from importlib.resources import files

from ..families import FAMILIES


def pipeline_files(model_type: str) -> dict[str, str]:
    """The names and texts of the files that `DiffusionPipeline.from_pretrained` looks for in an adapter's folder.

    Args:
        model_type: Of the base.
    """
    index = {
        "_class_name": ["pipeline", "UniCompressPipeline"],  # a class in pipeline.py
        "processor": ["transformers", FAMILIES[model_type].processor_class],
    }
    code = files(__package__).joinpath("pipeline.py.txt").read_text("utf-8")
    return {"model_index.json": json.dumps(index, indent=2) + "\n", "pipeline.py": code}
