"""Draws with this adapter: diffusers.DiffusionPipeline.from_pretrained("org/adapter", trust_remote_code=True)."""

try:
    import uc_adapters.pipeline as uc_pipeline  # in this form, diffusers does not name a package to install before we do
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"No module {error.name!r}; expected uc-adapters with its extra 'diffusers'. README.md beside this file says how to "
        "install uc-adapters."
    ) from error

UniCompressPipeline = uc_pipeline.UniCompressPipeline
