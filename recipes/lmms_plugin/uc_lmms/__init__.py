"""UniCompress adapters as a model of lmms-eval, which finds it by the entry point `lmms_eval.models`."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("uc_adapters", chat_class_path="uc_lmms.model.UcAdapters")
