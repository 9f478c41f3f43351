"""The models of NAFNet's and Restormer's option files, which train one network without a teacher."""

from __future__ import annotations

from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.kd_model import KDModel


@MODEL_REGISTRY.register()
class ImageRestorationModel(KDModel):
    """NAFNet's: KDModel with ``clip_grad_norm: 0.01``, unless the options say otherwise (``kdsr.options.authors``)."""


@MODEL_REGISTRY.register()
class ImageCleanModel(KDModel):
    """Restormer's: KDModel."""
