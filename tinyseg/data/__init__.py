"""Medical volumes: files, the Decathlon folder, intensity and spacing, patches, phantoms."""

from . import augment, ct, decathlon, nifti, phantom, sampling

__all__ = ["augment", "ct", "decathlon", "nifti", "phantom", "sampling"]
